"""What a step costs beside the minibatch gradient that it contains."""

import functools
import importlib.util
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.harness import bytes_accessed, compared, in_turn, peak_megabytes, record, score
from bench.problems import BATCH, WITH_BIASES, tanh_network
from bench.selection import sizes
from fastvi import LocalPosterior, VIConfig, make_flat_objective
from fastvi.api.plan import family_choice, fit_schedule, fit_settings
from fastvi.fitting.stages import build_family, programs_for
from fastvi.fitting.step import init_state
from fastvi.fitting.step_plan import Phases, plan_steps
from fastvi.target.data import Problem, hold

STEPS = 200
COMPONENTS, RANK = 8, 2
ASKED = {
    1_000: 1.5,
    10_000: 1.7,
    WITH_BIASES: 1.7,
    100_000: 2.0,
}  # largest multiple of the gradient that a step should cost
ROUNDS = {1_000: 20, 10_000: 10, WITH_BIASES: 10, 100_000: 3}
STEP_SIZE = 1e-6
FACTOR_PASSES = 7  # times that a step should at most read or write all factors
PREDECESSOR = "lambda_hat mfa"
ASKED_PEERS = {"numpyro, rank 16": 1 / 2, PREDECESSOR: 1 / 3}  # of their time


def gradient_scan(objective, problem, steps=STEPS):
    """Descend by the bare minibatch gradient: what any method has to pay."""

    def body(w, key):
        value, grad = objective.value_and_grad(w, problem.next_batch(key))
        return w - STEP_SIZE * grad, value

    return _compile(body, problem.posterior.center, steps)


def sgld_scan(objective, problem):
    """Sample by stochastic gradient Langevin dynamics with jax.random.normal."""
    posterior = problem.posterior

    def body(w, key):
        key_batch, key_noise = jax.random.split(key)
        value, grad = objective.value_and_grad(w, problem.next_batch(key_batch))
        drift = 0.5 * STEP_SIZE * posterior.log_density_grad(w - posterior.center, grad)
        return w + drift + jnp.sqrt(STEP_SIZE) * jax.random.normal(
            key_noise, w.shape, w.dtype
        ), value

    return _compile(body, posterior.center)


def fastvi_scan(objective, problem, implementation=None):
    """Run the steps of a fit with one chain, one draw a step and no core."""
    options = {"implementation": implementation}
    return fastvi_program(objective, problem, chains=1, steps=STEPS, **options)


def fastvi_program(objective, problem, *, chains, steps, rank=RANK, donate=False, **options):
    """Compile steps of several chains; unless it is donated, each call begins at the same state."""
    config = VIConfig(
        M=COMPONENTS, r=rank, curvature_rank=0, steps=steps, samples_per_step=1, **options
    )
    settings, schedule = fit_settings(config), fit_schedule(config)
    programs = programs_for(objective, problem, settings).compiled
    keys = jax.random.split(jax.random.key(1), chains)
    flat = jnp.zeros_like(problem.posterior.center)
    family = build_family(
        family_choice(config),
        settings.start,
        types.SimpleNamespace(
            scale=flat + 0.01, rank=0, rest=jnp.ones(()), core=jnp.zeros((0, flat.size))
        ),
        0,
    )
    params = family.init(jax.random.key(0), jnp.zeros((0, flat.size)), flat)
    first = init_state(family, params, settings.step)
    state = jax.tree_util.tree_map(
        lambda leaf: jnp.broadcast_to(leaf, (chains, *leaf.shape)), first
    )
    plan = plan_steps(schedule, Phases(10, 10, steps), 0, steps, steps, np.float32)

    def run(state, family, problem, keys):
        return programs.steps(family, problem, state, keys, plan)

    rest = (family, problem, keys)
    compiled = jax.jit(run, donate_argnums=0 if donate else ()).lower(state, *rest).compile()
    if not donate:
        return compiled, lambda: compiled(state, *rest)
    return compiled, _advancing(compiled, state, rest)


def _advancing(compiled, state, rest):
    """Return a call that goes on from the state that the one before it left."""
    held = [state]

    def call():
        after, traces = compiled(held.pop(), *rest)
        held.append(after)
        return traces

    return call


def numpyro_scan(
    objective, problem, guide="AutoLowRankMultivariateNormal", *, scan_steps=STEPS, **options
):
    """Fit one of numpyro's normal guides."""
    import numpyro

    svi = numpyro_guide(
        objective, problem, guide, numpyro.optim.Adam(1e-3), init_scale=0.01, **options
    )
    state = svi.init(jax.random.key(0), problem.next_batch(jax.random.key(0)))

    def body(state, key):
        return svi.update(state, problem.next_batch(key))

    return _compile(body, state, scan_steps)


def numpyro_guide(objective, problem, guide, optimizer, *, draws=1, **options):
    """Return the fit of one of numpyro's normal guides that starts at w*.

    Its model takes a minibatch.
    """
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide, init_to_value

    posterior = problem.posterior

    def model(batch):
        support = numpyro.distributions.constraints.real
        w = numpyro.sample(
            "w", numpyro.distributions.ImproperUniform(support, (), posterior.center.shape)
        )
        loss = objective.loss(w, batch)
        numpyro.factor("target", posterior.log_density(w - posterior.center, loss))

    start = init_to_value(values={"w": posterior.center})
    chosen = getattr(autoguide, guide)(model, init_loc_fn=start, **options)
    return SVI(model, chosen, optimizer, Trace_ELBO(draws))


