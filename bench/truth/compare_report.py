"""Tables and a figure of what compare.py measured.

Medians over seeds of the relative error, at equal work.
"""

import collections
import csv
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bench import harness
from bench.tables import EFFICIENCY, markdown, tabulate
from bench.truth.compare import BUDGETS, CHOSEN, CURVES, FASTVI, SUBSET, TABLE

FIGURE = pathlib.Path(__file__).parents[2] / "docs" / "figures" / "error-versus-fge.png"
SHOWN = ("crossing_2", "deep_linear_2x5_g10", "tanh_3_g1", "digits_16_g1")

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the tables.

    A method with a knob, or with the knob that the truth picks for each problem.

    Attributes:
        label: What it is called.
        method: As in compare.csv.
        knob: Its knob; None: for each problem the one of least median error.
    """

    label: str
    method: str
    knob: str | None


ENTRIES = (
    *(Entry(f"fastvi, {knob}", "fastvi", knob) for knob in FASTVI if not knob.startswith("budget")),
    Entry("fastvi, ended at a budget", "fastvi", "within=budget"),
    Entry("SGLD, oracle step", "sgld", None),
    Entry("SGLD, lr 1e-4", "sgld", "lr=0.0001"),
    Entry("RMSProp-SGLD, oracle step", "rmsprop_sgld", None),
    Entry("RMSProp-SGLD, lr 1e-2", "rmsprop_sgld", "lr=0.01"),
    Entry("HMC, 8 leapfrogs", "hmc", "leapfrogs=8"),
    Entry("HMC, 32 leapfrogs", "hmc", "leapfrogs=32"),
    Entry("MCLMC", "mclmc", "within=budget"),
)
# Of the README. The page on accuracy has all columns and lines.
BRIEF_COLUMNS = (
    "method",
    "problems",
    "FGE, median",
    "median error, %",
    "worst run",
    "below 5 %",
    "diverged runs",
)
LEFT_OUT = ("fastvi, ended at a budget", "RMSProp-SGLD, lr 1e-2", "HMC, 32 leapfrogs")
VARIATIONAL = (
    Entry("numpyro AutoNormal", "numpyro_normal", CHOSEN),
    Entry("blackjax meanfield_vi", "blackjax_meanfield", CHOSEN),
    Entry("numpyro AutoLowRank, rank 16", "numpyro_low_rank", CHOSEN),
    Entry("numpyro AutoMultivariateNormal", "numpyro_dense", CHOSEN),
    Entry("FlowJAX coupling", "flowjax_coupling", CHOSEN),
)


def load(path: pathlib.Path, keys: Iterable[str]) -> Rows:
    """Read a table; of rows that agree in `keys` the last one counts."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


