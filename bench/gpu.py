"""What runs on a GPU, numbers and speed: python -m bench.gpu [kernels] [steps] [estimates].

- kernels: each implementation in a loop of one program. `ratio` is its time over that of a pass
  that reads and writes the bytes that the kernel must move, `error` the largest difference from
  float64 on the CPU in units of the largest entry. docs/kernels.md says when an
  implementation becomes the default of a platform. Rows of gpu.csv.
- steps: the steps of walkers and of a fit beside the gradients that they contain, as
  `bench_walkers` and `bench_step` measure them. Rows of gpu_steps.csv.
- estimates: whole estimates of posteriors whose llc is known. Rows of gpu_estimates.csv.

With BENCH_KEEP=1 the rows are appended to bench/results; commit them.
"""

import functools
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import fastvi
from bench import bench_step, bench_walkers
from bench.bench_kernels import COMPONENTS, RANK, mixture
from bench.harness import (
    as_text,
    compared,
    efficiency_of,
    in_turn,
    peak_megabytes,
    record,
    score,
)
from fastvi._modes import in_own_modes
from fastvi.api.estimate import DEFAULT_LOCALIZATION
from fastvi.demos import digits, quadratic
from fastvi.kernels import OPS, mixture_grad, show, woodbury

SIZES = (100_000, 1_000_000, 10_000_000)
STEP_SIZES = (10_000, 100_000)
ROUNDS, REPEATS, STEP_ROUNDS = 20, 20, 5
LARGEST_CHECKED = 1_000_000
TINY = 1e-30  # what a result is scaled by where it only has to be read


def draws(dim, name):
    """Return a loop of draws, each from noise that the one before it shifts by nothing."""
    parameters, noise = mixture(dim)
    grams = jax.jit(woodbury.grams)(parameters)

    def once(parameters, grams, noise):
        return woodbury.draw(parameters, grams, noise, implementation=name)

    def loop(parameters, grams, noise):
        def again(_, drawn):
            return once(parameters, grams, noise._replace(eps=noise.eps + TINY * drawn.score))

        return jax.lax.fori_loop(0, REPEATS, again, once(parameters, grams, noise))

    arguments = parameters, grams, noise
    return once, functools.partial(jax.jit(loop), *arguments), arguments, REPEATS + 1


def updates(dim, name):
    """Return a loop of updates of one component's factors in place."""
    parameters, noise = mixture(dim)
    arguments = (
        parameters.factors,
        jnp.asarray([3], jnp.int32),
        jnp.ones((1, 1, RANK)),
        noise.eps[None, None],
    )

    def once(factors, labels, left, right):
        return mixture_grad.update_factors(factors, labels, left, right, implementation=name)

    def loop(factors, labels, left, right):
        def again(_, moved):
            return once(moved[0], labels, left + TINY * moved[1][0, 0], right)

        return jax.lax.fori_loop(0, REPEATS, again, once(factors, labels, left, right))

    in_place, held = jax.jit(loop, donate_argnums=0), [parameters.factors + 0]

    def call():
        moved, grams = in_place(held.pop(), *arguments[1:])
        held.append(moved)
        return grams

    return once, call, arguments, REPEATS + 1


KERNELS = {"woodbury": draws, "mixture_grad": updates}


def least_bytes(kernel, dim):
    """Return what a kernel must read and write."""
    factors, vector = 4 * COMPONENTS * RANK * dim, 4 * dim
    return 2 * factors + 6 * vector if kernel == "woodbury" else 2 * factors // COMPONENTS + vector


