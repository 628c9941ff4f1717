"""One figure of a run: is it converged, does it agree with itself, what does the minimum look like."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastvi._optional import import_optional
from fastvi.result import LLCEstimate, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow: told apart in most kinds of colour blindness.
CHAIN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#222222", "#777777"
RAW_ALPHA = 0.18
NUM_WINDOWS = 25  # a run is about this many windows of the running mean long
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.5,
}


def plot_traces(result: LLCEstimate) -> "Figure":
    """Draw the traces of an estimate and the curvature at w*.

    Four panels: the ELBO; `nbeta (L_B(w) - L_n(w*))` on the minibatches of the fit, with the final llc; the
    virial, 1 at the best fit; the leading spectrum of the precision at w*, or the learning rate without one.
    Limits follow percentiles, so that a wild start does not flatten the rest.

    Args:
        result: The estimate; one that `LLCEstimate.load` read will do.

    Returns:
        A figure that no window manager knows of; `figure.savefig(path)` writes it.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7.4), facecolor="white")
        ((elbo, llc), (virial, last)) = figure.subplots(2, 2)
        _draw_elbo(elbo, result)
        _draw_llc(llc, result)
        _draw_virial(virial, result)
        if len(_spectrum(result)):
            _draw_spectrum(last, result)
        else:
            _draw_learning_rate(last, result)
        _frame(figure, result)
    return figure


def import_matplotlib() -> Any:
    """Import matplotlib, or raise MissingExtraError with the fix."""
    return import_optional("matplotlib", extra="plots", distribution="matplotlib", purpose="plotting")


def batch_llc(result: LLCEstimate) -> np.ndarray:
    """Return `nbeta (L_B(w) - L_n(w*))` at each step, shape (chains, steps): a noisy llc of the moving q.

    The trace `elbo_like` is `-nbeta L_B - localization/2 |w - w*|^2`, and `radius2` is `|w - w*|^2`.
    """
    traces = {name: np.asarray(result.traces[name], float) for name in ("elbo_like", "radius2")}
    nbeta_loss = -traces["elbo_like"] - 0.5 * result.localization * traces["radius2"]
    return nbeta_loss - result.nbeta * result.init_loss


def _frame(figure: "Figure", result: LLCEstimate) -> None:
    """Write title, problem and reading aid, each on a line of its own."""
    chains, steps = result.traces["elbo"].shape
    problem = (
        f"d = {result.dim:,}    n = {result.n_data:,}    nβ = {result.nbeta:.4g}    "
        f"localization = {result.localization:.4g}    {chains} chains × {steps:,} steps"
    )
    legend = f"faint: single steps, on minibatches;  solid: running mean of {_window(steps)} steps"
    estimate = rf"llc  $\hat\lambda$ = {with_error(result.llc, result.llc_sem)}"
    figure.text(0.012, 0.955, estimate, fontsize=14, ha="left", va="center", color=INK)
    figure.text(0.988, 0.955, problem, fontsize=9.5, ha="right", va="center", color=INK)
    figure.text(0.988, 0.012, legend, fontsize=8.5, ha="right", va="bottom", color=FAINT)
    figure.set_layout_engine("constrained", rect=(0.004, 0.035, 0.992, 0.885), w_pad=0.1, h_pad=0.08)


def _draw_elbo(axes: "Axes", result: LLCEstimate) -> None:
    values = np.asarray(result.traces["elbo"], float)
    means = _draw_chains(axes, values, label_chains=True)
    axes.axhline(result.elbo, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="final, all data")
    _set_limits(axes, values, means, include=(result.elbo,))
    axes.set(title="ELBO", ylabel="nats", xlabel="step")
    axes.legend(loc="lower right", ncols=2 if len(values) > 2 else 1)


def _draw_llc(axes: "Axes", result: LLCEstimate) -> None:
    values = batch_llc(result)
    means = _draw_chains(axes, values)
    low, high = result.llc - result.llc_sem, result.llc + result.llc_sem
    label = f"{'corrected' if result.correction else 'final'} llc ± sem, all data"
    axes.axhspan(low, high, color=INK, alpha=0.18, linewidth=0, zorder=3, label=label)
    axes.axhline(result.llc, color=INK, linewidth=1, zorder=3)
    _set_limits(axes, values, means, include=(low, high))
    axes.set(title=r"llc on minibatches:  $n\beta\,(L_B(w) - L_n(w^*))$", ylabel="nats", xlabel="step")
    axes.legend(loc="upper right")