class Results:
    """Rows and curves by problem, method and knob."""

    def __init__(self):
        self.runs: dict[tuple, Rows] = collections.defaultdict(list)
        self.curves: dict[tuple, Rows] = collections.defaultdict(list)
        for row in load(harness.RESULTS / f"{TABLE}.csv", ("problem", "method", "knob", "seed")):
            self.runs[row["problem"], row["method"], row["knob"]].append(row)
        for row in load(CURVES, ("problem", "method", "knob", "fge")):
            self.curves[row["problem"], row["method"], row["knob"]].append(row)
        found = {problem for problem, _, _ in self.runs}
        self.problems = [*(name for name in SUBSET if name in found), *sorted(found - set(SUBSET))]

    def knobs(self, problem: str, method: str) -> list[str]:
        return [knob for name, kind, knob in self.runs if (name, kind) == (problem, method)]

    def error(self, problem: str, method: str, knob: str) -> float:
        return float(
            np.median(
                [abs(float(row["relative_error"])) for row in self.runs[problem, method, knob]]
            )
        )

    def values(self, problem: str, method: str, knob: str, column: str) -> list[float]:
        """Return a column of the runs that have it."""
        cells = (row.get(column, "") for row in self.runs[problem, method, knob])
        return [float(cell) for cell in cells if cell != ""]

    def chosen(self, problem: str, entry: Entry) -> str | None:
        """Return the knob that the entry stands for on a problem, None if it was not run."""
        knobs = self.knobs(problem, entry.method)
        if entry.knob == "within=budget":
            knobs = [knob for knob in knobs if knob.split("=")[0] in ("within", "budget")]
            return max(knobs, key=_amount, default=None)
        if entry.knob is not None:
            return entry.knob if entry.knob in knobs else None
        return min(knobs, key=lambda knob: self.error(problem, entry.method, knob), default=None)

    def curve(self, problem: str, entry: Entry) -> list[tuple[float, float]]:
        """Return (FGE, median error) in order of work.

        Of fastvi and MCLMC one point for each budget.
        """
        knob = self.chosen(problem, entry)
        if knob is None:
            return []
        if entry.method == "fastvi":
            knobs = (
                [knob]
                if entry.knob != "within=budget"
                else [f"budget={most} n" for most in BUDGETS]
            )
            return sorted(
                self.point(problem, name)
                for name in knobs
                if (problem, "fastvi", name) in self.runs
            )
        if entry.method == "mclmc":
            ends = [
                self.curves[problem, "mclmc", name][-1] for name in self.knobs(problem, "mclmc")
            ]
        else:
            ends = self.curves[problem, entry.method, knob]
        return sorted((float(row["fge"]), float(row["median_error"])) for row in ends)

    def point(self, problem: str, knob: str) -> tuple[float, float]:
        """Return (FGE, median error) of runs of fastvi."""
        work = [float(row["fge"]) for row in self.runs[problem, "fastvi", knob]]
        return float(np.median(work)), self.error(problem, "fastvi", knob)

    def fge_to(self, problem: str, entry: Entry, error: float) -> float:
        """Return the work from which the median error stays below `error`.

        Infinite if it never does.
        """
        first = math.inf
        for fge, value in reversed(self.curve(problem, entry)):
            if not value < error:
                break
            first = fge
        return first


def details(results: Results) -> str:
    """Return all tables."""
    parts = [
        ("Over the subset", summary(results)),
        ("FGE to 5 % over that of fastvi", advantage(results)),
        (
            "Median |error| over seeds at the end of the run, per cent",
            by_problem(results, _error_cell),
        ),
        ("FGE at the end of the run, median", by_problem(results, _fge_cell)),
        ("Seconds of a run, compilation included, median", by_problem(results, _seconds_cell)),
        (
            "Relative variance x FGE, as the method states its error, mean; in brackets the real "
            "one, the mean squared relative error x FGE",
            by_problem(results, _variance_cell),
        ),
        ("FGE per second, median; of fastvi without compilation", rates(results)),
        (
            "FGE from which the median |error| stays below 5 % (10 %)",
            by_problem(results, _reach_cell),
        ),
        (
            "Median |error| in per cent at the best step size; the largest up to four times below "
            "it, and above",
            sensitivity(results),
        ),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts)


def brief(results: Results) -> str:
    """Return the table of the README: the columns and the lines that a first reader needs."""
    header, *lines = _summary_lines(results)
    columns = [header.index(name) for name in BRIEF_COLUMNS]
    return markdown(
        list(BRIEF_COLUMNS),
        [[line[column] for column in columns] for line in lines if line[0] not in LEFT_OUT],
    )


def summary(results: Results) -> str:
    """Return one line for each entry."""
    lines = _summary_lines(results)
    return markdown(lines[0], lines[1:])


def _summary_lines(results: Results) -> list[list[str]]:
    """Return the header, and one line for each entry."""
    header = [
        "method",
        "problems",
        "FGE, median",
        "median error, %",
        "worst median",
        "worst run",
        "below 5 %",
    ]
    header += ["FGE to 5 %, median", "diverged runs"]
    lines = [[*header, *list(EFFICIENCY)[:2]]]
    for entry in ENTRIES:
        found = [
            (name, knob)
            for name in results.problems
            if (knob := results.chosen(name, entry)) is not None
        ]
        if not found:
            continue
        errors = [results.error(name, entry.method, knob) for name, knob in found]
        runs = [row for name, knob in found for row in results.runs[name, entry.method, knob]]
        reach = [results.fge_to(name, entry, 0.05) for name, _ in found]
        lines.append(
            [
                entry.label,
                str(len(found)),
                _number(float(np.median([float(row["fge"]) for row in runs]))),
                _per_cent(float(np.median(errors))),
                _per_cent(max(errors)),
                _per_cent(max(abs(float(row["relative_error"])) for row in runs)),
                f"{sum(error < 0.05 for error in errors)} of {len(errors)}",
                _number(float(np.quantile(reach, 0.5, method="inverted_cdf"))),
                f"{sum(row['diverged'] == 'True' for row in runs)} of {len(runs)}",
                *(
                    _efficiency(
                        float(np.median([_mean(results, name, entry, column) for name, _ in found]))
                    )
                    for column in ("relative_wnv", "relative_wnmse")
                ),
            ]
        )
    return lines


