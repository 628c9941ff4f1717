"""Whole fits: work per second beside the bare gradient's, chains together beside one after another, memory."""

import math
import types

import jax
import jax.numpy as jnp
import pytest

from bench.bench_step import fastvi_program, gradient_scan
from bench.harness import against, peak_megabytes, record, score
from bench.problems import BATCH, INPUTS, WIDTHS, tanh_network
from fastvi import LocalPosterior, estimate_llc, make_flat_objective
from fastvi.inference.loop import Problem

STEPS = 100
CHAINS = 4
ASKED_CHAINS, ASKED_MEMORY = 0.9, 1.3
ROUNDS = {1_000: 15, 10_000: 7, 100_000: 3}


def problem_of(size):
    loss, center, data = tanh_network(size)
    num_data = data[1].size
    posterior = LocalPosterior(center, jnp.float32(num_data / math.log(num_data)), jnp.float32(1.0))
    return make_flat_objective(loss), Problem(posterior, data, num_data, BATCH), loss


def least_megabytes(size, dim, problem, chains):
    """Parameters, two moments of each, one batch of activations and the data."""
    rank, components = 2, 8
    parameters = dim * (2 + components * rank)
    activations = BATCH * (INPUTS + 2 * 2 * WIDTHS[size])
    data = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(problem.data))
    return (4 * chains * (3 * parameters + activations) + data) / 1e6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", list(ROUNDS))
def test_chains_together(benchmark, size):
    objective, problem, _ = problem_of(size)
    dim = problem.posterior.center.size
    programs = {count: fastvi_program(objective, problem, chains=count, steps=STEPS) for count in (1, CHAINS)}
    one, together = (programs[count][1] for count in (1, CHAINS))
    calls = {"4 x 1 chain": lambda: [one() for _ in range(CHAINS)], "4 chains": together}
    timing = against("4 x 1 chain", calls, ROUNDS[size])["4 chains"]
    least = least_megabytes(size, dim, problem, CHAINS)
    peak = peak_megabytes(programs[CHAINS][0])
    rows = [score("fit", "4 chains", dim, "4 x 1 chain", timing, asked=ASKED_CHAINS, peak_mb=peak)]
    memory = types.SimpleNamespace(ratio=(peak / least,) * 3, seconds=timing.seconds)
    extra = {"asked": ASKED_MEMORY, "peak_mb": peak, "least_mb": least}
    rows.append(score("fit", "peak memory, 4 chains", dim, "parameters, 2 moments, batch, data", memory, **extra))
    record("ratios", rows)
    benchmark.pedantic(together, rounds=1)


@pytest.mark.filterwarnings("ignore")
def test_work_per_second(benchmark):
    """A whole uncorrected estimate beside bare gradients of as many full-gradient equivalents; compiled before."""
    size = 10_000
    objective, problem, loss = problem_of(size)
    center = problem.posterior.center

    def estimate(seed=0):
        return estimate_llc(
            loss, center, problem.data, key=seed, steps=400, progress=False, throw=False, correction="none"
        )

    work = float(estimate().fge)
    scan = gradient_scan(objective, problem)[1]
    per_scan = 200 * BATCH / problem.num_data
    calls = {"gradient": scan, "estimate": lambda: estimate().llc}
    timing = against("gradient", calls, 3)["estimate"]
    scaled = types.SimpleNamespace(
        ratio=tuple(value * per_scan / work for value in timing.ratio), seconds=timing.seconds
    )
    record("ratios", [score("estimate", "seconds per FGE", center.size, "bare minibatch gradient", scaled)])
    benchmark.pedantic(scan, rounds=1)
