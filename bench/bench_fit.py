"""Whole fits.

Work per second beside the bare gradient's, chains together beside one after another, memory.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.bench_step import COMPONENTS, FACTOR_PASSES, RANK, fastvi_program, gradient_scan
from bench.harness import Timing, against, estimate_row, peak_megabytes, record, score
from bench.problems import BATCH, INPUTS, WIDTHS, tanh_network
from bench.selection import sizes
from fastvi import LocalPosterior, estimate_llc, make_flat_objective
from fastvi.target.data import Problem, hold

STEPS = 100
CHAINS = 4
ASKED_CHAINS, ASKED_MEMORY, ASKED_OVERHEAD, ASKED_WORK = 0.9, 1.3, 2.0, 2.0
SCALES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
ROUNDS = {1_000: 15, 10_000: 7, 100_000: 3}


def problem_of(size):
    loss, center, data = tanh_network(size)
    num_data = data[1].size
    posterior = LocalPosterior(center, jnp.float32(num_data / math.log(num_data)), jnp.float32(1.0))
    return make_flat_objective(loss), Problem(posterior, hold(data), BATCH), loss


def least_megabytes(size, dim, problem, chains):
    """Parameters, two moments of each, one batch of activations and the data."""
    rank, components = 2, 8
    parameters = dim * (2 + components * rank)
    activations = BATCH * (INPUTS + 2 * 2 * WIDTHS[size])
    data = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(problem.data))
    return (4 * chains * (3 * parameters + activations) + data) / 1e6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", sizes(ROUNDS))
def test_chains_together(benchmark, size):
    objective, problem, _ = problem_of(size)
    dim = problem.posterior.center.size
    programs = {
        count: fastvi_program(objective, problem, chains=count, steps=STEPS)
        for count in (1, CHAINS)
    }
    one, together = (programs[count][1] for count in (1, CHAINS))
    calls = {"4 x 1 chain": lambda: [one() for _ in range(CHAINS)], "4 chains": together}
    timing = against("4 x 1 chain", calls, ROUNDS[size])["4 chains"]
    least = least_megabytes(size, dim, problem, CHAINS)
    peak = peak_megabytes(programs[CHAINS][0])
    rows = [score("fit", "4 chains", dim, "4 x 1 chain", timing, asked=ASKED_CHAINS, peak_mb=peak)]
    memory = Timing(timing.seconds, (peak / least,) * 3, peak / least)
    extra = {"asked": ASKED_MEMORY, "peak_mb": peak, "least_mb": least}
    rows.append(
        score(
            "fit",
            "peak memory, 4 chains",
            dim,
            "parameters, 2 moments, batch, data",
            memory,
            **extra,
        )
    )
    record("ratios", rows)
    benchmark.pedantic(together, rounds=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_large(benchmark):
    """d = 1e6, M = r = 8.

    What a step takes beyond its gradient, against seven copies' worth of the factors.
    """
    size, steps = 1_000_000, 5
    objective, problem, _ = problem_of(size)
    dim = problem.posterior.center.size
    compiled, step = fastvi_program(objective, problem, chains=1, steps=steps, rank=8)
    gradient = gradient_scan(objective, problem, steps)[1]
    moved = FACTOR_PASSES * COMPONENTS * 8 * dim * 4
    source = np.ones(moved // 8 // FACTOR_PASSES)  # a seventh at a time: half read, half written
    target = np.empty_like(source)

    def copies():
        for _ in range(steps * FACTOR_PASSES):
            np.copyto(target, source)

    timings = against("copies", {"copies": copies, "gradient": gradient, "step": step}, 3)
    ratio = tuple(
        b - a for a, b in zip(timings["gradient"].ratio, timings["step"].ratio, strict=True)
    )
    beyond = Timing(
        timings["step"].seconds, ratio, timings["step"].least - timings["gradient"].least
    )
    details = {
        "asked": ASKED_OVERHEAD,
        "peak_mb": peak_megabytes(compiled),
        "least_mb": moved / 1e6,
    }
    rows = [score("step", "overhead, M = r = 8", dim, "copy of 7 x factors", beyond, **details)]
    rows.append(score("step", "fastvi, r = 8", dim, "copy of 7 x factors", timings["step"]))
    rows.append(score("step", "gradient", dim, "copy of 7 x factors", timings["gradient"]))
    record("ratios", rows)
    benchmark.pedantic(step, rounds=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dim", sizes(SCALES, short=300_000))
def test_scale(benchmark, dim):
    """Time and memory of a step where the gradient costs next to nothing, for the law in d."""
    steps = 3
    posterior = LocalPosterior(jnp.zeros(dim), jnp.float32(2000.0), jnp.float32(1.0))
    problem = Problem(posterior, hold(jnp.zeros((8, 1))), 8)
    objective = make_flat_objective(lambda flat, batch: 0.5 * jnp.sum(flat**2))
    compiled, step = fastvi_program(objective, problem, chains=1, steps=steps, donate=True)
    factors = COMPONENTS * RANK * dim * 4
    source = np.ones(factors // 8 // 2)  # half read, half written
    target = np.empty_like(source)

    def copies():
        for _ in range(steps):
            np.copyto(target, source)

    timing = against("copy", {"copy": copies, "step": step}, 5)["step"]
    each = Timing(tuple(value / steps for value in timing.seconds), timing.ratio, timing.least)
    details = {"peak_mb": peak_megabytes(compiled), "least_mb": factors / 1e6}
    record(
        "ratios",
        [score("scale", "a step, M = 8, r = 2", dim, "copy of the factors", each, **details)],
    )
    benchmark.pedantic(lambda: jax.block_until_ready(step()), rounds=1)


@pytest.mark.filterwarnings("ignore")
def test_work_per_second(benchmark):
    """A whole uncorrected estimate beside bare gradients of as many full-gradient equivalents.

    Compiled before.
    """
    size = 10_000
    objective, problem, loss = problem_of(size)
    center, results = problem.posterior.center, []

    def estimate():
        """Estimate with a key that no call before had."""
        options = {"steps": 400, "method": "variational", "progress": False, "throw": False}
        data, key = problem.data.examples, len(results)
        results.append(estimate_llc(loss, center, data, key=key, **options))
        return results[-1].llc

    estimate()
    scan = gradient_scan(objective, problem)[1]
    per_scan = 200 * BATCH / problem.num_data
    timing = against("gradient", {"gradient": scan, "estimate": estimate}, 3)["estimate"]
    share = per_scan / np.mean([result.work.total_fge for result in results])
    scaled = Timing(
        timing.seconds, tuple(value * share for value in timing.ratio), timing.least * share
    )
    floor = "bare minibatch gradient"
    record(
        "ratios",
        [score("estimate", "seconds per FGE", center.size, floor, scaled, asked=ASKED_WORK)],
    )
    record("estimates", [estimate_row("tanh network, 400 steps of q", one) for one in results])
    benchmark.pedantic(scan, rounds=1)