def advantage(results: Results) -> str:
    """Return how many times fastvi's work others take to 5 %.

    A run that never got there counts as its budget.
    """
    mine = next(
        entry for entry in ENTRIES if entry.method == "fastvi" and entry.knob == "within=budget"
    )
    lines = [["method", "problems", "median", "least", "most", "never got there"]]
    for entry in ENTRIES:
        ratios, never = [], 0
        for name in results.problems:
            work, own = results.curve(name, entry), results.fge_to(name, mine, 0.05)
            if entry.method == "fastvi" or not work or not math.isfinite(own):
                continue
            reached = results.fge_to(name, entry, 0.05)
            never += not math.isfinite(reached)
            ratios.append(min(reached, work[-1][0]) / own)
        if ratios:
            values = (np.median(ratios), min(ratios), max(ratios))
            lines.append(
                [entry.label, str(len(ratios)), *(f"{value:.2g}" for value in values), str(never)]
            )
    return markdown(lines[0], lines[1:])


def by_problem(results: Results, cell: Callable[[Results, str, Entry], str]) -> str:
    """Return a table with a line for each problem and a column for each entry."""
    lines = [["problem", *(entry.label for entry in ENTRIES)]]
    lines += [
        [name, *(cell(results, name, entry) for entry in ENTRIES)] for name in results.problems
    ]
    return markdown(lines[0], lines[1:])


def rates(results: Results) -> str:
    """Return the table of FGE per second, once a run of fastvi has said how long it compiled."""
    is_known = any(row.get("fge_per_second", "") for rows in results.runs.values() for row in rows)
    return by_problem(results, _rate_cell) if is_known else tabulate([], [])


def variational(results: Results) -> str:
    """Return the signed error of what each q says, and of fastvi's llc."""
    own = [
        entry
        for entry in ENTRIES
        if entry.label in ("fastvi, method=variational", "fastvi, defaults")
    ]
    entries = [own[0], *VARIATIONAL, own[1]]
    shown = [
        name
        for name in results.problems
        if any(results.knobs(name, entry.method) for entry in VARIATIONAL)
    ]
    lines = [["problem", "d", "reference", *(entry.label for entry in entries)]]
    for name in shown:
        first = next(rows[0] for (problem, _, _), rows in results.runs.items() if problem == name)
        cells = (_signed_cell(results, name, entry) for entry in entries)
        lines.append([name, first["d"], f"{float(first['reference']):.4g}", *cells])
    return markdown(lines[0], lines[1:])


def _signed_cell(results: Results, problem: str, entry: Entry) -> str:
    knob = results.chosen(problem, entry)
    if knob is None:
        return ""
    rows = results.runs[problem, entry.method, knob]
    error, fge = (
        float(np.median([float(row[name]) for row in rows])) for name in ("relative_error", "fge")
    )
    return f"{100 * error:+.3g} ({_number(fge)})"


def _error_cell(results: Results, problem: str, entry: Entry) -> str:
    knob = results.chosen(problem, entry)
    return "" if knob is None else _per_cent(results.error(problem, entry.method, knob))


def _fge_cell(results: Results, problem: str, entry: Entry) -> str:
    knob = results.chosen(problem, entry)
    rows = results.runs[problem, entry.method, knob] if knob is not None else []
    return _number(float(np.median([float(row["fge"]) for row in rows]))) if rows else ""


