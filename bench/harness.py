"""What every benchmark shares.

Alternating timings, rows in files, and a memory-bandwidth yardstick.
"""

import csv
import datetime
import functools
import math
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import fastvi

RESULTS = pathlib.Path(__file__).parent / "results"  # committed
RUNS = pathlib.Path(__file__).parent / "runs"  # ignored by git
KEEP = "BENCH_KEEP"  # environment variable that asks for rows to commit
DETAILS = ("asked", "peak_mb", "compile_s", "moved_mb", "least_mb")
TABLES: dict[str, list[dict[str, Any]]] = {}  # rows of this run, printed by conftest.py at its end


def interleaved(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time each candidate once per round, in turn: a busy spell of the machine falls on all.

    Args:
        candidates: Functions without arguments; what they return is waited for.
        rounds: Rounds after one untimed call of each.

    Returns:
        The least seconds of each.
    """
    for call in candidates.values():
        jax.block_until_ready(call())
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, call in candidates.items():
            best[name] = min(best[name], seconds(call))
    return best


class Timing(NamedTuple):
    """Seconds of a call and its multiple of the floor in the same round.

    20 %, 50 % and 80 % points of the rounds.

    `least` is the ratio of the least seconds of either: what is left where other programs interrupt
    most rounds.
    """

    seconds: tuple[float, float, float]
    ratio: tuple[float, float, float]
    least: float


def against(
    floor: str, candidates: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, Timing]:
    """Time candidates in turn and compare each with `floor` round by round.

    Load changes more slowly than that.
    """
    return compared(in_turn(candidates, rounds), floor)


def in_turn(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of each candidate in each round, after one untimed call."""
    for call in candidates.values():
        jax.block_until_ready(call())
    samples = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            samples[name].append(seconds(call))
    return {name: np.asarray(own) for name, own in samples.items()}


def compared(samples: Mapping[str, np.ndarray], floor: str) -> dict[str, Timing]:
    """Compare each candidate's seconds with those of `floor` in the same round."""
    base = samples[floor]
    return {
        name: Timing(_spread(own), _spread(own / base), float(own.min() / base.min()))
        for name, own in samples.items()
    }


def _spread(samples: np.ndarray) -> tuple[float, float, float]:
    return tuple(float(np.quantile(samples, share)) for share in (0.2, 0.5, 0.8))


def score(
    group: str, name: str, size: int, floor: str, timing: Timing, **details: Any
) -> dict[str, Any]:
    """Make a row of `ratios.csv`, the table that `bench.report` prints and `bench.gate` compares.

    Args:
        group: kernels, step, walkers, fit, flows, estimate or scale.
        name: What was timed.
        size: Dimension.
        floor: What its time is a multiple of.
        timing: From `against`.
        details: Any of `asked`, `peak_mb`, `compile_s`, `moved_mb` and `least_mb`.
    """
    low, median, high = timing.ratio
    row = {"group": group, "name": name, "size": size, "floor": floor}
    row |= {"ratio": median, "ratio_p20": low, "ratio_p80": high, "ratio_least": timing.least}
    row |= dict(
        zip(("ms_p20", "ms", "ms_p80"), (1e3 * value for value in timing.seconds), strict=True)
    )
    return row | {name: details.pop(name, "") for name in DETAILS} | details


def work_normalized(deviation: Any, work: Any) -> Any:
    """Return deviation^2 x work: of a variance that falls as 1 / work, what it is at a work of 1.

    Args:
        deviation: A standard error, or the distance from an answer that is known.
        work: What it took, in any unit.
    """
    return deviation**2 * work


def efficiency(
    llc: float, sem: float, fge: float, seconds: float, n_data: int, truth: float | None = None
) -> dict[str, float]:
    """Return the columns that set the error of an estimate beside its work, and that beside time.

    Args:
        llc: The estimate; one that is not finite is infinitely far from the truth.
        sem: Its standard error, as the method itself states it.
        fge: All work, in full-gradient equivalents.
        seconds: What that took, without compilation where the method says how long it compiled.
        n_data: Examples, the sample gradients of one full-gradient equivalent.
        truth: The answer; None where it is not known.

    Returns:
        `work_normalized_variance` in sample gradients. What compares problems is relative to the
        estimate and in full-gradient equivalents: `relative_wnv` and, where the answer is known,
        `relative_wnmse`, which has the real error in place of the stated one. `fge_per_second`.
    """
    llc, sem, seconds = np.float64(llc), np.float64(sem), np.float64(seconds)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "work_normalized_variance": work_normalized(sem, fge * n_data),
            "relative_wnv": work_normalized(sem / llc, fge),
        }
        if truth is not None:
            error = llc / truth - 1 if math.isfinite(llc) else math.inf
            found["relative_wnmse"] = work_normalized(error, fge)
        return {name: float(value) for name, value in found.items()} | {
            "fge_per_second": float(fge / seconds)
        }


