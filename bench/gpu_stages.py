"""What `bench.gpu` measures, stage by stage, in pieces that each leave rows."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fastvi
from bench import bench_step, bench_walkers, gpu_numbers
from bench.bench_kernels import COMPONENTS, RANK, mixture
from bench.gpu_numbers import implementations
from bench.harness import (
    bytes_accessed,
    compared,
    efficiency_of,
    in_turn,
    peak_megabytes,
    score,
    seconds,
)
from bench.truth import precision
from fastvi._modes import in_own_modes
from fastvi.api.estimate import DEFAULT_LOCALIZATION
from fastvi.demos import digits, quadratic

TINY = 1e-30  # what a result is scaled by where it only has to be read
REPEATS = 20  # of a kernel in one program
Rows = list[dict[str, Any]]


class Piece(NamedTuple):
    """A part of a stage.

    Attributes:
        name: What is measured, for a person.
        table: The file of its rows.
        seconds: What is kept for it: with less time left it is not begun.
        measure: Returns the rows.
    """

    name: str
    table: str
    seconds: float
    measure: Callable[[], Rows]


class Form(NamedTuple):
    """Sizes of a run.

    Attributes:
        numbers: Dimensions of the checks of numbers.
        kernels: Dimensions that kernels are timed at.
        walkers: Sizes of the walkers' steps, of `bench_walkers`.
        fits: Sizes of the fit's steps, of `bench_step`.
        copies: Bytes of copies.
        rounds: Of the timings of kernels and copies.
        step_rounds: Of those of steps.
        problems: Names of the problems of estimates in each precision.
        keys: Of the demos' estimates, of which the first is cold.
    """

    numbers: Sequence[int]
    kernels: Sequence[int]
    walkers: Sequence[int]
    fits: Sequence[int]
    copies: Sequence[int]
    rounds: int
    step_rounds: int
    problems: Sequence[str]
    keys: int


FULL = Form(
    numbers=(gpu_numbers.DENSE, 100_003),
    kernels=(100_000, 1_000_000, 10_000_000),
    walkers=(10_000, 100_000),
    fits=(10_000, 100_000, 1_000_000),
    copies=(2**20, 2**24, 2**28),
    rounds=20,
    step_rounds=5,
    # those first that 11 bits and bfloat16 can hurt most
    problems=(
        "deep_linear_3x18_g10",
        "digits_16_g1",
        "two_unit_linear_50_50_g10",
        *precision.SHORT,
    ),
    keys=2,
)
SHORT = Form(
    numbers=(65,),
    kernels=(1_000,),
    walkers=(1_000,),
    fits=(1_000,),
    copies=(2**16,),
    rounds=2,
    step_rounds=1,
    problems=("quadratic_d10_c100",),
    keys=0,
)


def numbers(form: Form) -> Iterator[Piece]:
    """Check every kernel and implementation."""
    for dim in form.numbers:
        yield Piece(
            f"every kernel at d = {dim:,}",
            "gpu_numbers",
            20,
            lambda dim=dim: [gpu_numbers.row(check) for check in gpu_numbers.checks(dim)],
        )


def copies(form: Form) -> Iterator[Piece]:
    """Time copies to the device, from it, and on it."""
    for size in form.copies:
        measure = functools.partial(copy_rows, size, form.rounds)
        yield Piece(f"copies of {size:,} bytes", "gpu_copies", 5, measure)


def copy_rows(size: int, rounds: int) -> Rows:
    """Time three copies of as many bytes; the last one reads and writes them."""
    on_host = np.ones(size // 4, np.float32)
    on_device = jax.device_put(on_host)
    add = jax.jit(lambda array, index: array + index)

    def fetch():
        # a new array each time, as jax keeps what it has copied to the host
        array = jax.block_until_ready(add(on_device, np.float32(next(count))))
        began = time.perf_counter()
        np.asarray(array)
        return time.perf_counter() - began

    count = iter(range(rounds + 1))
    fetch()
    samples = {
        "host to device": [seconds(lambda: jax.device_put(on_host)) for _ in range(rounds)],
        "device to host": [fetch() for _ in range(rounds)],
        "on the device": list(in_turn({"pass": passes(2 * size)}, rounds)["pass"] / REPEATS),
    }
    moved = {"on the device": 2 * size}
    return [
        {
            "copy": name,
            "bytes": size,
            "us": 1e6 * float(np.median(own)),
            "us_p20": 1e6 * float(np.quantile(own, 0.2)),
            "us_p80": 1e6 * float(np.quantile(own, 0.8)),
            "gb_per_s": moved.get(name, size) / float(np.median(own)) / 1e9,
        }
        for name, own in samples.items()
    ]


def passes(least: int) -> Callable[[], Any]:
    """Return a loop that reads and writes so many bytes together each time."""
    held = [jnp.ones(max(least // 8, 1), jnp.float32)]
    once = functools.partial(jax.lax.fori_loop, 0, REPEATS, lambda _, kept: kept + 1)
    in_place = jax.jit(once, donate_argnums=0)

    def call():
        held.append(in_place(held.pop()))
        return held[0]

    return call


@functools.cache
def device_bandwidth(size: int) -> float:
    """Return the bytes read and written a second by a pass over so many."""
    return size / float(np.median(in_turn({"pass": passes(size)}, 5)["pass"] / REPEATS))


def kernels(form: Form) -> Iterator[Piece]:
    """Time each implementation beside a pass over the bytes that it must move."""
    for dim in form.kernels:
        for kernel in KERNELS:
            measure = functools.partial(kernel_rows, kernel, dim, form.rounds)
            yield Piece(f"{kernel} at d = {dim:,}", "gpu", 20, measure)


def draws(dim: int, name: str) -> tuple[Any, Any, Any]:
    """Return a loop of draws, each from noise that the one before it shifts by nothing."""
    op = implementations("woodbury")[name]
    parameters, noise = mixture(dim)
    grams = jax.jit(functools.partial(op.call, "grams", name))(parameters, None)

    def once(parameters, grams, noise):
        return op.call("draw", name, parameters, grams, noise)

    def loop(parameters, grams, noise):
        def again(_, drawn):
            return once(parameters, grams, noise._replace(eps=noise.eps + TINY * drawn.score))

        return jax.lax.fori_loop(0, REPEATS, again, once(parameters, grams, noise))

    arguments = parameters, grams, noise
    return once, functools.partial(jax.jit(loop), *arguments), arguments


def updates(dim: int, name: str) -> tuple[Any, Any, Any]:
    """Return a loop of updates of one component's factors in place."""
    op = implementations("mixture_grad")[name]
    parameters, noise = mixture(dim)
    moves = jnp.asarray([3], jnp.int32), jnp.ones((1, 1, RANK)), noise.eps[None, None]

    def once(factors, labels, left, right):
        return op.call("update_factors", name, factors, labels, left, right)

    def loop(factors, labels, left, right):
        def again(_, moved):
            return once(moved[0], labels, left + TINY * moved[1][0, 0], right)

        return jax.lax.fori_loop(0, REPEATS, again, once(factors, labels, left, right))

    in_place, held = jax.jit(loop, donate_argnums=0), [parameters.factors + 0]

    def call():
        moved, grams = in_place(held.pop(), *moves)
        held.append(moved)
        return grams

    return once, call, (parameters.factors, *moves)


