"""Run `estimate_llc` with its defaults over the problems whose answer is known, and score it.

python -m bench.truth.suite                                  problems of d <= 5,000, five seeds
python -m bench.truth.suite --problems tanh_3_g1 --seeds 2   these

`python -m bench.report` writes the tables of what was measured into docs/accuracy.md.
"""

import argparse
import csv
import sys
import time
from typing import Any

import numpy as np

from bench import harness
from bench.tables import EFFICIENCY
from bench.truth.linear_nets import SCALING
from bench.truth.problem import Problem
from bench.truth.problems import PROBLEMS
from bench.truth.reference import load_references

TABLE = "suite"
LARGEST = 5000


def run(problem: Problem, seed: int, reference: float | None) -> dict[str, Any]:
    """Estimate once; return a row of suite.csv."""
    began = time.perf_counter()
    result = problem.estimate(seed)
    target = problem.theory if reference is None else reference
    assert target is not None, problem.name
    return {
        "problem": problem.name,
        "d": problem.dim,
        "gamma": problem.gamma,
        "seed": seed,
        "reference": target,
        "llc": result.llc,
        "sem": result.llc_sem,
        "llc_vi": result.llc_vi,
        "relative_error": result.llc / target - 1,
        "fge": result.work.total_fge,
        "seconds": time.perf_counter() - began,
        "method": result.correction.method if result.correction else "variational",
        "findings": " ".join(finding.name for finding in result.health),
        **harness.efficiency_of(result, target),
    }


def load() -> dict[str, list[dict[str, str]]]:
    """Return the rows by problem; of rows with the same seed the last one counts."""
    with (harness.RESULTS / f"{TABLE}.csv").open(newline="") as file:
        rows = {(row["problem"], row["seed"]): row for row in csv.DictReader(file)}
    found: dict[str, list[dict[str, str]]] = {}
    for (name, _), row in rows.items():
        found.setdefault(name, []).append(row)
    return found


def numbers(rows: list[dict[str, str]], column: str) -> np.ndarray:
    """Return a column."""
    return np.array([float(row[column]) for row in rows])


def mean_text(rows: list[dict[str, str]], column: str) -> str:
    """Return the mean of the runs that have a column; empty where none does."""
    values = [float(row[column]) for row in rows if row.get(column, "") != ""]
    return f"{np.mean(values):.3g}" if values else ""


def is_flagged(row: dict[str, Any]) -> bool:
    """Whether a finding distrusts the error."""
    return "walk_unsettled" in row["findings"]


def pull(row: dict[str, Any], reference_sem: float) -> float:
    """Return how far the answer is, in standard errors of both; NaN where there is none."""
    error = np.hypot(float(row["sem"]), reference_sem)
    return (float(row["llc"]) - float(row["reference"])) / error if error > 0 else float("nan")


def is_covered(row: dict[str, Any], reference_sem: float) -> bool:
    """Whether the answer is within three standard errors, or the run is flagged."""
    return abs(pull(row, reference_sem)) < 3 or is_flagged(row)


def trusted_pulls(rows: list[dict[str, str]], reference_sem: float) -> np.ndarray:
    """Return the pulls of the runs that are not flagged."""
    return np.array([pull(row, reference_sem) for row in rows if not is_flagged(row)])


def _listed(found: dict[str, list[dict[str, str]]]) -> list[str]:
    """Return the problems of the main table, in the order of the registry."""
    return [name for name in PROBLEMS if name in found and name not in SCALING]


def table(found: dict[str, list[dict[str, str]]]) -> str:
    """Return a line for each problem, and the totals."""
    references = load_references()
    columns = ["problem", "d", "γ", "reference", "q alone", "corrected"]
    columns += ["median error", "worst", "mean z", "covered", "FGE", "unsettled", *EFFICIENCY]
    head = "| " + " | ".join(columns) + " |"
    lines, medians, covered, runs = [head, "|---" * len(columns) + "|"], [], 0, 0
    for name in _listed(found):
        rows = found[name]
        reference_sem = float(references[name].get("sem") or 0.0)
        errors = np.abs(numbers(rows, "relative_error"))
        inside = sum(is_covered(row, reference_sem) for row in rows)
        pulls = trusted_pulls(rows, reference_sem)
        mean_pull = f"{np.nanmean(pulls):+.1f}" if len(pulls) else "–"
        unsettled = sum(map(is_flagged, rows))
        covered, runs = covered + inside, runs + len(rows)
        medians.append(np.median(errors))
        of_q = np.median(numbers(rows, "llc_vi"))
        alone = f"{of_q:.4g}" if np.isfinite(of_q) else "–"  # of a walk without a fit
        lines.append(
            f"| {name} | {rows[0]['d']} | {float(rows[0]['gamma']):g} | "
            f"{float(rows[0]['reference']):.4g} | {alone} | "
            f"{np.median(numbers(rows, 'llc')):.4g} | {100 * np.median(errors):.2g} % | "
            f"{100 * errors.max():.2g} % | {mean_pull} | {inside} of {len(rows)} | "
            f"{np.median(numbers(rows, 'fge')):.0f} | {unsettled} | "
            + " | ".join(mean_text(rows, column) for column in EFFICIENCY.values())
            + " |"
        )
    every = np.concatenate(
        [np.abs(numbers(found[name], "relative_error")) for name in _listed(found)]
    )
    total = (
        f"Over {len(medians)} problems and {runs} runs: the median of the medians is "
        f"{100 * np.median(medians):.2g} %, the largest {100 * max(medians):.2g} %; the worst run "
        f"{100 * every.max():.2g} %. The answer is within three `llc_sem`, or the run is flagged, "
        f"in {covered} of {runs} runs."
    )
    return "\n".join([*lines, "", total, "", summary(found)])


