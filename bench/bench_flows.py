"""Spline flows beside FlowJAX and nflojax: sampling, densities, gradients and compilation."""

import importlib.util
import time

import jax
import jax.numpy as jnp
import pytest

from bench.harness import against, record, score
from bench.selection import sizes
from fastvi import flows

LAYERS, HIDDEN, BATCH, BINS = 8, 64, 1024, 8
ASKED_SPEED, ASKED_COMPILE = 1.2, 0.5  # of FlowJAX's speed, at least; of its compile time, at most
ROUNDS = {8: 30, 16: 20, 64: 10}


def fastvi_flow(dim):
    """Return sampler with density, density, and the parameters of each."""
    flow, params = flows.build_spline_realnvp(
        jax.random.key(0), dim, LAYERS, HIDDEN, 1, num_bins=BINS
    )
    return lambda p, key: flow.sample_and_log_prob(p, key, (BATCH,)), flow.log_prob, params, params


def flowjax_flow(dim):
    """Return the same of a coupling flow of as many layers, 2 more outputs for each spline."""
    import equinox as eqx
    import paramax
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    def build(invert):
        flow = coupling_flow(
            jax.random.key(0),
            base_dist=Normal(jnp.zeros(dim)),
            transformer=RationalQuadraticSpline(knots=BINS - 1, interval=5.0),
            flow_layers=LAYERS,
            nn_width=HIDDEN,
            nn_depth=3,
            nn_activation=jnp.tanh,
            invert=invert,
        )
        return eqx.partition(
            flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
        )

    # Each direction by the flow in which it is the fast one.
    sample_params, sampler = build(invert=False)
    density_params, density = build(invert=True)

    def sample(p, key):
        return paramax.unwrap(eqx.combine(p, sampler)).sample_and_log_prob(key, (BATCH,))

    def log_prob(p, x):
        return paramax.unwrap(eqx.combine(p, density)).log_prob(x)

    return sample, log_prob, sample_params, density_params


def nflojax_flow(dim):
    """Return the same of nflojax."""
    from nflojax.builders import build_spline_realnvp

    flow, params = build_spline_realnvp(jax.random.key(0), dim, LAYERS, HIDDEN, 1, num_bins=BINS)
    return lambda p, key: flow.sample_and_log_prob(p, key, (BATCH,)), flow.log_prob, params, params


def jittered(params):
    leaves, structure = jax.tree_util.tree_flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [
        leaf + 0.05 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, moved)


def operations(sample, log_prob, sample_params, density_params, dim):
    """Return each function with its arguments."""
    key = jax.random.key(1)
    x = jax.random.normal(key, (BATCH, dim))

    def reverse(p, k):
        draws, log_q = sample(p, k)
        return jnp.mean(log_q + jnp.sum(draws**2, axis=-1))

    return {
        "sample_and_log_prob": (sample, sample_params, key),
        "log_prob": (log_prob, density_params, x),
        "grad_log_prob": (
            jax.value_and_grad(lambda p, x: -jnp.mean(log_prob(p, x))),
            density_params,
            x,
        ),
        "grad_sample": (jax.value_and_grad(reverse), sample_params, key),
    }


METHODS = {"fastvi": fastvi_flow}
if importlib.util.find_spec("flowjax") is not None:
    METHODS["flowjax"] = flowjax_flow
SLOW_TO_COMPILE = (
    {"nflojax": nflojax_flow} if importlib.util.find_spec("nflojax") is not None else {}
)


def measure(dim, methods, names, rounds):
    built = {method: build(dim) for method, build in methods.items()}
    built = {method: (*parts[:2], *map(jittered, parts[2:])) for method, parts in built.items()}
    rows = []
    for name in names:
        programs, compile_seconds = {}, {}
        for method, parts in built.items():
            function, *args = operations(*parts, dim)[name]
            began = time.perf_counter()
            compiled = jax.jit(function).lower(*args).compile()
            compile_seconds[method] = time.perf_counter() - began
            programs[method] = lambda compiled=compiled, args=args: compiled(*args)
        floor = "flowjax" if "flowjax" in programs else "fastvi"
        timings = against(floor, programs, rounds)
        best = {method: timing.seconds[0] for method, timing in timings.items()}
        details = {
            "asked": 1 / ASKED_SPEED if floor == "flowjax" else "",
            "compile_s": compile_seconds["fastvi"],
        }
        record(
            "ratios", [score("flows", f"fastvi {name}", dim, floor, timings["fastvi"], **details)]
        )
        for method, (_, _, params, _) in built.items():
            row = {
                "method": method,
                "dim": dim,
                "operation": name,
                "parameters": sum(leaf.size for leaf in jax.tree_util.tree_leaves(params)),
                "ms": 1e3 * best[method],
                "compile_s": compile_seconds[method],
                "speed_of_fastvi": best[method] / best["fastvi"],
                "compile_of_fastvi": compile_seconds["fastvi"] / compile_seconds[method],
                "asked_speed": ASKED_SPEED if method == "flowjax" else "",
                "asked_compile": ASKED_COMPILE if method == "flowjax" else "",
            }
            rows.append(row)
    return rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dim", sizes(ROUNDS, short=8))
def test_flows(benchmark, dim):
    names = ("sample_and_log_prob", "log_prob", "grad_log_prob", "grad_sample")
    record("flows", measure(dim, METHODS, names, ROUNDS[dim]))
    flow = fastvi_flow(dim)
    sample = jax.jit(flow[0])
    benchmark.pedantic(lambda: jax.block_until_ready(sample(flow[2], jax.random.key(0))), rounds=3)


@pytest.mark.slow
@pytest.mark.skipif(not SLOW_TO_COMPILE, reason="nflojax is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dim", [8])
def test_flows_unrolled(benchmark, dim):
    methods = {"fastvi": fastvi_flow, **SLOW_TO_COMPILE}
    rows = benchmark.pedantic(lambda: measure(dim, methods, ("sample_and_log_prob",), 10), rounds=1)
    record("flows", rows)
