"""Figures of pages: SVG in the colours of the page, whose points say their values."""

import re
import sys

import numpy as np
import pytest

from fastvi.results.report.style import styled_figure
from fastvi.results.report.svg import MOST_POINTS, MOST_VECTORS, inline_svg, svg_where_possible

POINT = re.compile(r'<circle class="value" cx="(.*?)" cy="(.*?)" .*?<title>(.*?)</title>')


def drawn(draw, size=(4.0, 3.0)):
    with styled_figure(size) as figure:
        axes = figure.subplots()
        draw(axes)
        return inline_svg(figure, "a & b"), axes


def test_points_lie_on_their_line_and_say_its_values():
    x = np.linspace(0, 3, 7)

    def draw(axes):
        axes.plot(x, x**2, label="square", color="#123456")
        axes.set(xlabel="step", ylabel="llc $x$", xlim=(0, 3), ylim=(0, 9))

    page, axes = drawn(draw)
    points = POINT.findall(page)
    assert [said for _, _, said in points] == [f"step {v:.4g}: square, llc x {v**2:.4g}" for v in x]
    # matplotlib's own path has the same places
    path = re.search(r'<path d="([^"]*)"[^>]*stroke: #123456', page)[1]
    own = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float)
    np.testing.assert_allclose(np.array([p[:2] for p in points], float), own, atol=0.06)


def test_colours_are_those_of_the_page():
    page, _ = drawn(lambda axes: axes.set(title="t", xlabel="x", ylabel="y"))
    assert page.startswith('<svg role="img" aria-label="a &amp; b" ')
    assert "#222222" not in page
    assert "currentColor" in page
    assert "var(--grid" in page
    assert " id=" not in page.split("<defs>")[0]


def test_bars_scattered_points_and_long_lines():
    page, _ = drawn(lambda axes: axes.bar([1, 2], [3, 4]))
    assert [said for *_, said in POINT.findall(page)] == ["x 1: y 3", "x 2: y 4"]
    page, _ = drawn(lambda axes: axes.scatter([1, 2], [3, 4]))
    assert [said for *_, said in POINT.findall(page)] == ["x 1: y 3", "x 2: y 4"]
    long = np.arange(10.0 * MOST_VECTORS)
    page, _ = drawn(lambda axes: axes.plot(long, np.sin(long)))
    assert "data:image/png;base64" in page
    assert len(page) < 300_000
    assert 0 < len(POINT.findall(page)) <= MOST_POINTS
    # guides have no values of their own, nor has what lies outside
    page, _ = drawn(lambda axes: (axes.axhline(1.0), axes.plot([0, 1], [np.nan, 2])))
    assert len(POINT.findall(page)) == 1


def test_the_same_figure_has_the_same_bytes():
    assert drawn(lambda axes: axes.plot([1, 2]))[0] == drawn(lambda axes: axes.plot([1, 2]))[0]


def test_notebooks_without_matplotlib_have_words_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    def plot():
        with styled_figure((1, 1)) as figure:
            return figure

    assert svg_where_possible(plot, "x") == ""


@pytest.mark.parametrize("name", ["x", "y"])
def test_labels_are_escaped(name):
    page, _ = drawn(lambda axes: axes.set(**{f"{name}label": "<b>"}) and axes.plot([1, 2]))
    assert "<b>" not in page
