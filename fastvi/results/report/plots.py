"""Figures of a run: is it converged, does it agree with itself, what does the minimum look like."""

from typing import TYPE_CHECKING

from fastvi._errors import DataError
from fastvi.results.estimate import LLCEstimate
from fastvi.results.report.panels import (
    PANELS,
    draw_elbo,
    draw_learning_rate,
    draw_llc,
    draw_spectrum,
    draw_virial,
    spectrum_of,
)
from fastvi.results.report.style import FAINT, INK, styled_figure, window_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_traces(result: LLCEstimate) -> "Figure":
    """Draw the traces of an estimate and the curvature at w*.

    Four panels: the ELBO; `nbeta (L_B(w) - L_n(w*))` on the minibatches of the fit against work,
    with the final llc; the virial, 1 at the best fit; the leading spectrum of the precision at w*,
    or the learning rate without one. Limits follow percentiles, so that a wild start does not
    flatten the rest. A walk without a fit has the walkers alone.

    Args:
        result: The estimate; one that `LLCEstimate.load` read will do.

    Returns:
        A figure that no window manager knows of; `figure.savefig(path)` writes it.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    if not result.has_fit:
        return _plot_walk(result)
    with styled_figure((11, 7.4)) as figure:
        ((elbo, llc), (virial, last)) = figure.subplots(2, 2)
        draw_elbo(elbo, result)
        draw_llc(llc, result)
        draw_virial(virial, result)
        if spectrum_of(result).size:
            draw_spectrum(last, result)
        else:
            draw_learning_rate(last, result)
        chains, steps = result.traces["elbo"].shape
        _frame(
            figure,
            result,
            f"{chains} chains × {steps:,} steps",
            "faint: single steps, on minibatches;  solid: running mean of "
            f"{window_of(steps)} steps",
        )
    return figure


def _plot_walk(result: LLCEstimate) -> "Figure":
    """Draw the walkers of an estimate that has no fit."""
    details, (walkers, bins) = result.correction, result.walk_llc.shape
    steps = 0 if details is None else details.steps
    with styled_figure((11, 4.6)) as figure:
        PANELS["walk"].draw(figure.subplots(), result)
        _frame(
            figure,
            result,
            f"{walkers} walkers × {steps:,} steps",
            f"faint: bins of steps, on minibatches;  solid: running mean of {window_of(bins)} bins",
        )
    return figure


def _frame(figure: "Figure", result: LLCEstimate, length: str, legend: str) -> None:
    """Write title, problem and reading aid, each on a line of its own."""
    problem = (
        f"d = {result.dim:,}    n = {result.n_data:,}    nβ = {result.nbeta:.4g}    "
        f"localization = {result.localization:.4g}    {length}"
    )
    estimate = rf"llc  $\hat\lambda$ = {result.llc_text}"
    figure.text(0.012, 0.955, estimate, fontsize=14, ha="left", va="center", color=INK)
    figure.text(0.988, 0.955, problem, fontsize=9.5, ha="right", va="center", color=INK)
    figure.text(0.988, 0.012, legend, fontsize=8.5, ha="right", va="bottom", color=FAINT)
    # The rectangle leaves the lines of text above and below free.
    figure.set_layout_engine(
        "constrained", rect=(0.004, 0.035, 0.992, 0.885), w_pad=0.1, h_pad=0.08
    )


def plot_panels(result: LLCEstimate, *names: str) -> "Figure":
    """Draw chosen panels below each other, two in a row.

    Args:
        result: The estimate.
        *names: Of elbo, llc, walk, importance, virial, radius, spectrum, pi, scree, scales, lr;
            when left out, all that the result has something to show in.

    Raises:
        KeyError: If there is no such panel.
        DataError: If the result has nothing to show in any of them.
        MissingExtraError: If matplotlib is not installed.
    """
    chosen = [name for name in names or PANELS if PANELS[name].applies(result)]
    if not chosen:
        there = ", ".join(name for name, panel in PANELS.items() if panel.applies(result))
        raise DataError(
            f"this estimate has nothing to show in {', '.join(names)}; it has {there or 'no panel'}"
            "."
        )
    columns = min(2, len(chosen))  # one panel alone takes the whole width
    rows = -(-len(chosen) // columns)
    with styled_figure((5.5 * columns, 3.7 * rows), layout="constrained") as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, name in zip(grid.flat, chosen, strict=False):
            PANELS[name].draw(axes, result)
        # An odd number of panels leaves the last place empty.
        for axes in figure.axes[len(chosen) :]:
            axes.set_axis_off()
    return figure