KERNELS = {"woodbury": draws, "mixture_grad": updates}
LARGEST_CHECKED = 1_000_000
SWITCHES = ("xla", "pallas")  # what `VIConfig(implementation=...)` may be


def least_bytes(kernel: str, dim: int) -> int:
    """Return what a kernel must read and write."""
    factors, vector = 4 * COMPONENTS * RANK * dim, 4 * dim
    return 2 * factors + 6 * vector if kernel == "woodbury" else 2 * factors // COMPONENTS + vector


def kernel_rows(kernel: str, dim: int, rounds: int) -> Rows:
    """Time all implementations that run here, with passes over the least bytes between them."""
    least = least_bytes(kernel, dim)
    calls, counts, errors = {"pass": passes(least)}, {"pass": REPEATS}, {}
    for name in implementations(kernel):
        once, calls[name], arguments = KERNELS[kernel](dim, name)
        counts[name] = REPEATS + 1
        if dim <= LARGEST_CHECKED:
            expected = gpu_numbers.exact(KERNELS[kernel](dim, "xla")[0], arguments)
            errors[name] = gpu_numbers.largest_error(jax.jit(once)(*arguments), expected)
    samples = {name: each / counts[name] for name, each in in_turn(calls, rounds).items()}
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


def steps(form: Form) -> Iterator[Piece]:
    """Time the step of a fit and those of walkers, from blocks and from the localizer."""
    for size in form.fits:
        measure = functools.partial(fit_step_rows, size, form)
        yield Piece(f"steps of a fit, network of about {size:,}", "gpu_steps", 45, measure)
    for size in form.walkers:
        measure = functools.partial(walkers_rows, size, form)
        yield Piece(f"steps of walkers, network of about {size:,}", "gpu_steps", 60, measure)


