"""llc over temperatures and localizations: what a profile holds, and its table."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvi._html import result_html
from fastvi._numbers import with_error
from fastvi._typing import Float
from fastvi.results.draw_findings import LOCALIZER_SHARE
from fastvi.results.findings import Finding
from fastvi.results.report.svg import svg_where_possible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class LLCProfile:
    """llc over a grid of n beta and localization, arrays of shape (nbetas, localizations).

    Attributes:
        nbetas: n times the inverse temperatures, rising.
        localizations: Strengths of the localizer, rising.
        llc: nbeta (E[L_n(w)] - L_n(w*)) under the posterior of each cell.
        llc_sem: Its standard error.
        radius: Root mean square of |w - w*|.
        radius_sem: Its standard error.
        fge: Full-gradient equivalents that each cell took; 0 for the estimate's own.
        fge_before: Those of the estimate that the profile went on from.
        health: Findings of each cell, gravest first: rows of tuples.
        nbeta: n beta of that estimate.
        localization: Its localization.
        dim: Dimensions.
        n_data: Examples.
    """

    nbetas: Float[np.ndarray, " nbetas"]
    localizations: Float[np.ndarray, " localizations"]
    llc: Float[np.ndarray, "nbetas localizations"]
    llc_sem: Float[np.ndarray, "nbetas localizations"]
    radius: Float[np.ndarray, "nbetas localizations"]
    radius_sem: Float[np.ndarray, "nbetas localizations"]
    fge: Float[np.ndarray, "nbetas localizations"]
    fge_before: float
    health: tuple[tuple[tuple[Finding, ...], ...], ...]
    nbeta: float
    localization: float
    dim: int
    n_data: int

    @property
    def rise(self) -> Float[np.ndarray, "nbetas localizations"]:
        """E[L_n(w)] - L_n(w*), in nats per example."""
        return self.llc / self.nbetas[:, None]

    @property
    def held(self) -> Float[np.ndarray, "nbetas localizations"]:
        """Share of the directions that data hold: 1 - localization radius^2 / dim."""
        return 1 - self.localizations * self.radius**2 / self.dim

    @property
    def localization_slope(self) -> Any:
        """D log llc / d log localization from each cell to the next, and its standard error.

        Two arrays of shape (nbetas, localizations - 1); NaN where an llc is not positive. 0 where
        llc does not depend on the localizer, -1 where it is proportional to 1 / localization.
        """
        return log_slopes(self.llc, self.llc_sem, self.localizations)

    @property
    def nbeta_slope(self) -> Any:
        """D log llc / d log nbeta from each cell to the next, and its standard error.

        Two arrays of shape (nbetas - 1, localizations). 0 on a plateau of the temperature.
        """
        found = log_slopes(self.llc.T, self.llc_sem.T, self.nbetas)
        return tuple(part.T for part in found)

    @property
    def localizer_decides(self) -> np.ndarray:
        """Whether llc is nearly proportional to 1 / localization about a cell.

        By the mean slope to its neighbours, of below -0.6; never in a single column.
        """
        slope = self.localization_slope[0]
        if not slope.shape[1]:
            return np.zeros(self.llc.shape, bool)
        ends = np.concatenate([slope[:, :1], slope, slope[:, -1:]], axis=1)
        return -0.5 * (ends[:, :-1] + ends[:, 1:]) > LOCALIZER_SHARE

    @property
    def total_fge(self) -> float:
        """Full-gradient equivalents of all cells, and of the estimate before."""
        return self.fge_before + float(self.fge.sum())

    def _repr_html_(self) -> str:
        """Return it for a notebook."""
        return result_html(self.summary(), figure=svg_where_possible(self.plot, "llc"))

    def summary(self) -> str:
        """Return the table of llc and the findings, for a terminal."""
        marks = np.where(self.localizer_decides, "*", " ")
        cells = [
            [with_error(*both) + mark for *both, mark in zip(*row, strict=True)]
            for row in zip(self.llc, self.llc_sem, marks, strict=True)
        ]
        width = max(len(cell) for row in cells for cell in row) + 2
        head = "".join(f"{gamma:>{width}.4g}" for gamma in self.localizations)
        lines = [f"{'n beta':<10}{head}   localization"]
        for nbeta, row in zip(self.nbetas, cells, strict=True):
            lines.append(f"{nbeta:<10.4g}" + "".join(f"{cell:>{width}}" for cell in row))
        if self.localizer_decides.any():
            lines.append(
                "* llc is nearly proportional to 1 / localization: lower localization or raise n "
                "beta."
            )
        lines += [
            f"work      {self.total_fge:,.0f} FGE, {self.fge_before:,.0f} of it of the estimate",
        ]
        return "\n".join([*lines, *self._findings()])

    def _findings(self) -> list[str]:
        """Name the cells of each finding."""
        return [
            f"n beta {nbeta:.4g}, localization {gamma:.4g}: {finding}"
            for nbeta, row in zip(self.nbetas, self.health, strict=True)
            for gamma, findings in zip(self.localizations, row, strict=True)
            for finding in findings
        ]

    def plot(self) -> "Figure":
        """Draw llc against localization, one line for each n beta: see `plot_profile`."""
        from fastvi.results.report.profile import plot_profile

        return plot_profile(self)


def log_slopes(
    values: Float[np.ndarray, "rows columns"],
    errors: Float[np.ndarray, "rows columns"],
    grid: Float[np.ndarray, " columns"],
) -> tuple[np.ndarray, np.ndarray]:
    """Return d log value / d log grid between neighbouring columns, and its standard error."""
    logs = np.log(np.where(values > 0, values, np.nan))
    relative = np.where(values > 0, errors / np.where(values > 0, values, 1.0), np.nan)
    steps = np.diff(np.log(grid))
    slope = np.diff(logs, axis=1) / steps
    return slope, np.hypot(relative[:, 1:], relative[:, :-1]) / steps
