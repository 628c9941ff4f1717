"""The single pictures of a run: what plots, report and TensorBoard are made of."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastvi.results.estimate import LLCEstimate
from fastvi.results.report.style import (
    CHAIN_COLORS,
    FAINT,
    GUIDE,
    INK,
    as_png,
    chain_color,
    draw_chains,
    set_limits,
    styled_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_SIZE = (6.4, 3.7)
MOST_BARS = 64  # of a chain: with four chains a bar is then two pixels of the page wide
# Largest over smallest value below which a logarithmic axis has plain numbers. Above three decades
# 1, 2, 5 of each no longer fit.
NARROW_RANGE = 1000
LEGEND_SHARE = 0.12  # of the height, for a legend of one line above lines that are everywhere


class Panel(NamedTuple):
    """A picture: how to draw it, whether a result has what it shows, what to look for in it."""

    draw: Callable[["Axes", LLCEstimate], None]
    applies: Callable[[LLCEstimate], bool]
    reading: str


def render(name: str, result: LLCEstimate, dpi: int) -> bytes:
    """Draw one panel as a PNG image."""
    return as_png(panel_figure(name, result), dpi)


def panel_figure(
    name: str, result: LLCEstimate, size: tuple[float, float] = PANEL_SIZE
) -> "Figure":
    """Draw one panel."""
    with styled_figure(size) as figure:
        PANELS[name].draw(figure.subplots(), result)
        figure.subplots_adjust(left=0.12, right=0.97, top=0.9, bottom=0.15)
        return figure


def batch_llc(result: LLCEstimate) -> np.ndarray:
    """Return `nbeta (L_B(w) - L_n(w*))` at each step, shape (chains, steps).

    A noisy llc of the moving q.

    The trace `elbo_like` is `-nbeta L_B - localization/2 |w - w*|^2`, and `radius2` is `|w -
    w*|^2`.
    """
    traces = {name: np.asarray(result.traces[name], float) for name in ("elbo_like", "radius2")}
    nbeta_loss = -traces["elbo_like"] - 0.5 * result.localization * traces["radius2"]
    return nbeta_loss - result.nbeta * result.init_loss


def spectrum_of(result: LLCEstimate) -> np.ndarray:
    """Return the eigenvalues that a logarithmic axis can show."""
    values = np.asarray(result.curvature.spectrum, float)
    return values[np.isfinite(values) & (values > 0)]


def draw_elbo(axes: "Axes", result: LLCEstimate) -> None:
    """Draw the ELBO with its noise."""
    values = np.asarray(result.traces["elbo"], float)
    means = draw_chains(axes, values, label_chains=True, band=True)
    axes.axhline(result.elbo, label="final, all data", **GUIDE)
    set_limits(axes, values, means, include=(result.elbo,))
    axes.set(title="ELBO:  mean ± standard deviation of steps", ylabel="nats", xlabel="step")
    axes.legend(loc="lower right", ncols=2 if len(values) > 2 else 1)


def draw_llc(axes: "Axes", result: LLCEstimate) -> None:
    """Draw the llc of the moving q by chain against the work of one chain, and the final values."""
    values = batch_llc(result)
    work = np.asarray(result.traces["cumulative_fge"], float)[0]
    means = draw_chains(axes, values, where=work)
    low, high = result.llc - result.llc_sem, result.llc + result.llc_sem
    label = f"{'corrected' if result.correction else 'final'} llc ± sem, all data"
    axes.axhspan(low, high, color=INK, alpha=0.18, linewidth=0, zorder=3, label=label)
    axes.axhline(result.llc, color=INK, linewidth=1, zorder=3)
    if result.correction:
        axes.axhline(result.llc_vi, zorder=3, label="q alone, all data", **GUIDE)
    set_limits(axes, values, means, include=(low, high, result.llc_vi))
    axes.set(
        title=r"llc on minibatches:  $n\beta\,(L_B(w) - L_n(w^*))$",
        ylabel="nats",
        xlabel="full-gradient equivalents of one chain",
    )
    axes.legend(loc="upper right")


def draw_virial(axes: "Axes", result: LLCEstimate) -> None:
    """Draw the virial, 1 at the best fit."""
    values = np.asarray(result.traces["virial"], float)
    means = draw_chains(axes, values)
    axes.axhline(1, label="1 at the best fit", **GUIDE)
    set_limits(axes, values, means, include=(0.9, 1.1))
    axes.set(
        title="virial:  above 1, q is too wide; below, too narrow", ylabel="virial", xlabel="step"
    )
    axes.legend(loc="upper right")


def draw_radius(axes: "Axes", result: LLCEstimate) -> None:
    """Draw |w - w*|^2 beside what the localizer alone would give."""
    values = np.asarray(result.traces["radius2"], float)
    means = draw_chains(axes, values)
    if result.localization > 0:
        # A Gaussian of precision gamma has the mean squared radius d / gamma.
        axes.axhline(
            result.dim / result.localization, label=r"$d/\gamma$: the localizer alone", **GUIDE
        )
        axes.legend(loc="lower right")
    finite = means[np.isfinite(means) & (means > 0)]
    if finite.size:
        bulk = values[np.isfinite(values) & (values > 0)]
        # One step close to w* would otherwise stretch the axis over decades.
        axes.set(yscale="log", ylim=(float(0.5 * np.percentile(bulk, 1)), None))
        low, high = axes.get_ylim()
        if high < NARROW_RANGE * low:
            _label_plainly(axes)
    axes.set(title=r"radius:  $|w - w^*|^2$ of draws", ylabel=r"$|w - w^*|^2$", xlabel="step")


def _label_plainly(axes: "Axes") -> None:
    """Label a logarithmic axis of few decades by plain numbers.

    They are read, and drawn, sooner than powers of ten.
    """
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def draw_spectrum(axes: "Axes", result: LLCEstimate) -> None:
    """Draw the leading eigenvalues of the precision at w*, those in the core filled."""
    values, rank = spectrum_of(result), int(result.curvature.rank)
    index = np.arange(1, values.size + 1)
    label = f"in the core, rank {rank}"
    axes.plot(index[:rank], values[:rank], "o", color=CHAIN_COLORS[0], markersize=4, label=label)
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
    # The localization is in model coordinates, in which a whitened spectrum is not.
    plain = result.config.whitening == "none"
    if plain and result.localization > 0:
        axes.axhline(result.localization, label="localization", **GUIDE)
    title = r"leading spectrum of $n\beta H + \gamma$ at $w^*$" + ("" if plain else ", whitened")
    axes.set(title=title, ylabel="eigenvalue", xlabel=f"index, of {result.dim:,}", yscale="log")
    if values.max() < NARROW_RANGE * values.min():
        _label_plainly(axes)
    axes.legend(loc="upper right")


def draw_learning_rate(axes: "Axes", result: LLCEstimate) -> None:
    """Draw the schedule."""
    axes.plot(np.asarray(result.traces["lr"])[0], color=CHAIN_COLORS[0], linewidth=1.6)
    axes.set(title="learning rate", ylabel="lr", xlabel="step", ylim=(0, None))


def draw_weights(axes: "Axes", result: LLCEstimate) -> None:
    """Draw the mixture weights of each chain, heaviest first."""
    # Components have no order of their own, and differ from chain to chain.
    weights = np.sort(np.asarray(result.family_arrays["pi"], float), axis=1)[:, ::-1]
    chains, components = weights.shape
    places = np.arange(1, min(components, MOST_BARS) + 1)
    width = 0.8 / chains  # a fifth of each place stays free between components
    for chain, row in enumerate(weights):
        at = places - 0.4 + width * (chain + 0.5)
        axes.bar(at, row[:MOST_BARS], width=width, color=chain_color(chain), linewidth=0)
    axes.axhline(1 / components, label="equal weights", **GUIDE)
    axes.set(
        title=r"mixture weights $\pi$, sorted, by chain",
        ylabel="weight",
        xlabel="component, heaviest first",
        xticks=places[:: max(1, places.size // 16)],
    )
    axes.legend(loc="upper right")


def draw_scree(axes: "Axes", result: LLCEstimate) -> None:
    """Draw the variance that each factor row adds, for each component of the first chain."""
    norms = np.asarray(result.family_arrays["factor_norm2"], float)[0]
    weights = np.asarray(result.family_arrays["pi"], float)[0]
    # A row of length 0 has no place on a logarithmic axis.
    ordered = np.maximum(-np.sort(-norms, axis=1), 1e-12)
    index = np.arange(1, norms.shape[1] + 1)
    for place, component in enumerate(np.argsort(-weights)):
        style: dict[str, Any] = {"color": FAINT, "linewidth": 0.8}
        # Beyond the colours of the palette components are not told apart.
        if place < len(CHAIN_COLORS):
            label = f"component {component}, weight {weights[component]:.2f}"
            style = {"color": chain_color(place), "marker": "o", "markersize": 4, "label": label}
        axes.plot(index, ordered[component], **style)
    axes.axhline(1, **GUIDE)
    axes.set(
        title="scree:  variance that each factor adds, 1 = the diagonal's",
        ylabel=r"$|A_m\ \mathrm{row}|^2$",
        xlabel="rank, longest first",
        yscale="log",
        xticks=index[:: max(1, index.size // 12)],
    )
    axes.legend(loc="best", fontsize=7.5)


def draw_scales(axes: "Axes", result: LLCEstimate) -> None:
    """Draw the histogram of D^{1/2} on a logarithmic axis."""
    scales = np.asarray(result.family_arrays["D_sqrt"], float)
    kept = scales[np.isfinite(scales) & (scales > 0)]
    if kept.size:
        # The margin keeps two edges apart where all scales are one.
        bins = np.geomspace(kept.min() / 1.05, kept.max() * 1.05, 41)
        look = {"bins": bins, "histtype": "step", "linewidth": 1.4}
        for chain, row in enumerate(scales):
            # Shares, so that the axis does not depend on the number of parameters.
            weights = np.full(row.size, 1 / row.size)
            axes.hist(row, weights=weights, color=chain_color(chain), **look)
        axes.set_xscale("log")
    if result.localization > 0:
        axes.axvline(result.localization**-0.5, label=r"$\gamma^{-1/2}$", **GUIDE)
        axes.legend(loc="upper left")
    axes.set(
        title=r"standard deviations $D^{1/2}$ of the diagonal",
        ylabel="share",
        xlabel="model coordinates",
    )


def draw_importance(axes: "Axes", result: LLCEstimate) -> None:
    """Draw the largest importance weights and their tail's shape."""
    khat, word, effective = result.importance
    log_weights = np.sort(np.ravel(np.asarray(result.log_weights, float)))[::-1]
    finite = log_weights[np.isfinite(log_weights)]
    if finite.size:
        # Softmax: the largest is taken off, for float64 ends at exp(709).
        shares = np.exp(finite - finite[0])
        shares /= shares.sum()
        index = np.arange(1, finite.size + 1)
        axes.plot(index, np.maximum(shares, 1e-8), ".", color=CHAIN_COLORS[0], markersize=4)
        axes.axhline(1 / finite.size, label="equal weights", **GUIDE)
        axes.set(xscale="log", yscale="log", ylim=(1e-8, 2))
        axes.legend(loc="lower left")
    title = f"importance weights:  k-hat {khat:.2g} ({word}), {effective:.3g} effective draws"
    axes.set(title=title, ylabel="share of the weight", xlabel="draw of q, heaviest first")