def passes(least):
    """Return a loop that reads and writes so many bytes each time."""
    held = [jnp.ones(least // 8, jnp.float32)]
    once = functools.partial(jax.lax.fori_loop, 0, REPEATS, lambda _, kept: kept + 1)
    in_place = jax.jit(once, donate_argnums=0)

    def call():
        held.append(in_place(held.pop()))
        return held[0]

    return call


def exact(function, arguments):
    """Evaluate in float64 on the CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        wide = jax.tree_util.tree_map(
            lambda leaf: jax.device_put(
                np.asarray(leaf, np.float64 if leaf.dtype.kind == "f" else leaf.dtype), cpu
            ),
            arguments,
        )
        return jax.tree_util.tree_map(np.asarray, jax.jit(function)(*wide))


def largest_error(actual, expected):
    """Return the largest difference in units of each leaf's largest entry."""
    errors = [
        np.max(np.abs(np.asarray(got) - want), initial=0.0)
        / max(np.max(np.abs(want), initial=0.0), 1e-30)
        for got, want in zip(*map(jax.tree_util.tree_leaves, (actual, expected)), strict=True)
    ]
    return float(max(errors))


def kernel_rows(kernel, dim):
    """Time all implementations that run here, with passes over the least bytes between them."""
    least = least_bytes(kernel, dim)
    calls, counts, errors = {"pass": passes(least)}, {"pass": REPEATS}, {}
    for name, implementation in OPS[kernel].implementations.items():
        if name == "reference" or implementation.obstacle("cuda") is not None:
            continue
        once, calls[name], arguments, counts[name] = KERNELS[kernel](dim, name)
        if dim <= LARGEST_CHECKED:
            expected = exact(KERNELS[kernel](dim, "xla")[0], arguments)
            errors[name] = largest_error(jax.jit(once)(*arguments), expected)
    samples = {name: each / counts[name] for name, each in in_turn(calls, ROUNDS).items()}
    timings = compared(samples, "pass")
    bandwidth = least / timings["pass"].seconds[1] / 1e9
    return [
        {
            "kernel": kernel,
            "implementation": name,
            "dim": dim,
            "ratio": timings[name].ratio[1],
            "ratio_p20": timings[name].ratio[0],
            "ratio_p80": timings[name].ratio[2],
            "us": 1e6 * timings[name].seconds[1],
            "gb_per_s": least / timings[name].seconds[1] / 1e9,
            "pass_gb_per_s": bandwidth,
            "error": errors.get(name, float("nan")),
        }
        for name in calls
        if name != "pass"
    ]


def fit_step_rows(size, rounds):
    """Time the step of a fit, of SGLD and the gradient."""
    objective, problem = bench_step.network_problem(size)
    builders = {
        "gradient": bench_step.gradient_scan,
        "fastvi": bench_step.fastvi_scan,
        "sgld": bench_step.sgld_scan,
    }
    scans = {name: build(objective, problem) for name, build in builders.items()}
    samples = in_turn({name: call for name, (_, call) in scans.items()}, rounds)
    timings = compared(samples, "gradient")
    return [
        score(
            "step",
            name,
            problem.posterior.center.size,
            "gradient",
            timings[name],
            peak_mb=peak_megabytes(scans[name][0]),
        )
        for name in scans
    ]


def known_problems():
    """Return losses, parameters, data, and the llc that is right."""
    with jax.default_device(jax.devices("cpu")[0]):  # as exact as where the number is from
        targets = quadratic.target(), digits.target()
    (loss, center, regression), (entropy, network, images) = jax.tree_util.tree_map(
        lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, targets
    )
    spectrum = np.linalg.eigvalsh(
        regression[0].T.astype(float) @ regression[0] / len(regression[0])
    )
    nbeta = len(regression[0]) / math.log(len(regression[0]))
    right = quadratic.exact_values(spectrum, nbeta, DEFAULT_LOCALIZATION).llc
    # by long HMC, whose standard error is 0.14
    return {
        "quadratic demo": (loss, center, regression, right),
        "digits demo": (entropy, network, images, 43.9),
    }


def estimate_rows():
    """Estimate with two keys, the first of them cold."""
    rows = []
    for name, (loss, params, data, right) in known_problems().items():
        for key in range(2):
            began = time.perf_counter()
            result = fastvi.estimate_llc(loss, params, data, key=key, progress=False)
            rows.append(
                {
                    "problem": name,
                    "key": key,
                    "right": right,
                    "llc": result.llc,
                    "llc_sem": result.llc_sem,
                    "findings": " ".join(finding.name for finding in result.health),
                    "fge": result.work.total_fge,
                    "seconds": time.perf_counter() - began,
                    **efficiency_of(result, right),
                }
            )
            print(as_text(rows[-1:]), flush=True)
    return rows


def main(parts):
    """Run where there is a GPU; elsewhere say so."""
    show()
    if jax.default_backend() != "gpu":
        print(f"no GPU: jax sees {jax.devices()}. Nothing was measured and no row written.")
        return 1
    # in the package's own modes, as estimates run
    if "kernels" in parts:
        for dim in SIZES:
            rows = [row for kernel in KERNELS for row in in_own_modes(kernel_rows)(kernel, dim)]
            print(as_text(rows), flush=True)
            record("gpu", rows)
    if "steps" in parts:
        for size in STEP_SIZES:
            for measure in (bench_walkers.measure, fit_step_rows):
                rows = in_own_modes(measure)(size, STEP_ROUNDS)
                print(as_text(rows), flush=True)
                record("gpu_steps", rows)
    if "estimates" in parts:
        record("gpu_estimates", estimate_rows())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ("kernels", "steps", "estimates")))
