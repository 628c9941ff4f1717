"""Walks on parameters that come divided over 4 devices of the host: prints JSON.

In a process of its own.
"""

import dataclasses
import json
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fastvi
from fastvi._devices import host_rows, layout_for
from fastvi._errors import ConfigError
from fastvi._modes import in_own_modes
from fastvi._vectors import Leaves
from fastvi.sampling.from_localizer import memory
from fastvi.sampling.from_localizer import steps as compiled
from fastvi.sampling.from_localizer.batches import DrawnReader
from fastvi.sampling.from_localizer.measure import standard_normals
from fastvi.sampling.from_localizer.plan import round_scale
from fastvi.sampling.from_localizer.setup import Course, WalkSetup, call_round
from fastvi.sampling.settings import SamplerSettings
from fastvi.target import stream
from fastvi.target.data import Problem, hold
from fastvi.target.fingerprint import fingerprint_loss
from fastvi.target.posterior import LocalPosterior
from fastvi.target.ravel import ravel_loss, split_loss

STEPS, WALKERS, PARTS = 20, 4, 2
INPUTS, HIDDEN, COUNT = 8, 48, 128
rng = np.random.default_rng(0)
HELD = []  # programs only borrow an objective
WEIGHTS = {
    "a": rng.normal(size=(INPUTS, HIDDEN)) / 3,
    "b": rng.normal(size=(HIDDEN, 3)) / 7,
    "c": np.zeros(3),
}
X = rng.normal(size=(COUNT, INPUTS))
Y = np.tanh(X @ WEIGHTS["a"]) @ WEIGHTS["b"] + 0.2 * rng.normal(size=(COUNT, 3))
LARGEST = WEIGHTS["a"].size
COLUMNS = {"a": P(None, "model"), "b": P("model"), "c": P()}
ROWS = {"a": P("model"), "b": P(None, None), "c": P()}


def net(params, batch):
    outputs = jnp.tanh(batch[0] @ params["a"]) @ params["b"] + params["c"]
    return 0.5 * jnp.mean(jnp.sum((outputs - batch[1]) ** 2, axis=-1))


def typed_net(params, batch):
    """The same net, for weights whose types say how they are divided."""
    hidden = jnp.tanh(batch[0] @ params["a"])
    outputs = jnp.dot(hidden, params["b"], out_sharding=P()) + params["c"]
    return 0.5 * jnp.mean(jnp.sum((outputs - batch[1]) ** 2, axis=-1))


def constrained_net(params, batch):
    """The same net, which says how what it computes is divided."""
    place = NamedSharding(mesh_of((4,), ("model",)), P(None, "model"))
    hidden = jax.lax.with_sharding_constraint(jnp.tanh(batch[0] @ params["a"]), place)
    outputs = hidden @ params["b"] + params["c"]
    return 0.5 * jnp.mean(jnp.sum((outputs - batch[1]) ** 2, axis=-1))


def mesh_of(shape, names, kind=AxisType.Auto):
    devices = np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=(kind,) * len(names))


def divide(weights, mesh, specs):
    put = {name: NamedSharding(mesh, specs[name]) for name in weights}
    return {name: jax.device_put(weight, put[name]) for name, weight in weights.items()}


def setup_of(loss_fn, params):
    """A walk of the net, on one device where its parameters are."""
    objective, center = split_loss(loss_fn, params, np.float64) or ravel_loss(
        loss_fn, params, np.float64
    )
    layout = layout_for(center)
    examples = layout.share((jnp.asarray(X), jnp.asarray(Y)))
    posterior = LocalPosterior(center, jnp.asarray(50.0), jnp.asarray(10.0))
    problem = Problem(posterior, hold(examples), 16)
    HELD.append(objective)
    reader = DrawnReader(examples, 4)
    loss = fingerprint_loss(objective, problem)
    return WalkSetup(
        programs=compiled.minibatch_programs(objective, loss, posterior, reader.first, STEPS),
        posterior=posterior,
        leaf_sizes=tuple(objective.structure.leaf_sizes),
        reader=reader,
        keys=jax.random.split(jax.random.key(1), WALKERS),
        seed=np.random.SeedSequence(0),
        settings=SamplerSettings(),
        error=0.1,
        budget=1e6,
        must_walk=True,
        report=lambda work, llc: None,
        num_data=COUNT,
    )


