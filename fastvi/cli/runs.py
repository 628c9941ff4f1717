"""`fastvi report` and `fastvi compare`: look at runs that are finished."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastvi._errors import ConfigError
from fastvi.cli.table import describe, format_table
from fastvi.demos.base import Say
from fastvi.results import files
from fastvi.results.estimate import LLCEstimate
from fastvi.results.report.page import write_report
from fastvi.results.report.style import (
    GUIDE,
    INK,
    chain_color,
    running_mean,
    styled_figure,
    window_of,
)
from fastvi.results.runs import REPORT_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONGEST_NAME = 28  # letters of a run in a table of 80


@dataclasses.dataclass(frozen=True)
class Report:
    """Write the report page of a run again, and print its summary.

    Attributes:
        run_folder: Run folder.
        out: HTML file; report.html in the run folder when left out.
    """

    run_folder: Path = dataclasses.field(metadata={"metavar": "RUN"})
    out: Path | None = None

    def run(self, say: Say) -> None:
        """Read, write, tell."""
        result = LLCEstimate.load(self.run_folder)
        try:
            path = self._write(result)
        # A folder that cannot be written does not keep the summary back.
        finally:
            say(result.summary())
        say(f"\nwritten: {path}")

    def _write(self, result: LLCEstimate) -> Path:
        """Write the page.

        In the run folder, which may be anybody's, a link in its place is replaced, not followed.
        """
        if self.out is not None:
            return write_report(result, self.out)
        with files.staged(self.run_folder) as staging:
            write_report(result, staging / REPORT_FILE)
            files.publish(staging, self.run_folder, (REPORT_FILE,))
        return self.run_folder / REPORT_FILE


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs in a table, and in a figure where asked.

    Attributes:
        run_folders: Run folders.
        out: PNG file for a figure.
    """

    run_folders: tuple[Path, ...] = dataclasses.field(metadata={"metavar": "RUN [RUN ...]"})
    out: Path | None = None

    def run(self, say: Say) -> None:
        """Read, draw, tell."""
        if not self.run_folders:
            raise ConfigError(
                "compare takes one run folder or more, for example fastvi compare runs/a runs/b."
            )
        results = [
            (name, LLCEstimate.load(folder))
            for name, folder in zip(self._names(), self.run_folders, strict=True)
        ]
        try:
            if self.out is not None:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                draw_comparison(results).savefig(self.out, dpi=150)
        # A figure that fails does not keep the table back.
        finally:
            self._tell(results, say)
        if self.out is not None:
            say(f"written: {self.out}")

    def _tell(self, results: list[tuple[str, LLCEstimate]], say: Say) -> None:
        for line in format_table([{"run": name, **describe(result)} for name, result in results]):
            say(line)
        problems = {
            (result.n_data, result.dim, result.nbeta, result.localization) for _, result in results
        }
        if len(problems) > 1:
            say(
                "the runs differ in n, d, n beta or localization: their llc and elbo are of "
                "different targets"
            )

    def _names(self) -> list[str]:
        """Name each run by its folder, or where two have the same name by the end of its path."""
        short = [folder.resolve().name for folder in self.run_folders]
        full = [
            path if len(path) <= LONGEST_NAME else "…" + path[1 - LONGEST_NAME :]
            for path in map(str, self.run_folders)
        ]
        return short if len(set(short)) == len(short) else full


def draw_comparison(results: list[tuple[str, LLCEstimate]]) -> "Figure":
    """Draw llc with errors and the ELBO's running mean of each run."""
    height = 1.6 + 0.35 * max(len(results), 6)
    fitted = {place: result for place, (_, result) in enumerate(results) if result.has_fit}
    panels = 2 if fitted else 1  # walks without a fit have no ELBO
    with styled_figure((5.5 * panels, height), layout="constrained") as figure:
        llc, *others = figure.subplots(1, panels, squeeze=False)[0]
        for place, (_, result) in enumerate(results):
            color = chain_color(place)
            llc.errorbar(result.llc, place, xerr=result.llc_sem, fmt="o", color=color, capsize=3)
            llc.plot(result.llc_vi, place, "|", color=color, markersize=12)
        llc.set_yticks(range(len(results)), [name for name, _ in results], color=INK)
        llc.set_ylim(len(results) - 0.5, -0.5)  # the first on top, none on the frame
        llc.set(title="llc ± sem" + (";  | q alone" if fitted else ""), xlabel="llc")
        for axes in others:
            _draw_elbo(axes, fitted)
    return figure


def _draw_elbo(axes: "Axes", fitted: dict[int, LLCEstimate]) -> None:
    """Draw the ELBO's running mean of each run, by its place."""
    traces = {place: np.asarray(one.traces["elbo"], float) for place, one in fitted.items()}
    for place, trace in traces.items():
        values, window = trace.mean(axis=0, keepdims=True), window_of(trace.shape[1])
        axes.plot(
            # A mean stands in the middle of its window.
            np.arange(values.shape[1] - window + 1) + window / 2,
            running_mean(values, window)[0],
            color=chain_color(place),
        )
        axes.axhline(fitted[place].elbo, **GUIDE | {"color": chain_color(place), "linewidth": 0.8})
    axes.set(title="ELBO,  running mean over chains;  dashed: final", xlabel="step", ylabel="nats")
    # The rise at the start is left out, so that the ends can be compared.
    bulks = [np.percentile(trace[:, trace.shape[1] // 5 :], [5, 95]) for trace in traces.values()]
    axes.set_ylim(np.min(bulks), np.max(bulks))