def blackjax_scan(objective, problem):
    """Fit blackjax's mean-field normal by one draw a step."""
    import blackjax
    import optax

    posterior = problem.posterior

    def body(state, key):
        key_batch, key_draw = jax.random.split(key)
        batch = problem.next_batch(key_batch)

        def log_density(w):
            return posterior.log_density(w - posterior.center, objective.loss(w, batch))

        fit = blackjax.meanfield_vi(log_density, optax.adam(1e-3), num_samples=1)
        state, info = fit.step(key_draw, state)
        return state, info.elbo

    start = blackjax.meanfield_vi(lambda w: 0.0, optax.adam(1e-3), num_samples=1)
    return _compile(body, start.init(posterior.center))


def lambda_hat_scan(objective, problem):
    """Take the steps of lambda_hat's mixture of factor analyzers, in a scan as it does."""
    import optax
    from lambda_hat.vi import mfa

    posterior, optimizer = problem.posterior, optax.adam(1e-3)
    whitener = mfa.make_whitener(None)
    step = mfa.build_elbo_step(
        objective=objective,
        data=problem.data.examples,
        wstar_flat=posterior.center,
        n_data=problem.num_data,
        beta=float(posterior.nbeta) / problem.num_data,
        gamma=float(posterior.gamma),
        batch_size=problem.batch_size,
        whitener=whitener,
        optimizer=optimizer,
    )
    params = mfa.init_vi_params(jax.random.key(0), posterior.center, COMPONENTS, RANK)
    zero = jnp.zeros((), posterior.center.dtype)
    state = mfa.VIOptState(optimizer.init(params), zero, jnp.zeros((), jnp.int32))
    return _compile(lambda carry, key: step(key, *carry), (params, state))


def _compile(body, state, steps=STEPS):
    @jax.jit
    def scan(state, key):
        return jax.lax.scan(body, state, jax.random.split(key, steps))

    key = jax.random.key(0)
    compiled = scan.lower(state, key).compile()
    return compiled, lambda: compiled(state, key)


def network_problem(size):
    """Return the objective and the problem of a tanh network of about so many parameters."""
    loss, center, data = tanh_network(size)
    num_data = data[1].size
    posterior = LocalPosterior(center, jnp.float32(num_data / math.log(num_data)), jnp.float32(1.0))
    return make_flat_objective(loss), Problem(posterior, hold(data), BATCH)


METHODS = {"gradient": gradient_scan, "fastvi": fastvi_scan, "sgld": sgld_scan}
if importlib.util.find_spec("numpyro") is not None:
    METHODS["numpyro"] = functools.partial(numpyro_scan, rank=RANK)
    METHODS["numpyro, rank 16"] = functools.partial(numpyro_scan, rank=COMPONENTS * RANK)
    METHODS["numpyro AutoNormal"] = functools.partial(numpyro_scan, guide="AutoNormal")
if importlib.util.find_spec("blackjax") is not None:
    METHODS["blackjax meanfield_vi"] = blackjax_scan
if importlib.util.find_spec("lambda_hat") is not None:
    METHODS[PREDECESSOR] = lambda_hat_scan
LARGEST_DENSE = 1_000  # dim x dim numbers
DENSE = "numpyro AutoMultivariateNormal"
DENSE_STEPS = 10  # a step costs 200 gradients


def ratio_rows(scans, timings, dim, size):
    least = {"fastvi": FACTOR_PASSES * COMPONENTS * RANK * dim * 4 / 1e6, "gradient": ""}
    rows = []
    for name, (compiled, _) in scans.items():
        details = {
            "asked": ASKED[size] if name == "fastvi" else "",
            "peak_mb": peak_megabytes(compiled),
        }
        details |= {"moved_mb": bytes_accessed(compiled) / 1e6, "least_mb": least.get(name, "")}
        rows.append(score("step", name, dim, "gradient", timings[name], **details))
    return rows


def peer_rows(samples, dim):
    """Return fastvi's step as a part of those of the peers that it should be well below."""
    return [
        score("peers", "fastvi", dim, name, compared(samples, name)["fastvi"], asked=asked)
        for name, asked in ASKED_PEERS.items()
        if name in samples
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", sizes(ASKED, short=WITH_BIASES))
def test_step(benchmark, size):
    objective, problem = network_problem(size)
    center = problem.posterior.center
    methods = dict(METHODS)
    if "numpyro" in methods and size <= LARGEST_DENSE:
        methods[DENSE] = functools.partial(
            numpyro_scan, guide="AutoMultivariateNormal", scan_steps=DENSE_STEPS
        )
    scans = {name: build(objective, problem) for name, build in methods.items()}
    samples = in_turn({name: call for name, (_, call) in scans.items()}, ROUNDS[size])
    if DENSE in samples:
        samples[DENSE] *= STEPS / DENSE_STEPS
    timings = compared(samples, "gradient")
    best = {name: timing.seconds[0] for name, timing in timings.items()}
    record(
        "ratios", ratio_rows(scans, timings, center.size, size) + peer_rows(samples, center.size)
    )
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
