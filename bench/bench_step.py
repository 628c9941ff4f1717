"""What a step costs beside the minibatch gradient that it contains."""

import importlib.util
import math
import types

import jax
import jax.numpy as jnp
import pytest
from harness import bytes_accessed, interleaved, record
from problems import BATCH, tanh_network

from fastvi import LocalPosterior, VIConfig, make_flat_objective
from fastvi.inference.loop import Problem, init_state
from fastvi.inference.optimizer import Horizon
from fastvi.inference.programs import build_family, programs_for

STEPS = 200
COMPONENTS, RANK = 8, 2
ASKED = {1_000: 2.5, 10_000: 3.0, 100_000: 4.0}  # largest multiple of the gradient that a step should cost
ROUNDS = {1_000: 20, 10_000: 10, 100_000: 3}
STEP_SIZE = 1e-6
FACTOR_PASSES = 7  # times that a step should at most read or write all factors


def gradient_scan(objective, problem):
    """Descend by the bare minibatch gradient: what any method has to pay."""

    def body(w, key):
        value, grad = objective.value_and_grad(w, problem.next_batch(key))
        return w - STEP_SIZE * grad, value

    return _compile(body, problem.posterior.center)


def sgld_scan(objective, problem):
    """Sample by stochastic gradient Langevin dynamics with jax.random.normal."""
    posterior = problem.posterior

    def body(w, key):
        key_batch, key_noise = jax.random.split(key)
        value, grad = objective.value_and_grad(w, problem.next_batch(key_batch))
        drift = 0.5 * STEP_SIZE * posterior.log_density_grad(w - posterior.center, grad)
        return w + drift + jnp.sqrt(STEP_SIZE) * jax.random.normal(key_noise, w.shape, w.dtype), value

    return _compile(body, posterior.center)


def fastvi_scan(objective, problem):
    """Run the steps of a fit with one chain, one draw a step and no core."""
    config = VIConfig(M=COMPONENTS, r=RANK, curvature_rank=0, steps=STEPS)
    programs = programs_for(objective, config, None).plain
    keys = jax.random.split(jax.random.key(1), 1)
    flat = jnp.zeros_like(problem.posterior.center)
    family = build_family(config, types.SimpleNamespace(scale=flat + 0.01, rank=0), 0)
    params = family.init(jax.random.key(0), jnp.zeros((0, flat.size)), flat)
    state = jax.tree_util.tree_map(lambda leaf: leaf[None], init_state(family, params, config))
    horizon = Horizon(*(jnp.asarray(x, jnp.float32) for x in (10, 10, STEPS)))

    def run(state, keys):
        return programs.steps(family, problem, state, keys, jnp.asarray(0), horizon, length=STEPS)

    compiled = jax.jit(run).lower(state, keys).compile()
    return compiled, lambda: compiled(state, keys)


def numpyro_scan(objective, problem):
    """Fit numpyro's low-rank normal, one component to the mixture's eight."""
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, init_to_value
    from numpyro.infer.autoguide import AutoLowRankMultivariateNormal

    posterior = problem.posterior

    def model(batch):
        support = numpyro.distributions.constraints.real
        w = numpyro.sample("w", numpyro.distributions.ImproperUniform(support, (), posterior.center.shape))
        loss = objective.loss(w, batch)
        numpyro.factor("target", posterior.log_density(w - posterior.center, loss))

    start = init_to_value(values={"w": posterior.center})
    guide = AutoLowRankMultivariateNormal(model, init_loc_fn=start, init_scale=0.01, rank=RANK)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    state = svi.init(jax.random.key(0), problem.next_batch(jax.random.key(0)))

    def body(state, key):
        return svi.update(state, problem.next_batch(key))

    return _compile(body, state)


def _compile(body, state):
    @jax.jit
    def scan(state, key):
        return jax.lax.scan(body, state, jax.random.split(key, STEPS))

    key = jax.random.key(0)
    compiled = scan.lower(state, key).compile()
    return compiled, lambda: compiled(state, key)


METHODS = {"gradient": gradient_scan, "fastvi": fastvi_scan, "sgld": sgld_scan}
if importlib.util.find_spec("numpyro") is not None:
    METHODS["numpyro"] = numpyro_scan


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", list(ASKED))
def test_step(benchmark, size):
    loss, center, data = tanh_network(size)
    num_data = data[1].size
    posterior = LocalPosterior(center, jnp.float32(num_data / math.log(num_data)), jnp.float32(1.0))
    problem = Problem(posterior, data, num_data, BATCH)
    objective = make_flat_objective(loss)
    scans = {name: build(objective, problem) for name, build in METHODS.items()}
    best = interleaved({name: call for name, (_, call) in scans.items()}, ROUNDS[size])
    factor_bytes = COMPONENTS * RANK * center.size * center.dtype.itemsize
    gradient_bytes = bytes_accessed(scans["gradient"][0])
    rows = []
    for name, (compiled, _) in scans.items():
        is_ours = name == "fastvi"
        row = {
            "method": name,
            "d": center.size,
            "ms_per_step": 1e3 * best[name] / STEPS,
            "ratio": best[name] / best["gradient"],
            "asked_ratio": ASKED[size] if is_ours else "",
            "mb_per_step": bytes_accessed(compiled) / 1e6,
            "mb_beyond_gradient": (bytes_accessed(compiled) - gradient_bytes) / 1e6,
            "asked_mb": FACTOR_PASSES * factor_bytes / 1e6 if is_ours else "",
        }
        rows.append(row)
    record("step", rows)
    benchmark.extra_info["ratio"] = best["fastvi"] / best["gradient"]
    benchmark.pedantic(lambda: jax.block_until_ready(scans["fastvi"][1]()), rounds=2)