def _seconds_cell(results: Results, problem: str, entry: Entry) -> str:
    knob = results.chosen(problem, entry)
    rows = results.runs[problem, entry.method, knob] if knob is not None else []
    return f"{np.median([float(row['seconds']) for row in rows]):.2g}" if rows else ""


def _mean(results: Results, problem: str, entry: Entry, column: str) -> float:
    """Return the mean over seeds, not finite where a run was not."""
    knob = results.chosen(problem, entry)
    values = results.values(problem, entry.method, knob, column) if knob is not None else []
    return float(np.mean(values)) if values else math.nan


def _variance_cell(results: Results, problem: str, entry: Entry) -> str:
    if results.chosen(problem, entry) is None:
        return ""
    stated, real = (
        _efficiency(_mean(results, problem, entry, column))
        for column in ("relative_wnv", "relative_wnmse")
    )
    return f"{stated} ({real})"


def _rate_cell(results: Results, problem: str, entry: Entry) -> str:
    knob = results.chosen(problem, entry)
    values = (
        results.values(problem, entry.method, knob, "fge_per_second") if knob is not None else []
    )
    return _number(float(np.median(values))) if values else ""


def _reach_cell(results: Results, problem: str, entry: Entry) -> str:
    if results.chosen(problem, entry) is None:
        return ""
    to_5, to_10 = (_number(results.fge_to(problem, entry, share)) for share in (0.05, 0.1))
    return f"{to_5} ({to_10})"


def _amount(knob: str) -> float:
    """Return the number of a knob such as `lr=1e-4` or `budget=30 n`."""
    return float(knob.split("=")[1].removesuffix(" n"))


def sensitivity(results: Results) -> str:
    """Return how much a wrong step size costs the two samplers without rejection."""
    lines = [
        [
            "problem",
            "SGLD: step",
            "best",
            "below",
            "above",
            "RMSProp-SGLD: step",
            "best",
            "below",
            "above",
        ]
    ]
    for problem in results.problems:
        cells = [problem]
        for method in ("sgld", "rmsprop_sgld"):
            knobs = results.knobs(problem, method)
            errors = {_amount(knob): results.error(problem, method, knob) for knob in knobs}
            if not errors:
                cells += [""] * 4
                continue
            best = min(errors, key=lambda step: errors[step])
            near = {
                step: error
                for step, error in errors.items()
                if abs(math.log(step / best)) < math.log(4)
            }
            below = max((error for step, error in near.items() if step < best), default=math.nan)
            above = max((error for step, error in near.items() if step > best), default=math.nan)
            cells += [f"{best:.2g}", *map(_per_cent, (errors[best], below, above))]
        lines.append(cells)
    return markdown(lines[0], lines[1:])


def draw_figure(results: Results) -> None:
    """Draw the median error against work on a few problems."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [name for name in SHOWN if name in results.problems]
    if not shown:
        return
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4 * len(shown), 4), sharey=True, layout="constrained"
    )
    for axis, problem in zip(np.atleast_1d(axes), shown, strict=True):
        for index, entry in enumerate(
            entry for entry in ENTRIES if entry.knob not in ("leapfrogs=32", "lr=0.01")
        ):
            points = [
                (fge, error) for fge, error in results.curve(problem, entry) if math.isfinite(error)
            ]
            if not points:
                continue
            style = "*" if entry.method == "fastvi" else ".-"
            size = 11 if entry.method == "fastvi" else 4
            axis.loglog(
                *zip(*points, strict=True),
                style,
                color=f"C{index}",
                markersize=size,
                label=entry.label,
            )
        axis.axhline(0.05, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=problem, xlabel="full-gradient equivalents, all chains", ylim=(1e-3, 3))
    np.atleast_1d(axes)[0].set_ylabel("|relative error|, median over seeds")
    lines = {
        line.get_label(): line for axis in np.atleast_1d(axes) for line in axis.get_lines()[:-1]
    }
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)


def _per_cent(error: float) -> str:
    if math.isnan(error):
        return ""
    return f"{100 * error:.3g}" if error < 10 else "above 1000"


def _efficiency(value: float) -> str:
    return f"{value:.3g}" if value < 1e4 else "-" if math.isnan(value) else "above 10000"


def _number(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "-"