def efficiency_of(result: fastvi.LLCEstimate, truth: float | None = None) -> dict[str, float]:
    """Return `efficiency` of an estimate of the package, the seconds without compilation."""
    seconds = result.timings.total - result.timings.compile
    values = result.llc, result.llc_sem, result.work.total_fge, seconds, result.n_data
    return efficiency(*values, truth)


def estimate_row(name: str, result: fastvi.LLCEstimate) -> dict[str, Any]:
    """Make a row of `estimates.csv`, of an estimate whose answer is not known."""
    return {
        "name": name,
        "size": result.dim,
        "llc": result.llc,
        "sem": result.llc_sem,
        "fge": result.work.total_fge,
        "seconds": result.timings.total,
        **efficiency_of(result),
    }


def peak_megabytes(compiled: Any) -> float:
    """Return what a compiled program holds at most.

    Arguments, results and temporaries, aliases counted once.
    """
    memory = compiled.memory_analysis()
    parts = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (parts - memory.alias_size_in_bytes) / 1e6


def seconds(call: Callable[[], Any]) -> float:
    """Time one call."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def copy_bandwidth(megabytes: int = 256, rounds: int = 5) -> float:
    """Return GB/s of a large copy by one thread, bytes read plus bytes written."""
    source = np.ones(megabytes * 2**20 // 8)
    target = np.empty_like(source)
    np.copyto(target, source)
    best = min(seconds(lambda: np.copyto(target, source)) for _ in range(rounds))
    return 2 * source.nbytes / best / 1e9


def bytes_accessed(compiled: Any) -> float:
    """Return the bytes that XLA's cost analysis counts for a compiled program.

    A loop's body counts once.
    """
    analysis = compiled.cost_analysis() or {}
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float(analysis.get("bytes accessed", float("nan")))


def folder() -> pathlib.Path:
    """Return where rows go.

    Bench/runs, or bench/results where BENCH_KEEP asks for rows to commit.
    """
    return RESULTS if os.environ.get(KEEP, "0") not in ("", "0") else RUNS


def record(table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to <table>.csv in `folder()`, each with when, where and on what code.

    Raises:
        ValueError: If the file holds other columns.
    """
    context = {**environment(), "load_average": round(os.getloadavg()[0], 2)}
    context["copy_gb_per_s"] = _rounded(copy_bandwidth())
    full = [{**{name: _rounded(value) for name, value in row.items()}, **context} for row in rows]
    TABLES.setdefault(table, []).extend(dict(row) for row in rows)
    path = folder() / f"{table}.csv"
    path.parent.mkdir(exist_ok=True)
    columns = list(full[0])
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            present = next(csv.reader(file))
        if present != columns:
            raise ValueError(
                f"{path} has columns {present}, not {columns}. Move it away to start a new one."
            )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(full)


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Align rows for a terminal."""
    cells = [list(rows[0]), *([str(_rounded(value)) for value in row.values()] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    padded = [
        [cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in cells
    ]
    return "\n".join("  ".join(line) for line in padded)


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


@functools.cache
def environment() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "device": jax.devices()[0].device_kind,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "fastvi": fastvi.__version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit, marked where files of the package differ from it."""
    folder = pathlib.Path(fastvi.__file__).parent

    def git(*args):
        done = subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        suffix = "-modified" if git("status", "--porcelain", ".") else ""
        return git("rev-parse", "--short", "HEAD") + suffix
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
