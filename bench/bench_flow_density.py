"""Held-out nats per example of spline flows trained alike: fastvi beside FlowJAX."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bench.harness import record
from fastvi import flows

LAYERS, HIDDEN, BINS, BATCH, STEPS, RATE = 4, 32, 8, 256, 1500, 2e-3
SEEDS = (0, 1, 2)


def two_moons(size, rng):
    angle = rng.uniform(0, np.pi, size)
    upper = rng.integers(0, 2, size)
    x = np.where(upper, 1 - np.cos(angle), np.cos(angle))
    y = np.where(upper, 0.5 - np.sin(angle), np.sin(angle))
    return np.stack([x, y], axis=1) + 0.1 * rng.normal(size=(size, 2))


def rings(size, rng):
    angle, radius = (
        rng.uniform(0, 2 * np.pi, size),
        rng.integers(1, 4, size) + 0.08 * rng.normal(size=size),
    )
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def digits(size, rng):
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    del size
    return PCA(8).fit_transform(load_digits().data)[rng.permutation(1797)]


def split(make, seed):
    """Return training and held-out halves (digits: 4:1), standardised by the first."""
    rng = np.random.default_rng(seed)
    data = make(20_000, rng)
    cut = len(data) // 2 if len(data) > 5000 else 4 * len(data) // 5
    center, scale = data[:cut].mean(axis=0), data[:cut].std(axis=0)
    data = ((data - center) / scale).astype(np.float32)
    return jnp.asarray(data[:cut]), jnp.asarray(data[cut:])


def fastvi_flow(dim, seed, **options):
    flow, params = flows.build_spline_realnvp(
        jax.random.key(seed), dim, LAYERS, HIDDEN, 1, num_bins=BINS, **options
    )
    return params, flow.log_prob


def flowjax_flow(dim, seed):
    import equinox as eqx
    import paramax
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    flow = coupling_flow(
        jax.random.key(seed),
        base_dist=Normal(jnp.zeros(dim)),
        transformer=RationalQuadraticSpline(knots=BINS - 1, interval=5.0),
        flow_layers=LAYERS,
        nn_width=HIDDEN,
        nn_depth=3,
    )
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    return params, lambda p, x: paramax.unwrap(eqx.combine(p, static)).log_prob(x)


def held_out_nats(build, make, seed):
    """Train by Adam with a cosine schedule.

    Return -log density per held-out example at the last step.
    """
    train, test = split(make, seed)
    params, log_prob = build(train.shape[1], seed)
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    )

    def step(carry, key):
        params, state = carry
        batch = train[jax.random.randint(key, (BATCH,), 0, len(train))]
        grads = jax.grad(lambda p: -jnp.mean(log_prob(p, batch)))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        keys = jax.random.split(jax.random.key(100 + seed), STEPS)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, -jnp.mean(log_prob(params, test))

    params, nats = run(params)
    return float(nats), sum(leaf.size for leaf in jax.tree_util.tree_leaves(params))


METHODS = {
    "fastvi": fastvi_flow,
    "fastvi res_scale=1": functools.partial(fastvi_flow, res_scale=1.0),
}
if importlib.util.find_spec("flowjax") is not None:
    METHODS["flowjax"] = flowjax_flow


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("make", [two_moons, rings, digits], ids=lambda make: make.__name__)
def test_density(benchmark, make):
    def measure():
        rows = []
        for method, build in METHODS.items():
            results = [held_out_nats(build, make, seed) for seed in SEEDS]
            nats = np.asarray([value for value, _ in results])
            row = {
                "method": method,
                "data": make.__name__,
                "parameters": results[0][1],
                "steps": STEPS,
                "seeds": len(SEEDS),
                "nats": float(nats.mean()),
                "nats_se": float(nats.std(ddof=1) / np.sqrt(len(nats))),
            }
            rows.append(row)
        return rows

    record("flow_density", benchmark.pedantic(measure, rounds=1))
