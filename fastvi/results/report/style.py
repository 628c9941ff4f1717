"""How figures look, and the drawing of several chains that panels share."""

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvi._optional import import_optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow: told apart in most kinds of colour blindness.
CHAIN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT, GRID = "#222222", "#777777", "#e8e8e8"
# The look of a line that values are held against.
GUIDE: dict[str, Any] = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3))}
RAW_ALPHA = 0.18  # opacity of single steps, behind the mean that is read
# Windows of the running mean in a run: half hides a turn near the end, double shows noise.
NUM_WINDOWS = 25
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,  # a value is read off the axis, without a sum
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.5,
}


def import_matplotlib() -> Any:
    """Import matplotlib, or raise MissingExtraError with the fix."""
    return import_optional(
        "matplotlib", extra="plots", distribution="matplotlib", purpose="plotting"
    )


@contextlib.contextmanager
def styled_figure(size: tuple[float, float], **options: Any) -> "Iterator[Figure]":
    """Make a figure that no window manager knows of, to draw on inside the block.

    Args:
        size: Width and height in inches.
        **options: Further arguments of matplotlib's `Figure`.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    matplotlib = import_matplotlib()
    # `Figure` itself, not pyplot: that would keep every figure and may ask for a display.
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=size, facecolor="white", **options)


def as_png(figure: "Figure", dpi: int) -> bytes:
    """Return a figure as the bytes of an image."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def chain_color(chain: int) -> str:
    """Return the colour of a chain; they repeat."""
    return CHAIN_COLORS[chain % len(CHAIN_COLORS)]


def window_of(steps: int) -> int:
    """Return the length of the running mean of a run."""
    return max(1, steps // NUM_WINDOWS)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Average rows over a window; shape (chains, steps - window + 1)."""
    return np.stack([np.convolve(row, np.full(window, 1 / window), mode="valid") for row in values])


def draw_chains(
    axes: "Axes",
    values: np.ndarray,
    *,
    where: np.ndarray | None = None,
    label_chains: bool = False,
    band: bool = False,
) -> np.ndarray:
    """Draw every chain faintly and its running mean, which is returned.

    Args:
        axes: Where to draw.
        values: One row for each chain.
        where: Positions along the x axis; the index of the step when left out.
        label_chains: Whether the legend names the chains.
        band: Whether to show the noise as a band of one running standard deviation, in place of the
            single steps.
    """
    steps = values.shape[1]
    where = np.arange(steps) if where is None else where
    window = window_of(steps)
    means = running_mean(values, window)
    # Rounding can leave a variance below zero where the steps are alike.
    spread = np.sqrt(np.maximum(running_mean(values**2, window) - means**2, 0)) if band else None
    centers = running_mean(where[None, :].astype(float), window)[0]
    for chain, (row, mean) in enumerate(zip(values, means, strict=True)):
        color = chain_color(chain)
        # A label for each colour: beyond them one would stand for several chains.
        label = f"chain {chain}" if label_chains and chain < len(CHAIN_COLORS) else None
        if spread is None:
            # Rasterized: thousands of segments would make a vector file slow to show.
            axes.plot(
                where, row, color=color, alpha=RAW_ALPHA, linewidth=0.6, zorder=1, rasterized=True
            )
        else:
            low, high = mean - spread[chain], mean + spread[chain]
            axes.fill_between(
                centers, low, high, color=color, alpha=0.6 * RAW_ALPHA, linewidth=0, zorder=1
            )
        axes.plot(centers, mean, color=color, linewidth=1.6, zorder=2.5, label=label)
    # matplotlib raises on limits that are not finite, as work is after a fit that diverged.
    if np.all(np.isfinite(where[[0, -1]])):
        # A run of one step has both limits at one place, of which matplotlib warns.
        axes.set_xlim(where[0], max(where[-1], where[0] + 1e-9))
    return means


def set_limits(
    axes: "Axes", values: np.ndarray, means: np.ndarray, include: tuple[float, ...]
) -> None:
    """Show the bulk of the later single steps, all but the start of the means, and `include`."""
    shown = [value for value in include if np.isfinite(value)]
    for rows in (values[:, values.shape[1] // 2 :], means[:, means.shape[1] // 10 :]):
        finite = rows[np.isfinite(rows)]
        if finite.size:
            # Percentiles: one wild step of a hundred does not flatten the others.
            shown += np.percentile(finite, [1, 99]).tolist()
    if not shown:
        return
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.5  # matplotlib warns of limits that are equal
    axes.set_ylim(low - margin, high + margin)
