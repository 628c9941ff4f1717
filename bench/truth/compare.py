"""Compare estimators of the LLC at equal work on problems whose answer is known.

See bench/README.md.

python -m bench.truth.compare                                    the subset below, five seeds
python -m bench.truth.compare --problems digits_16_g1 --seeds 2 --budget 2000 --methods fastvi hmc

`python -m bench.report` writes what was measured into README.md and docs, and draws the figure.
"""

import argparse
import csv
import datetime
import math
import pathlib
import sys
import time
from typing import Any

import numpy as np

from bench import harness
from bench.truth import samplers, variational
from bench.truth.problem import Problem
from bench.truth.problems import PROBLEMS
from bench.truth.reference import load_reference
from bench.truth.samplers import Course

TABLE = "compare"
CURVES = harness.RESULTS / "compare_curves.csv"
CURVE_COLUMNS = (
    "problem",
    "method",
    "knob",
    "seeds",
    "budget",
    "fge",
    "median_error",
    "date",
    "commit",
)
METHODS = ("fastvi", "sgld", "rmsprop_sgld", "hmc", "mclmc", *variational.PEERS)
SUBSET = (
    "quadratic_d50_c100",
    "least_squares_20",
    "crossing_2",
    "half_crossing_2",
    "sphere_10",
    "deep_linear_2x5_g10",
    "deep_linear_2x5_g100",
    "deep_linear_10_rank0_g10",
    "deep_linear_2x22_g10",
    "tanh_3_g1",
    "relu_realizable_4_g1",
    "digits_16_g1",
    "digits_16_g10",
    "digits_16_g100",
    "deep_linear_3x58_g10",
)
BURN_IN = 0.5  # of a run so far that its running estimate leaves out
FIRST_CHECK, CHECKS = (
    10.0,
    25,
)  # checkpoints of a curve: geometric, from this many FGE to the budget
GRID = tuple(10 ** (exponent / 2) for exponent in range(-11, -1))
GRID_LARGE = tuple(10 ** (exponent / 2) for exponent in range(-10, -3))
REFINED = (10**-0.25, 10**0.25)  # two more step sizes beside the best of the grid
LEAPFROGS = (8, 32)
BUDGETS = (30, 100, 300, 1000, 3000, 10_000)  # of a walk, in passes over the data
FASTVI: dict[str, dict[str, Any]] = {
    "method=variational": {"method": "variational"},
    "error=0.05": {"error": 0.05},
    "defaults": {},
    **{f"budget={most} n": {"budget": most, "error": 0.05} for most in BUDGETS},
}
CHOSEN = "best elbo"  # knob of a variational peer
MCLMC_SHARES = (0.125, 0.25, 0.5, 1.0)
BATCHES = 20  # of the batch means that give the error of a single chain


def estimate(course: Course, fge: float) -> tuple[float, float]:
    """Return the running estimate at `fge` and its standard error.

    The first half of the work so far is left out. The error is that of the spread between chains,
    or between batch means where there is one chain.
    """
    kept = course.energy[(course.fge <= fge) & (course.fge > BURN_IN * fge)]
    kept = kept[~np.isnan(kept).all(axis=1)] if kept.shape[1] == 1 else kept
    if len(kept) == 0:
        return math.nan, math.nan
    parts = kept.mean(axis=0)
    if kept.shape[1] == 1:
        parts = np.array(
            [batch.mean() for batch in np.array_split(kept[:, 0], min(BATCHES, len(kept)))]
        )
    sem = parts.std(ddof=1) / math.sqrt(len(parts)) if len(parts) > 1 else math.nan
    return float(kept.mean()), float(sem)


def checkpoints(budget: float) -> np.ndarray:
    """Return where curves are read."""
    return np.geomspace(FIRST_CHECK, budget, CHECKS)


def relative_error(llc: float, reference: float) -> float:
    """Return the signed error; infinite where the run left the floats."""
    return llc / reference - 1 if math.isfinite(llc) else math.inf


def make_row(
    problem: Problem, method, knob, seed, budget, fge, llc, sem, seconds, running=None
) -> dict[str, Any]:
    """Return a row of compare.csv.

    Diverged: not finite, or above d, twice what any quadratic can have. `running` is `seconds`
    without those of compiling, where these are known.
    """
    reference = load_reference(problem.name)["value"]
    running = seconds if running is None else running
    return {
        "problem": problem.name,
        "d": problem.dim,
        "gamma": problem.gamma,
        "method": method,
        "knob": knob,
        "seed": seed,
        "budget": budget,
        "fge": float(fge),
        "llc": llc,
        "sem": sem,
        "reference": reference,
        "relative_error": relative_error(llc, reference),
        "seconds": seconds,
        "diverged": not math.isfinite(llc) or llc > problem.dim,
        **harness.efficiency(llc, sem, fge, running, problem.n_data, reference),
    }


def sampler_rows(
    problem: Problem, method: str, courses: dict, budget: float
) -> tuple[list[dict], list[dict]]:
    """Return rows of compare.csv, and the median error over seeds at every checkpoint."""
    reference = load_reference(problem.name)["value"]
    rows, errors = [], {}
    for (setting, seed), course in courses.items():
        knob = (
            setting
            if isinstance(setting, str)
            else f"{'leapfrogs' if method == 'hmc' else 'lr'}={setting:.4g}"
        )
        llc, sem = estimate(course, course.fge[-1])
        rows.append(
            make_row(problem, method, knob, seed, budget, course.fge[-1], llc, sem, course.seconds)
        )
        running = [estimate(course, fge)[0] for fge in checkpoints(budget)]
        errors.setdefault(knob, []).append([abs(relative_error(llc, reference)) for llc in running])
    curves = []
    for knob, runs in errors.items():
        median = np.median(np.array(runs), axis=0)
        for fge, error in zip(checkpoints(budget), median, strict=True):
            curves.append(_curve_row(problem.name, method, knob, len(runs), budget, fge, error))
    return rows, curves


