"""The flow family beside the MFA family.

Bias where the posterior bends, regular minima, seeds, the cost of a step.
"""

import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from bench.harness import efficiency_of, interleaved, record
from fastvi.config import VIConfig
from fastvi.evaluation.importance import pareto_smooth
from fastvi.families import FAMILIES
from fastvi.families.base import Geometry
from fastvi.fitting.step import StepSettings, init_state, run_steps
from fastvi.fitting.step_plan import Phases, ScheduleSettings, plan_steps
from fastvi.target.data import Problem, hold
from fastvi.target.objective import make_flat_objective
from fastvi.target.posterior import LocalPosterior

pytestmark = pytest.mark.slow
COUNT = 1000
NBETA = COUNT / math.log(COUNT)
ASKED_KHAT, ASKED_STEP, ASKED_QUADRATIC = (
    0.7,
    1.5,
    3.0,
)  # at most; a step of the MFA family's, percent
SEEDS, FEW = 20, {"steps": 600, "samples_per_step": 16}
STEP_DIM, STEP_CORE, STEPS = 100_000, 16, 20


def banana(x, y):
    return 0.5 * x**2 / NBETA + 0.5 * (y - 0.5 * x**2) ** 2


def funnel(x, y):
    return 0.5 * y**2 * jnp.exp(2 * x) / 10


def expected_excess(loss, half=6.0, points=2401):
    """E[nbeta L] under exp(-nbeta L - |w|^2 / 2) by the trapezoidal rule."""
    axis = np.linspace(-half, half, points)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    values = NBETA * np.asarray(loss(x, y), float)
    weights = np.exp(-values - 0.5 * (x**2 + y**2))
    return float(np.sum(weights * values) / np.sum(weights))


def problem(loss, pairs):
    """Return the loss summed over pairs of coordinates, in a rotated basis if there are several."""
    dim = 2 * pairs
    basis = (
        np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))[0]
        if pairs > 1
        else np.eye(dim)
    )

    def loss_fn(w, batch):
        point = jnp.asarray(basis, w.dtype) @ w
        return jnp.sum(loss(point[:pairs], point[pairs:]))

    return loss_fn, dim, pairs * expected_excess(loss)


def bent(loss, pairs):
    """Return loss, parameters, options and E[nbeta L] of a posterior of independent pairs."""
    loss_fn, dim, truth = problem(loss, pairs)
    return loss_fn, jnp.zeros(dim), {"data": jnp.zeros((COUNT, 1))}, truth


def crossing():
    """Return (w1 w2)^2 / 2, n = 10,000."""
    loss_fn = lambda w, batch: 0.5 * (w[0] * w[1]) ** 2  # noqa: E731
    return loss_fn, jnp.zeros(2), {"data": jnp.zeros((10_000, 1))}, 0.38247572


def deep_linear(gamma):
    """Return the deep linear net 5-5-5 of rank 2 with what long HMC says of it."""
    sys.path.append(str(pathlib.Path(__file__).parents[1]))
    from bench.truth.problems import PROBLEMS
    from bench.truth.reference import load_reference

    name = f"deep_linear_2x5_g{gamma}"
    found = PROBLEMS[name]()
    options = {"data": found.data, "nbeta": found.nbeta, "localization": found.gamma}
    return found.loss_fn, found.params, options, load_reference(name)["value"]


# problem, and the asked bias as a fraction of the MFA family's
BENT = {
    "banana_2": (lambda: bent(banana, 1), 1 / 3),
    "banana_10": (lambda: bent(banana, 5), 1 / 3),
    "funnel_2": (lambda: bent(funnel, 1), 1 / 3),
    "funnel_10": (lambda: bent(funnel, 5), 1 / 3),
    "crossing": (crossing, 1 / 3),
    "deep_linear_5_5_5_g100": (lambda: deep_linear(100), 1 / 2),
    "deep_linear_5_5_5_g10": (lambda: deep_linear(10), 1 / 2),
}


def estimate(loss_fn, params, options, **more):
    """Estimate without correction."""
    options = (
        {"method": "variational", "num_chains": 2, "progress": False, "throw": False}
        | options
        | more
    )
    return fastvi.estimate_llc(loss_fn, params, **options)


@pytest.mark.parametrize("name", BENT)
def test_bias(benchmark, name):
    make, asked = BENT[name]
    loss_fn, params, options, truth = make()

    def measure():
        rows = []
        for family in FAMILIES:
            result = estimate(loss_fn, params, options, family=family)
            bias = result.llc - truth
            row = {
                "family": family,
                "posterior": name,
                "d": sum(np.size(leaf) for leaf in jax.tree_util.tree_leaves(params)),
                "truth": truth,
                "llc": result.llc,
                "sem": result.llc_sem,
                "bias": bias,
                "bias_of_mfa": abs(bias / rows[0]["bias"]) if rows else 1.0,
                "asked_bias": asked,
                "khat": pareto_smooth(np.asarray(result.log_weights, float).ravel())[1],
                "asked_khat": ASKED_KHAT,
                "steps": result.traces["elbo"].shape[1],
                "fge": result.work.total_fge,
                **efficiency_of(result, truth),
            }
            rows.append(row)
        return rows

    record("flow_bias", benchmark.pedantic(measure, rounds=1))


