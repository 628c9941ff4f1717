"""The figure of a profile: llc against localization, one line for each n beta."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastvi.results.draw_findings import LOCALIZER_SHARE
from fastvi.results.report.style import FAINT, GUIDE, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Ends of the colours that lines take along the colour map: its last tenth is too light on white.
DARKEST, LIGHTEST = 0.0, 0.85


def plot_profile(profile: Any) -> "Figure":
    """Draw llc against localization with errors, and the slope of its logarithm below.

    A slope of 0 is an llc that does not depend on the localizer. Hollow marks are cells in which
    llc is nearly proportional to 1 / localization, those below the dashed line.

    Args:
        profile: An `LLCProfile`, from `fastvi.profile`.

    Returns:
        A figure that no window manager knows of.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with styled_figure((6.6, 6.2), layout="constrained") as figure:
        import matplotlib

        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        shades = np.linspace(DARKEST, LIGHTEST, len(profile.nbetas))
        colors = matplotlib.colormaps["viridis"](shades)
        slope, slope_sem = profile.localization_slope
        middles = np.sqrt(profile.localizations[1:] * profile.localizations[:-1])
        decided, bars = profile.localizer_decides, {"capsize": 2, "linewidth": 1.4}
        for row, (nbeta, color) in enumerate(zip(profile.nbetas, colors, strict=True)):
            where, llc = profile.localizations, profile.llc[row]
            label = f"n β = {nbeta:.3g}"
            above.errorbar(where, llc, profile.llc_sem[row], color=color, label=label, **bars)
            for hollow in (False, True):
                chosen = decided[row] == hollow
                face = "white" if hollow else color
                above.plot(where[chosen], llc[chosen], "o", ms=5, color=color, mfc=face, zorder=3)
            below.errorbar(
                middles, slope[row], slope_sem[row], color=color, marker="o", ms=3, **bars
            )
        above.set(title="llc; hollow: decided by the localizer", xscale="log", ylabel="llc")
        if np.all(profile.llc > 0):
            above.set_yscale("log")
        above.legend()
        ticks = profile.localizations
        below.set_xticks(ticks, [f"{gamma:.3g}" for gamma in ticks])
        below.set_xticks([], minor=True)
        below.axhline(-LOCALIZER_SHARE, **GUIDE)
        below.axhline(0.0, color=FAINT, linewidth=1)
        below.set(
            title="slope between neighbours; 0 is no dependence on the localizer",
            xlabel="localization γ",
            ylabel="d log llc / d log γ",
        )
    return figure
