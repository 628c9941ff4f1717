"""Each kernel beside a copy of the bytes that it cannot avoid."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.harness import against, bytes_accessed, record, score
from fastvi.kernels import hutchinson, mixture_grad, woodbury
from fastvi.kernels.noise import normal

COMPONENTS, RANK, PROBES = 8, 8, 16
SIZES = (100_000, 1_000_000)
ROUNDS = {100_000: 15, 1_000_000: 5}
ASKED = {"draw": 2.0, "update_factors": 2.0}


def mixture(dim):
    factors = jax.random.normal(jax.random.key(2), (COMPONENTS, RANK, dim)) / np.sqrt(dim)
    nothing = jnp.zeros((0, dim), jnp.float32)
    weights = jnp.full(COMPONENTS, -np.log(COMPONENTS), jnp.float32)
    noise = woodbury.Noise(
        jnp.asarray(3), normal(jax.random.key(0), (dim,)), jnp.zeros(0), jnp.ones(RANK)
    )
    return woodbury.Mixture(weights, nothing, jnp.zeros(dim), nothing, factors), noise


def kernels(dim):
    """Return functions, arguments and the bytes that each must read and write."""
    parameters, noise = mixture(dim)
    factor_bytes, vector = 4 * COMPONENTS * RANK * dim, 4 * dim
    grams = jax.jit(woodbury.grams)(parameters)
    key, labels = jax.random.key(1), jnp.asarray([3])
    left, right = jnp.ones((1, 1, RANK)), noise.eps[None, None]
    probes = hutchinson.rademacher(key, PROBES, dim)
    return {
        # factors are read to project, and again for the score; the density decides the weights in
        # between
        "draw": (woodbury.draw, (parameters, grams, noise), 2 * factor_bytes + 6 * vector),
        "log_prob": (woodbury.log_prob, (parameters, grams, noise.eps), factor_bytes + 2 * vector),
        # of a diagonal operator, which is read again for every probe
        "hutchinson.diagonal": (
            lambda probes, entries: hutchinson.diagonal(lambda v: entries * v, probes),
            (probes, noise.eps),
            (2 * PROBES + 1) * vector,
        ),
        "hutchinson.trace_samples": (
            lambda probes, entries: hutchinson.trace_samples(lambda v: entries * v, probes),
            (probes, noise.eps),
            2 * PROBES * vector,
        ),
        "factor_grams": (woodbury.factor_grams, (parameters.factors,), factor_bytes),
        "update_factors": (
            mixture_grad.update_factors,
            (parameters.factors, labels, left, right),
            2 * factor_bytes // COMPONENTS + vector,
        ),
        "noise": (lambda key: normal(key, (dim,)), (key,), vector),
        "jax.random.normal": (lambda key: jax.random.normal(key, (dim,)), (key,), vector),
    }


@pytest.mark.parametrize("dim", SIZES)
def test_kernels(benchmark, dim):
    rows = []
    for name, (function, arguments, least) in kernels(dim).items():
        donated = (0,) if name == "update_factors" else ()
        began = time.perf_counter()
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
        compile_s = time.perf_counter() - began
        source = np.ones(least // 8)  # half read, half written
        target = np.empty_like(source)
        state = list(arguments)

        def run(compiled=compiled, state=state, donated=donated):
            result = compiled(*state)
            if donated:
                state[0] = result[0]
            return result

        calls = {"copy": lambda t=target, s=source: np.copyto(t, s), name: run}
        timing = against("copy", calls, ROUNDS[dim])[name]
        details = {"asked": ASKED.get(name, ""), "compile_s": compile_s}
        details |= {"moved_mb": bytes_accessed(compiled) / 1e6, "least_mb": least / 1e6}
        rows.append(score("kernels", name, dim, "copy", timing, **details))
    record("ratios", rows)
    benchmark.pedantic(run, rounds=2)
