"""The flow family beside the MFA family: bias where the posterior bends, and the cost of a step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import interleaved, record

import fastvi
from fastvi.config import VIConfig
from fastvi.diagnostics.importance import pareto_smooth
from fastvi.families import FAMILIES
from fastvi.families.base import Geometry
from fastvi.inference.loop import Problem, init_state, run_steps
from fastvi.inference.optimizer import Horizon
from fastvi.objective import make_flat_objective
from fastvi.posterior import LocalPosterior

COUNT = 1000
NBETA = COUNT / math.log(COUNT)
ASKED_BIAS, ASKED_KHAT, ASKED_STEP = 1 / 3, 0.7, 1.5  # of the MFA family's bias and step, at most
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
    """Return the loss summed over independent pairs of coordinates, in a rotated basis if there are several."""
    dim = 2 * pairs
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))[0] if pairs > 1 else np.eye(dim)

    def loss_fn(w, batch):
        point = jnp.asarray(basis, w.dtype) @ w
        return jnp.sum(loss(point[:pairs], point[pairs:]))

    return loss_fn, dim, pairs * expected_excess(loss)


@pytest.mark.parametrize(("loss", "pairs"), [(banana, 1), (banana, 5), (funnel, 1), (funnel, 5)])
def test_bias(benchmark, loss, pairs):
    loss_fn, dim, truth = problem(loss, pairs)

    def measure():
        rows = []
        for family in FAMILIES:
            result = fastvi.estimate_llc(
                loss_fn,
                jnp.zeros(dim),
                jnp.zeros((COUNT, 1)),
                family=family,
                correction="none",
                num_chains=2,
                progress=False,
                throw=False,
            )
            bias = result.llc - truth
            row = {
                "family": family,
                "posterior": loss.__name__,
                "d": dim,
                "truth": truth,
                "llc": result.llc,
                "sem": result.llc_sem,
                "bias": bias,
                "bias_of_mfa": abs(bias / rows[0]["bias"]) if rows else 1.0,
                "asked_bias": ASKED_BIAS,
                "khat": pareto_smooth(np.asarray(result.log_weights, float).ravel())[1],
                "asked_khat": ASKED_KHAT,
                "steps": result.traces["elbo"].shape[1],
                "fge": result.work["total_fge"],
            }
            rows.append(row)
        return rows

    record("flow_bias", benchmark.pedantic(measure, rounds=1))


def stepper(family, options):
    """Return a compiled run of `STEPS` steps on half the squared norm, and its memory."""
    config = VIConfig(family=family, samples_per_step=2, **options)
    objective = make_flat_objective(lambda w, batch: 0.5 * jnp.mean(w**2))
    rng = np.random.default_rng(0)
    core = jnp.asarray(rng.normal(size=(STEP_CORE, STEP_DIM)) / 100, jnp.float32)
    geometry = Geometry(jnp.ones(STEP_DIM), core, jnp.asarray(STEP_CORE), jnp.ones(()), STEP_CORE)
    built = FAMILIES[family].create(config, geometry)
    posterior = LocalPosterior(jnp.zeros(STEP_DIM), jnp.asarray(NBETA), jnp.ones(()))
    whole = Problem(posterior, jnp.zeros((COUNT, 1)), COUNT, 256)
    keys = jax.random.split(jax.random.key(0), 1)
    params = jax.vmap(lambda key: built.init(key, core, jnp.zeros(STEP_DIM)))(keys)
    state = jax.vmap(lambda one: init_state(built, one, config))(params)
    horizon = Horizon(*map(jnp.float32, (1, 100, 200)))
    run = jax.jit(lambda f, s: run_steps(f, objective, whole, config, s, keys, jnp.int32(0), horizon, STEPS))
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