def summary(found: dict[str, list[dict[str, str]]]) -> str:
    """Say how well the stated errors fit: normal ones hold 68 % and 95 %, with an rms of 1."""
    references = load_references()
    rows = [row for name in _listed(found) for row in found[name]]
    trusted = {
        name: trusted_pulls(found[name], float(references[name].get("sem") or 0.0))
        for name in _listed(found)
    }
    means = {name: np.nanmean(pulls) for name, pulls in trusted.items() if len(pulls)}
    flagged = (
        f"{100 * sum(map(is_flagged, rows)) / len(rows):.3g} % of the runs are flagged; the median "
        f"stated error is {100 * np.median(numbers(rows, 'sem') / numbers(rows, 'llc')):.2g} %, "
        f"the median work {np.median(numbers(rows, 'fge')):.0f} FGE."
    )
    if not means:
        return flagged
    pulls = np.concatenate(list(trusted.values()))
    within = [f"{100 * np.mean(np.abs(pulls) < bound):.3g} %" for bound in (1, 2)]
    worst = max(means, key=lambda name: abs(means[name]))
    rms, mean = np.sqrt(np.nanmean(pulls**2)), np.nanmean(pulls)
    return (
        f"z is the difference from the reference over the errors of both. Of the {len(pulls)} runs "
        f"that are not flagged {within[0]} are within one and {within[1]} within two; the rms of z "
        f"is {rms:.2f}, its mean {mean:+.2f}, and the largest mean of a problem "
        f"{means[worst]:+.1f} ({worst}). {flagged}"
    )


def scaling_table(found: dict[str, list[dict[str, str]]]) -> str:
    """Return theory, Gibbs sampling and estimate of the deep linear networks.

    Their rank correlation with theory is below.
    """
    references = load_references()
    lines = [
        "| layers | width | d | theory | Gibbs sampling | corrected | from Gibbs sampling | FGE "
        "| seconds |",
        "|---" * 9 + "|",
    ]
    theory, estimates = [], []
    for name in (name for name in SCALING if name in found):
        rows, (widths, _), exact = found[name], SCALING[name], references.get(name, {})
        llc, long_run, error = float(np.median(numbers(rows, "llc"))), "–", "–"
        if exact.get("value") is not None:
            long_run = f"{exact['value']:.5g} ± {exact['sem']:.2g}"
            error = f"{100 * (llc / exact['value'] - 1):+.2g} %"
        theory.append(PROBLEMS[name]().theory)
        estimates.append(llc)
        lines.append(
            f"| {len(widths) - 1} | {widths[0]} | {int(rows[0]['d']):,} | {theory[-1]:.6g} | "
            f"{long_run} | {llc:.5g} | {error} | {np.median(numbers(rows, 'fge')):.0f} | "
            f"{np.median(numbers(rows, 'seconds')):.0f} |"
        )
    ranks = [np.argsort(np.argsort(values)) for values in (theory, estimates)]
    spearman = np.corrcoef(*ranks)[0, 1] if len(theory) > 1 else float("nan")
    return "\n".join([*lines, "", f"Spearman's rank correlation with theory: {spearman:.3f}."])


def main(arguments: list[str]) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    settings = parser.parse_args(arguments)
    references = load_references()
    for name in settings.problems or PROBLEMS:
        problem, known = PROBLEMS[name](), references.get(name, {})
        reference, reference_sem = known.get("value"), float(known.get("sem") or 0.0)
        is_other = problem.dim > LARGEST or reference is None or name in SCALING
        if settings.problems is None and is_other:
            continue
        for seed in range(settings.first, settings.first + settings.seeds):
            row = run(problem, seed, reference)
            print(
                f"{name}, seed {seed}: {row['llc']:.5g} ± {row['sem']:.2g}, "
                f"{100 * row['relative_error']:+.2f} %, z {pull(row, reference_sem):+.1f}, "
                f"{row['fge']:.0f} FGE, {row['seconds']:.0f} s {row['findings']}",
                file=sys.stderr,
                flush=True,
            )
            harness.record(TABLE, [row])


if __name__ == "__main__":
    main(sys.argv[1:])