def flat_rows(vectors):
    rows = host_rows(vectors)
    return np.stack([np.concatenate([leaf.ravel() for leaf in _leaves(row)]) for row in rows])


def _leaves(row):
    return row.arrays if isinstance(row, Leaves) else [row]


@in_own_modes
def take_steps(loss_fn, params):
    """Positions after some anchored steps; of the program, what it passes and holds."""
    setup = setup_of(loss_fn, params)
    layout, random = setup.programs.layout, np.random.default_rng(3)
    state = compiled.blank_state(setup.shape, setup.dtype, layout)
    position = compiled.fill(state.position, standard_normals(setup, random))
    momentum = compiled.fill(state.momentum, standard_normals(setup, random))
    state = state._replace(position=position, momentum=momentum)
    scale = round_scale(setup, np.array([30.0, 5.0, 40.0]))
    anchor = layout.share(0 * setup.posterior.center + 0.01)
    course = Course(state, scale, 0.2, anchor, parts=PARTS)
    seen = []

    def watched(*arguments):
        seen.append(setup.programs.advance.lower(*arguments).compile())
        return seen[0](*arguments)

    watching = dataclasses.replace(setup, programs=setup.programs._replace(advance=watched))
    state, _ = call_round(watching, course, setup.reader.first, -1, STEPS)
    gathered = [
        int(np.prod([int(size) for size in shape.split(",") if size]))
        for shape in _shapes_of("all-gather", seen[0].as_text())
    ]
    return flat_rows(state.position), {
        "devices": len(jax.tree_util.tree_leaves(state.position)[0].sharding.device_set),
        "arrays": len(jax.tree_util.tree_leaves(state.position)),
        "gathered": max(gathered, default=0),
        "state": seen[0].memory_analysis().alias_size_in_bytes / 8 / setup.shape[1],
        "share": layout.share_of_parameters,
    }


def _shapes_of(operation, text):
    results = re.findall(rf"= ([^=]*?) {operation}(?:-start)?\(", text)
    return [shape for result in results for shape in re.findall(r"\[([0-9,]*)\]", result)]


def compare():
    """How far positions are from those of flat parameters on one device."""
    first, _ = take_steps(net, WEIGHTS)
    cases = {
        "2 by rows": (net, mesh_of((2,), ("model",)), ROWS, None),
        "4 by columns": (constrained_net, mesh_of((4,), ("model",)), COLUMNS, 0),
        "2 of walkers, 2 by columns": (net, mesh_of((2, 2), ("walkers", "model")), COLUMNS, 0),
        "explicit": (typed_net, mesh_of((2,), ("model",), AxisType.Explicit), COLUMNS, None),
    }
    found = {}
    for name, (loss_fn, mesh, specs, largest) in cases.items():
        if largest is not None:  # one walker after another
            compiled.LARGEST_SIDE_BY_SIDE = largest
        position, told = take_steps(loss_fn, divide(WEIGHTS, mesh, specs))
        compiled.LARGEST_SIDE_BY_SIDE = 2**19
        found[name] = {"off": float(np.max(np.abs(position - first))), **told}
    return found


CURVATURES = {"u": 0.5 * np.ones((6, 8)), "v": 8.0 * np.ones(4)}
POINTS = {name: 0.3 * rng.normal(size=(512, *values.shape)) for name, values in CURVATURES.items()}
NBETA, GAMMA = 10.0, 20.0
EXACT = sum(
    0.5 * float(np.sum(NBETA * values / (NBETA * values + GAMMA))) for values in CURVATURES.values()
)