def beside_copy(row: dict[str, Any], steps: int, form: Form, of_xla: Any = "") -> dict[str, Any]:
    """Add a step's multiples of a copy of what it moves, and of the step by XLA.

    XLA counts what the body of a loop moves once.
    """
    step_seconds = row["ms"] / 1e3 / steps
    copy_seconds = 1e6 * row["moved_mb"] / device_bandwidth(2 * max(form.copies))
    return row | {"of_copy": step_seconds / copy_seconds, "of_xla": of_xla}


def walkers_rows(size: int, form: Form) -> Rows:
    """Time the walkers' steps beside their gradients and a copy of what they move."""
    rows = bench_walkers.measure(size, form.step_rounds)
    return [beside_copy(row, bench_walkers.STEPS, form) for row in rows]


def fit_step_rows(size: int, form: Form) -> Rows:
    """Time the step of a fit by each implementation, that of SGLD, and the gradient."""
    objective, problem = bench_step.network_problem(size)
    builders = {"gradient": bench_step.gradient_scan, "sgld": bench_step.sgld_scan}
    ours = {
        "fastvi" if name == "xla" else f"fastvi, {name}": functools.partial(
            bench_step.fastvi_scan, implementation=name
        )
        for name in SWITCHES
        if name in implementations("woodbury")
    }
    builders |= ours
    scans = {name: build(objective, problem) for name, build in builders.items()}
    samples = in_turn({name: call for name, (_, call) in scans.items()}, form.step_rounds)
    timings, by_xla = compared(samples, "gradient"), compared(samples, "fastvi")
    return [
        beside_copy(
            score(
                "step",
                name,
                problem.posterior.center.size,
                "gradient",
                timings[name],
                peak_mb=peak_megabytes(compiled),
                moved_mb=bytes_accessed(compiled) / 1e6,
            ),
            bench_step.STEPS,
            form,
            of_xla=by_xla[name].ratio[1] if name in ours else "",
        )
        for name, (compiled, _) in scans.items()
    ]


def precisions(form: Form) -> Iterator[Piece]:
    """Estimate what is known with all digits, with products of 11 bits, and in bfloat16."""
    for name in dict.fromkeys(form.problems):
        for how in precision.here():
            yield Piece(
                f"{name} in {how}",
                "gpu_precision",
                60,
                lambda name=name, how=how: [precision.run(name, how, seed=0)],
            )


def estimates(form: Form) -> Iterator[Piece]:
    """Estimate the demos, whose llc is known, the first key cold."""
    if form.keys:
        yield Piece("demos", "gpu_estimates", 70, functools.partial(estimate_rows, form.keys))


def known_problems() -> dict[str, Any]:
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


def estimate_rows(keys: int) -> Rows:
    """Estimate with several keys, the first of them cold."""
    rows = []
    for name, (loss, params, data, right) in known_problems().items():
        for key in range(keys):
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
    return rows


# in the order of importance; whole estimates run in the modes that a person has set
STAGES: dict[str, Callable[[Form], Iterator[Piece]]] = {
    "numbers": numbers,
    "kernels": kernels,
    "copies": copies,
    "steps": steps,
    "precision": precisions,
    "estimates": estimates,
}
OF_PERSONS = ("precision", "estimates")


def pieces(stage: str, form: Form) -> Iterator[Piece]:
    """Return the pieces of a stage, in the modes that they run in."""
    for piece in STAGES[stage](form):
        is_own = stage not in OF_PERSONS
        yield piece._replace(measure=in_own_modes(piece.measure)) if is_own else piece
