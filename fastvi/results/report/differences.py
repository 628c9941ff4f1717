"""The figure of several estimates: llc of each, and below the differences from one to the next."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvi._typing import Float
from fastvi.observables.covariance import Estimate
from fastvi.results.report.style import CHAIN_COLORS, GUIDE, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Last place over the first from which on an axis is logarithmic. At a third a linear one still
# shows all; at three times the first half of the places would be one.
LOGARITHMIC = 30.0


def plot_differences(
    llc: Float[np.ndarray, " estimates"],
    llc_sem: Float[np.ndarray, " estimates"],
    differences: Sequence[Any],
    *,
    where: Float[np.ndarray, " estimates"] | None = None,
    names: Sequence[str] | None = None,
    label: str = "",
    beside: Mapping[str, Estimate] = MappingProxyType({}),
) -> "Figure":
    """Draw llc with errors, and below each estimate's less the one's before.

    Hollow marks are differences whose two errors were added as if independent.

    Args:
        llc: Of each estimate.
        llc_sem: Its standard error.
        differences: `LLCDifference` from each estimate to the next.
        where: Positions along the x axis; 0, 1, ... when left out.
        names: What is written at these positions; the numbers themselves when left out.
        label: Of the x axis.
        beside: What is drawn beside llc, by name.

    Returns:
        A figure that no window manager knows of.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    where = np.arange(len(llc), dtype=float) if where is None else where
    bars = {"capsize": 2, "linewidth": 1.4, "color": CHAIN_COLORS[0]}
    with styled_figure((6.6, 5.2), layout="constrained") as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        above.errorbar(where, llc, llc_sem, marker="o", ms=4, **bars)
        above.set(title="llc", ylabel="llc")
        for number, (name, part) in enumerate(beside.items(), 1):
            style = {**bars, "color": CHAIN_COLORS[number], "linestyle": "--"}
            above.errorbar(where, part.value, part.sem, marker="s", ms=3, label=name, **style)
        if beside:
            above.legend(frameon=False)
        for place, one in zip(where[1:], differences, strict=True):
            face = CHAIN_COLORS[0] if one.paired else "white"
            below.errorbar(place, one.value, one.sem, marker="o", ms=5, mfc=face, **bars)
        below.axhline(0.0, **GUIDE)
        below.set(
            title="difference from the one before; hollow: errors as if independent",
            xlabel=label,
            ylabel="difference of llc",
        )
        # steps of training are mostly as far apart as they are long
        if where[0] > 0 and where[-1] > LOGARITHMIC * where[0]:
            below.set_xscale("log")
        if names is not None:
            below.set_xticks(where, names)
    return figure