def quadratic(params, batch):
    def one(values, w, points):
        return jnp.sum(values * (w - points) ** 2, axis=tuple(range(1, points.ndim)))

    parts = [one(CURVATURES[name], params[name], batch[name]) for name in CURVATURES]
    return 0.5 * sum(parts)


def estimate(params, **options):
    return fastvi.estimate_llc(
        quadratic,
        params,
        POINTS,
        nbeta=NBETA,
        localization=GAMMA,
        progress=False,
        dtype="float64",
        budget=2e4,
        **options,
    )


def half_precise(params, batch):
    """Weighted examples, and a model that computes in half precision with one of its arrays."""
    hidden = jnp.tanh(batch[0] @ params["a"].astype(batch[0].dtype))
    losses = jnp.sum((hidden @ params["b"] + params["c"] - batch[1]) ** 2, axis=-1)
    return 0.5 * losses, 1.0 + (batch[0][:, 0] > 0)


class Batches:
    """Data that are read again and again."""

    def __iter__(self):
        parts = [slice(start, start + 32) for start in range(0, COUNT, 32)]
        return iter([(X[part], Y[part]) for part in parts] * 40)


def run_others():
    """Estimates of flat parameters and of divided ones that differ in nothing else."""
    mesh = mesh_of((2, 2), ("walkers", "model"))
    narrow = {**WEIGHTS, "a": jnp.asarray(WEIGHTS["a"], jnp.bfloat16)}
    cases = {
        "weighted, half precision": (half_precise, narrow, (X, Y), {}),
        "anchored": (net, WEIGHTS, (X, Y), {"gradients": "anchored"}),
        "stream": (net, WEIGHTS, Batches(), {}),
    }
    found = {}
    stream.WINDOW_BYTES = 1  # batches are held as they come
    for name, (loss_fn, weights, data, sampler) in cases.items():
        results = [
            fastvi.estimate_llc(
                loss_fn,
                params,
                data,
                nbeta=50.0,
                localization=10.0,
                progress=False,
                dtype="float64",
                budget=2e4,
                throw=False,
                sampler={"start": "localizer", "walkers": 4, **sampler},
            )
            for params in (weights, divide(weights, mesh, COLUMNS))
        ]
        found[name] = [(one.llc, one.llc_sem, one.ensemble is None) for one in results]
    gathered = estimate(divide(ZEROS, mesh, {"u": P(None, "model"), "v": P()}), error=0.2)
    return {**found, "by default": [gathered.llc, gathered.llc_sem, gathered.ensemble is None]}


ZEROS = {name: np.zeros(values.shape) for name, values in CURVATURES.items()}


def refused_by(limit):
    """What a walk is told that takes 39 MB of each device."""
    weights = divide({"u": np.zeros((1000, 1000))}, mesh_of((4,), ("model",)), {"u": P("model")})
    memory.memory_limit = lambda: limit
    try:
        memory.check_memory(10**6, 8, 4, layout_for(Leaves((weights["u"],))))
    except ConfigError as error:
        return str(error)
    return None


def run_one():
    """Steps of a net, and one estimate beside its closed form."""
    divided = divide(ZEROS, mesh_of((4,), ("model",)), {"u": P(None, "model"), "v": P()})
    found = {"steps": compare(), "exact": EXACT, "largest": LARGEST}
    found["memory"] = [refused_by(39e6), refused_by(38.9e6)]
    memory.memory_limit = lambda: None
    result = estimate(divided, method="sample")
    found |= {
        "llc": [result.llc, result.llc_sem],
        "work": result.work.total_fge * len(POINTS["u"]),
        "holds walkers": result.ensemble is not None,
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            estimate(divided, method="sample", resume_from=folder)
        except ConfigError as error:
            found["resume"] = str(error)
    return found


def run_flat():
    result = estimate(ZEROS, sampler={"start": "localizer"})
    return {"llc": [result.llc, result.llc_sem]} | run_others()


if __name__ == "__main__":
    print(json.dumps({"one": run_one, "others": run_flat}[sys.argv[1]]()))