def draw_walk(axes: "Axes", result: LLCEstimate) -> None:
    """Draw the walkers, and the value that they end at."""
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(result.walk_llc, float)
    means = draw_chains(axes, values)
    burn = result.walk_burn_in
    axes.axvspan(0, burn, color=FAINT, alpha=0.12, linewidth=0, label="burn-in")
    low, high = result.llc - result.llc_sem, result.llc + result.llc_sem
    axes.axhspan(low, high, color=INK, alpha=0.3, zorder=3, linewidth=0)
    label = f"{'corrected ' if result.has_fit else ''}llc ± sem"
    axes.axhline(result.llc, color=INK, linewidth=1, zorder=3, label=label)
    # The running mean is shorter than the walk, and may end within the burn-in.
    late = means[:, burn:] if means.shape[1] > burn else means
    set_limits(axes, values[:, burn:], late, include=(result.llc,))
    axes.set(
        title=f"walkers:  {_said_of_walk(result)}",
        ylabel=r"$n\beta\,(L_n(w) - L_n(w^*))$",
        xlabel="bin of steps",
    )
    # A short walk has few bins, and no half of one.
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    # Walkers fill the whole width, so that a legend finds no free corner.
    axes.set_ylim(low, high + LEGEND_SHARE * (high - low))
    axes.legend(loc="upper right", ncols=2)