def _curve_row(problem, method, knob, seeds, budget, fge, error) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {
        "problem": problem,
        "method": method,
        "knob": knob,
        "seeds": seeds,
        "budget": budget,
        "fge": f"{fge:.4g}",
        "median_error": f"{error:.4g}",
        "date": date,
        "commit": harness._commit(),
    }


def langevin_courses(problem: Problem, seeds, budget: float, *, rmsprop: bool) -> dict:
    """Run the grid, then two more step sizes beside the one of least median error.

    The oracle sees the truth.
    """
    steps = GRID if problem.dim <= samplers.ALL_LANES else GRID_LARGE
    courses = samplers.sgld(problem, steps, seeds, budget, rmsprop=rmsprop)
    reference = load_reference(problem.name)["value"]

    def median_error(step):
        finals = [
            estimate(course, course.fge[-1])[0]
            for course in (courses[step, seed] for seed in seeds)
        ]
        return np.median([abs(relative_error(llc, reference)) for llc in finals])

    best = min(steps, key=median_error)
    more = [best * factor for factor in REFINED]
    return courses | samplers.sgld(problem, more, seeds, budget, rmsprop=rmsprop)


def fastvi_rows(problem: Problem, seeds, budget: float) -> tuple[list[dict], list[dict]]:
    """Run `estimate_llc` with each of `FASTVI`.

    It chooses its own work, which may exceed the budget.
    """
    rows, curves = [], []
    for knob, options in FASTVI.items():
        mine = []
        for seed in seeds:
            began = time.perf_counter()
            result = problem.estimate(seed, **_in_sample_gradients(options, problem))
            elapsed, fge = time.perf_counter() - began, result.work.total_fge
            how = result.correction.method if result.correction else "variational"
            print(
                f"  {knob}, seed {seed}: {result.llc:.4g}, {fge:.0f} FGE, by {how}",
                file=sys.stderr,
                flush=True,
            )
            running = elapsed - result.timings.compile
            values = (seed, budget, fge, result.llc, result.llc_sem, elapsed, running)
            mine.append(make_row(problem, "fastvi", knob, *values))
        rows += mine
        error = np.median([abs(row["relative_error"]) for row in mine])
        fge = np.median([row["fge"] for row in mine])
        curves.append(_curve_row(problem.name, "fastvi", knob, len(mine), budget, fge, error))
    return rows, curves


def _in_sample_gradients(options: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """Return options whose budget, in passes over the data, counts sample gradients."""
    if "budget" not in options:
        return options
    return {**options, "budget": options["budget"] * problem.n_data}


def measure(problem: Problem, method: str, seeds, budget: float) -> tuple[list[dict], list[dict]]:
    """Run one method on one problem."""
    if method == "fastvi":
        return fastvi_rows(problem, seeds, budget)
    if method in variational.PEERS:
        return variational_rows(problem, method, seeds, budget)
    if method in ("sgld", "rmsprop_sgld"):
        courses = langevin_courses(problem, seeds, budget, rmsprop=method == "rmsprop_sgld")
    elif method == "hmc":
        courses = samplers.hmc(problem, LEAPFROGS, seeds, budget)
    else:
        return mclmc_rows(problem, seeds, budget)
    return sampler_rows(problem, method, courses, budget)


def mclmc_rows(problem: Problem, seeds, budget: float) -> tuple[list[dict], list[dict]]:
    """Run MCLMC within several budgets.

    It plans its tuning by what it may spend, so that a run has no early answer.
    """
    rows, curves = [], []
    for share in MCLMC_SHARES:
        within = share * budget
        courses = samplers.mclmc(problem, seeds, within)
        named = {(f"within={within:g}", seed): course for (_, seed), course in courses.items()}
        found = sampler_rows(problem, "mclmc", named, within)
        rows += found[0]
        curves += found[1]
    return rows, curves


def variational_rows(
    problem: Problem, method: str, seeds, budget: float
) -> tuple[list[dict], list[dict]]:
    """Fit a peer's q; nothing where the problem is too large for it."""
    if not variational.is_possible(problem, method):
        return [], []
    rows = [
        make_row(problem, method, CHOSEN, seed, budget, fit.fge, fit.llc, fit.sem, fit.seconds)
        for seed, fit in variational.fits(problem, method, seeds, budget).items()
    ]
    error = np.median([abs(row["relative_error"]) for row in rows])
    return rows, [
        _curve_row(problem.name, method, CHOSEN, len(rows), budget, rows[0]["fge"], error)
    ]


def append_curves(rows: list[dict], path: pathlib.Path = CURVES) -> None:
    """Append medians over seeds to compare_curves.csv."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, CURVE_COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str]) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--problems", nargs="+", default=SUBSET, choices=list(PROBLEMS), metavar="NAME"
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--budget", type=float, default=4000.0, help="FGE of each run, all chains together"
    )
    settings = parser.parse_args(arguments)
    for name in settings.problems:
        problem, rows, curves = PROBLEMS[name](), [], []
        for method in settings.methods:
            began = time.perf_counter()
            found = measure(problem, method, range(settings.seeds), settings.budget)
            rows += found[0]
            curves += found[1]
            print(
                f"{name} {method}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True
            )
        if rows:
            harness.record(TABLE, rows)
            append_curves(curves, harness.folder() / CURVES.name)


if __name__ == "__main__":
    main(sys.argv[1:])