def _draw_virial(axes: "Axes", result: LLCEstimate) -> None:
    values = np.asarray(result.traces["virial"], float)
    means = _draw_chains(axes, values)
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="1 at the best fit")
    _set_limits(axes, values, means, include=(0.9, 1.1))
    axes.set(title="virial:  above 1, q is too wide; below, too narrow", ylabel="virial", xlabel="step")
    axes.legend(loc="upper right")


def _draw_spectrum(axes: "Axes", result: LLCEstimate) -> None:
    from matplotlib.ticker import LogLocator

    values, rank = _spectrum(result), int(result.curvature["rank"])
    index = np.arange(1, values.size + 1)
    axes.plot(
        index[:rank],
        values[:rank],
        "o",
        color=CHAIN_COLORS[0],
        markersize=4,
        label=f"in the core, rank {rank}",
    )
    axes.plot(
        index[rank:],
        values[rank:],
        "o",
        color=FAINT,
        markersize=4,
        markerfacecolor="white",
        label="covered by the diagonal",
    )
    axes.axvline(rank + 0.5, color=CHAIN_COLORS[0], linewidth=0.8, linestyle=(0, (1, 2)))
    plain = result.config.whitening == "none"
    if plain and result.localization > 0:
        axes.axhline(result.localization, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="localization")
    axes.set_yscale("log")
    if values.max() < 1000 * values.min():
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set(
        title=r"leading spectrum of $n\beta H + \gamma$ at $w^*$" + ("" if plain else ", whitened"),
        ylabel="eigenvalue",
        xlabel=f"index, of {result.dim:,}",
    )
    axes.legend(loc="upper right")


def _draw_learning_rate(axes: "Axes", result: LLCEstimate) -> None:
    axes.plot(np.asarray(result.traces["lr"])[0], color=CHAIN_COLORS[0], linewidth=1.6)
    axes.set(title="learning rate", ylabel="lr", xlabel="step")
    axes.set_ylim(bottom=0)


def _spectrum(result: LLCEstimate) -> np.ndarray:
    """Return the eigenvalues that a logarithmic axis can show."""
    values = np.asarray(result.curvature["spectrum"], float)
    return values[np.isfinite(values) & (values > 0)]


def _draw_chains(axes: "Axes", values: np.ndarray, *, label_chains: bool = False) -> np.ndarray:
    """Draw every chain faintly and its running mean, which is returned."""
    steps = values.shape[1]
    window = _window(steps)
    means = np.stack([np.convolve(row, np.full(window, 1 / window), mode="valid") for row in values])
    centers = np.arange(means.shape[1]) + (window - 1) / 2
    for chain, (row, mean) in enumerate(zip(values, means, strict=True)):
        color = CHAIN_COLORS[chain % len(CHAIN_COLORS)]
        label = f"chain {chain}" if label_chains and chain < len(CHAIN_COLORS) else None
        axes.plot(row, color=color, alpha=RAW_ALPHA, linewidth=0.6, zorder=1, rasterized=True)
        axes.plot(centers, mean, color=color, linewidth=1.6, zorder=2.5, label=label)
    axes.set_xlim(0, max(steps - 1, 1))
    return means


def _window(steps: int) -> int:
    return max(1, steps // NUM_WINDOWS)


def _set_limits(axes: "Axes", values: np.ndarray, means: np.ndarray, include: tuple[float, ...]) -> None:
    """Show the bulk of the later single steps, all but the start of the means, and `include`."""
    late = means[:, means.shape[1] // 10 :]
    late = late[np.isfinite(late)]
    bulk = values[:, values.shape[1] // 2 :]
    bulk = bulk[np.isfinite(bulk)]
    shown = [value for value in include if np.isfinite(value)]
    if bulk.size:
        shown += np.percentile(bulk, [1, 99]).tolist()
    if late.size:
        shown += np.percentile(late, [1, 99]).tolist()
    if not shown:
        return
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