def rotated_quadratic():
    """Return 50 curvatures of condition 100 in rotated coordinates, n = 10,000."""
    dim, curvatures = 50, np.logspace(-2, 0, 50)
    basis = jnp.asarray(
        np.linalg.qr(np.random.default_rng(1).normal(size=(dim, dim)))[0], jnp.float32
    )
    steep = curvatures * 10_000 / math.log(10_000)

    def loss_fn(w, batch):
        return 0.5 * jnp.sum(jnp.asarray(curvatures, w.dtype) * (basis @ w) ** 2)

    return (
        loss_fn,
        jnp.zeros(dim),
        {"data": jnp.zeros((10_000, 1))},
        float(0.5 * np.sum(steep / (steep + 1))),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", ["realnvp", "maf", "spline_coupling", "nsf_ar"])
@pytest.mark.parametrize("backend", ["native", "flowjax"])
@pytest.mark.parametrize("d_latent", [8, "auto"])
def test_quadratic(benchmark, d_latent, backend, template):
    loss_fn, params, options, truth = rotated_quadratic()
    options |= {
        "family": "flow",
        "backend": backend,
        "flow": {"template": template},
        "d_latent": d_latent,
    }
    result = benchmark.pedantic(lambda: estimate(loss_fn, params, options), rounds=1)
    row = {
        "backend": backend,
        "template": template,
        "d": params.size,
        "d_latent": params.size if d_latent == "auto" else d_latent,
        "truth": truth,
        "llc": result.llc,
        "sem": result.llc_sem,
        "error_percent": 100 * (result.llc / truth - 1),
        "asked_percent": ASKED_QUADRATIC,
        "steps": result.traces["elbo"].shape[1],
        "fge": result.work.total_fge,
        "seconds": benchmark.stats.stats.max,
        **efficiency_of(result, truth),
    }
    record("flow_quadratic", [row])


SEEDED = {name: make for name, (make, _) in BENT.items()} | {"rotated_quadratic": rotated_quadratic}


@pytest.mark.parametrize("name", SEEDED)
def test_seeds(benchmark, name):
    """Fit with the defaults of the family, `SEEDS` chains at once."""
    loss_fn, params, options, truth = SEEDED[name]()
    result = benchmark.pedantic(
        lambda: estimate(loss_fn, params, options, family="flow", num_chains=SEEDS, **FEW), rounds=1
    )
    values = np.asarray(result.llc_per_chain, float)
    row = {
        "posterior": name,
        "seeds": SEEDS,
        "not_finite": int(np.sum(~np.isfinite(values))),
        "truth": truth,
        "least": float(values.min()),
        "median": float(np.median(values)),
        "greatest": float(values.max()),
        "steps": result.traces["elbo"].shape[1],
        **efficiency_of(result, truth),
    }
    record("flow_seeds", [row])


def stepper(family, options):
    """Return a compiled run of `STEPS` steps on half the squared norm, and its memory."""
    config = VIConfig(family=family, samples_per_step=2, **options)
    settings = StepSettings(num_draws=2)
    objective = make_flat_objective(lambda w, batch: 0.5 * jnp.mean(w**2))
    rng = np.random.default_rng(0)
    core = jnp.asarray(rng.normal(size=(STEP_CORE, STEP_DIM)) / 100, jnp.float32)
    geometry = Geometry(jnp.ones(STEP_DIM), core, jnp.asarray(STEP_CORE), jnp.ones(()), STEP_CORE)
    built = FAMILIES[family].create(config.family_settings, geometry)
    posterior = LocalPosterior(jnp.zeros(STEP_DIM), jnp.asarray(NBETA), jnp.ones(()))
    whole = Problem(posterior, hold(jnp.zeros((COUNT, 1))), 256)
    keys = jax.random.split(jax.random.key(0), 1)
    params = jax.vmap(lambda key: built.init(key, core, jnp.zeros(STEP_DIM)))(keys)
    state = jax.vmap(lambda one: init_state(built, one, settings))(params)
    plan = plan_steps(ScheduleSettings(), Phases(1, 100, 200), 0, STEPS, STEPS, np.float32)
    run = jax.jit(lambda f, s: run_steps(f, objective, whole, settings, s, keys, plan))
    compiled = run.lower(built, state).compile()
    return lambda: compiled(built, state), compiled.memory_analysis().temp_size_in_bytes


def test_step(benchmark):
    options = {"mfa": {}, "flow": {"d_latent": 8}}
    built = {family: stepper(family, options[family]) for family in options}
    best = interleaved({family: run for family, (run, _) in built.items()}, 10)
    rows = [
        {
            "family": family,
            "d": STEP_DIM,
            "core": STEP_CORE,
            "ms_per_step": 1e3 * best[family] / STEPS,
            "of_mfa": best[family] / best["mfa"],
            "asked_step": ASKED_STEP,
            "temp_mb": memory / 1e6,
        }
        for family, (_, memory) in built.items()
    ]
    record("flow_step", rows)
    benchmark.pedantic(lambda: jax.block_until_ready(built["flow"][0]()), rounds=2)
