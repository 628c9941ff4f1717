"""Figures inside a page: SVG in the page's own colours, whose points say their values."""

import html
import io
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvi._optional import MissingExtraError
from fastvi.results.report.style import GRID, INK, import_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of a line that say their values. Half leaves gaps of a finger's width, double overlaps.
MOST_POINTS = 48
# Points from which on a line is an image: as vectors it would be larger than one.
MOST_VECTORS = 2000
POINT_RADIUS = 4.5  # in points, where a pointer finds it
POINTS_PER_INCH = 72
# Colours that follow the page, which may be light or dark.
OF_THE_PAGE = {INK: "currentColor", GRID: "var(--grid, #8884)", "#ffffff": "var(--page, none)"}


def inline_svg(figure: "Figure", label: str) -> str:
    """Return a figure as an element of a page.

    Args:
        figure: The figure, which is used up.
        label: What it shows, for those who do not see it.
    """
    matplotlib = import_matplotlib()
    figure.set_dpi(POINTS_PER_INCH)  # that of the backend, so that places are those of the file
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        for line in axes.lines:
            line.set_rasterized(np.size(line.get_xdata()) > MOST_VECTORS)
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the same bytes at every time
    with matplotlib.rc_context({"svg.hashsalt": "fastvi", "svg.image_inline": True}):
        figure.savefig(stream, format="svg", dpi=2 * POINTS_PER_INCH, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # a page needs neither namespaces nor where they come from
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    # the page says how wide it is
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for color, own in OF_THE_PAGE.items():
        text = text.replace(f": {color}", f": {own}")
    points = "".join(_points(figure))
    role = f'<svg role="img" aria-label="{html.escape(label)}" '
    return text.replace("<svg ", role, 1).replace("</svg>", f"{points}</svg>")


def svg_where_possible(plot: "Callable[[], Figure]", label: str) -> str:
    """Return the SVG of what `plot` draws; nothing where matplotlib is not installed."""
    try:
        return inline_svg(plot(), label)
    except MissingExtraError:
        return ""


def _points(figure: "Figure") -> Iterator[str]:
    """Return a spot over each value, which says it where a pointer rests."""
    height = figure.get_size_inches()[1] * POINTS_PER_INCH
    for axes in figure.axes:
        for label, x, y in _values(axes):
            inside = axes.transData.transform(np.column_stack([x, y]))
            shown = axes.bbox.padded(1)
            for place, one, other in zip(inside, x, y, strict=True):
                if np.all(np.isfinite(place)) and shown.contains(*place):
                    said = f"{_name(axes.get_xlabel(), 'x')} {one:.4g}: {label} {other:.4g}"
                    yield (
                        f'<circle class="value" cx="{place[0]:.1f}" cy="{height - place[1]:.1f}" '
                        f'r="{POINT_RADIUS}" fill="transparent"><title>{html.escape(said)}</title>'
                        "</circle>"
                    )


def _values(axes: "Axes") -> Iterator[tuple[str, Any, Any]]:
    """Return the values of lines, of scattered points and of bars, each with a name."""
    name = _name(axes.get_ylabel() or axes.get_title(loc="left"), "y")
    for line in axes.lines:
        if line.get_transform().contains_branch(axes.transData) and line.get_visible():
            x, y = (np.asarray(values, float) for values in line.get_data(orig=False))
            if x.size > 1:
                own = str(line.get_label())
                label = name if own.startswith("_") else f"{own}, {name}"
                some = np.unique(np.linspace(0, x.size - 1, MOST_POINTS).round().astype(int))
                yield label, x[some], y[some]
    for scattered in axes.collections:
        offsets = np.asarray(scattered.get_offsets(), float)
        if type(scattered).__name__ == "PathCollection" and 0 < len(offsets) <= MOST_VECTORS:
            yield name, offsets[:, 0], offsets[:, 1]
    for bars in axes.containers:
        if type(bars).__name__ == "BarContainer":
            boxes = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars]
            if boxes:
                yield name, *np.asarray(boxes, float).T


def _name(said: str, other: str) -> str:
    """Return a label without what matplotlib reads as mathematics."""
    return re.sub(r"[$\\{}]", "", said).strip() or other