def _said_of_walk(result: LLCEstimate) -> str:
    details = result.correction
    if details is None:
        return ""
    if not result.has_fit:
        return f"R-hat {details.rhat:.3f}, {details.batch} fresh examples a step"
    return f"R-hat {details.rhat:.3f}, variance reduced {details.variance_reduction:.2g} times"


def _has_traces(result: LLCEstimate) -> bool:
    return result.has_fit and result.traces["elbo"].shape[1] > 0


def _has_array(name: str) -> Callable[[LLCEstimate], bool]:
    return lambda result: name in result.family_arrays and result.family_arrays[name].size > 0


PANELS = {
    "elbo": Panel(
        draw_elbo,
        _has_traces,
        "Rises, then levels off within its noise. Still rising: raise steps.",
    ),
    "llc": Panel(
        draw_llc,
        _has_traces,
        "Chains agree and level off. A corrected value may lie far off: then q is not the "
        "posterior.",
    ),
    "walk": Panel(
        draw_walk,
        lambda result: result.walk_llc.size > 0,
        "Walkers mix: no trend after the burn-in, R-hat near 1.",
    ),
    "importance": Panel(
        draw_importance,
        lambda result: result.log_weights.size > 0,
        "Flat is good; a few draws far above are not.",
    ),
    "virial": Panel(draw_virial, _has_traces, "1 at the end: the width of q is right."),
    "radius": Panel(
        draw_radius, _has_traces, "Settles. At the dashed line the loss decides nothing."
    ),
    "spectrum": Panel(
        draw_spectrum,
        lambda result: spectrum_of(result).size > 0,
        "Steep directions stand above the localization.",
    ),
    "pi": Panel(draw_weights, _has_array("pi"), "One bar alone: the mixture collapsed."),
    "scree": Panel(
        draw_scree, _has_array("factor_norm2"), "Far below 1 throughout: rank r is not used."
    ),
    "scales": Panel(
        draw_scales, _has_array("D_sqrt"), "All at the dashed line: only the localizer acts there."
    ),
    "lr": Panel(draw_learning_rate, _has_traces, "The schedule."),
}
IMAGES = {
    "pi": "pi",
    "scree": "scree",
    "D_sqrt": "scales",
    "radius2_trace": "radius",
    "spectrum": "spectrum",
}
