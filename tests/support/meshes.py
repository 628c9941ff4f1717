"""Walkers on meshes of 8 devices of the host, in a process of its own: prints JSON."""

import contextlib
import functools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import fastvi
from fastvi._devices import layout_in_use
from fastvi._errors import ConfigError
from fastvi._modes import in_own_modes
from fastvi.sampling import run
from fastvi.sampling.from_localizer import walk
from tests.support.markdown import python_blocks

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
ONE = (1, 1)
rng = np.random.default_rng(0)
INPUTS = rng.normal(size=(1003, 6))  # no number of devices divides the examples
WEIGHTS = {"a": rng.normal(size=(6, 2)), "b": rng.normal(size=2)}


def loss(params, batch):
    inputs, outputs = batch
    return 0.5 * jnp.mean((jnp.tanh(inputs @ params["a"]) @ params["b"] - outputs) ** 2)


OUTPUTS = np.tanh(INPUTS @ WEIGHTS["a"]) @ WEIGHTS["b"] + 0.2 * rng.normal(size=1003)
DATA = INPUTS, OUTPUTS
OPTIONS = {"key": 0, "progress": False, "dtype": "float64", "localization": 1.0, "nbeta": 100.0}
FROM_FIT = {"steps": 100, "method": "sample", "M": 1, "r": 0, "error": 0.2}
FROM_LOCALIZER = {"sampler": {"start": "localizer"}, "budget": 60000.0}


def mesh_of(shape):
    if shape == ONE:
        return contextlib.nullcontext()
    devices = np.asarray(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    return jax.set_mesh(jax.sharding.Mesh(devices, ("walkers", "data")))


def on(shape, function, *arguments):
    with mesh_of(shape):
        return in_own_modes(function)(*arguments)


def steps_on_blocks(result, num_blocks):
    """Twenty steps of walkers from a fit, on blocks beside kept examples or on all data."""
    setup = result.ensemble.callable_setup
    if num_blocks > 1:
        setup = run.dataclasses.replace(setup, kept=np.arange(3, dtype=np.int32))
    state = run.begin(setup, result.ensemble.walkers)
    state = state._replace(llc=result.llc, allowed_bias=0.1 * result.llc)
    state = run.switch_fidelity(setup, state, run.Fidelity(num_blocks, 2e-4))
    state = run.go_on(setup, state, STEPS)
    return state.walkers.position, costs_of(setup, state)


def costs_of(setup, state):
    """What one device computes and sends in a round, by the compiled program."""
    anchor, here = state.estimate.anchor, state.estimate.here
    numbers = np.float32(1), np.float32(1), *map(np.int32, (0, 0, 16))
    arguments = setup.problem, anchor, state.walkers, here, setup.reference_loss, *numbers
    compiled = setup.programs.advance.lower(*arguments).compile()
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    text = compiled.as_text()
    return {"flops": analysis["flops"], "sums": text.count(" all-reduce(")}


def steps_on_minibatches(result, parts, is_anchored):
    """Twenty steps of walkers from the localizer."""
    ensemble = result.ensemble.awake(0.5)
    layout = ensemble.setup.programs.layout
    course = walk.with_parts(ensemble.course, parts)
    anchor = layout.share(jnp.full_like(course.scale, 0.01)) if is_anchored else None
    course = walk._evaluate(ensemble.setup, course._replace(anchor=anchor, said=None))
    end = course.done + STEPS
    while course.done < end:
        course = walk.advance(ensemble.setup, course._replace(said=None), end - course.done)
    return course.state.position, None


def compare(steps, *arguments, shapes):
    """How far positions are from those on one device, and on how many devices they are."""
    found, first = {}, None
    for shape in (ONE, *shapes):
        position, costs = on(shape, steps, *arguments)
        first = np.asarray(position) if first is None else first
        found["x".join(map(str, shape))] = {
            "off": float(np.max(np.abs(np.asarray(position) - first))),
            "devices": len(position.sharding.device_set),
            "costs": costs,
        }
    return found


def refused(shape, sampler):
    try:
        on(shape, lambda: fastvi.estimate_llc(loss, WEIGHTS, DATA, **OPTIONS, sampler=sampler))
    except ConfigError as error:
        return str(error)
    return None


def layout_under(mesh):
    with jax.set_mesh(mesh):
        found = in_own_modes(layout_in_use)().mesh
    return None if found is None else dict(found.shape)


def by_the_page():
    """What the page says of one process, less quickly: on how many devices, and its llc."""
    block, _ = python_blocks(ROOT / "docs" / "devices.md")
    quick = functools.partial(fastvi.estimate_llc, **OPTIONS, **FROM_LOCALIZER)
    namespace = {"loss_fn": loss, "params": WEIGHTS, "data": DATA}
    namespace["fastvi"] = types.SimpleNamespace(estimate_llc=quick)
    exec(compile(block, "devices.md", "exec"), namespace)
    return namespace["result"]


def main():
    fitted = fastvi.estimate_llc(loss, WEIGHTS, DATA, **OPTIONS, **FROM_FIT)
    walked = fastvi.estimate_llc(loss, WEIGHTS, DATA, **OPTIONS, **FROM_LOCALIZER)
    again = by_the_page()
    found = {
        "blocks": compare(steps_on_blocks, fitted, 16, shapes=[(8, 1), (4, 2)]),
        "all data": compare(steps_on_blocks, fitted, 1, shapes=[(2, 4)]),
        "minibatches": compare(steps_on_minibatches, walked, 3, False, shapes=[(8, 1), (2, 4)]),
        # sixteen examples of a part over three devices: the parts are divided
        "anchored": compare(steps_on_minibatches, walked, 5, True, shapes=[(2, 3)]),
        "llc": [walked.llc, again.llc, walked.llc_sem],
        "uneven": refused((4, 1), {"walkers": 6, "start": "localizer"}),
        "layouts": [
            layout_under(jax.make_mesh((2, 4), ("data", "model"))),
            layout_under(jax.make_mesh((8,), ("anything",))),
            layout_under(jax.make_mesh((1,), ("walkers",))),
        ],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
