"""The figure of a sweep.

Llc and work against the first axis of the grid, a line for each of the other settings.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvi.cli.sweep_cells import Numbers
from fastvi.results.report.style import chain_color, styled_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG_FROM = 5.0  # a numeric axis that spans more than this factor is logarithmic
ASIDE = 0.012  # of the axis, between lines


def draw_sweep(
    results: list[tuple[dict[str, Any], Numbers]], steps: Mapping[str, int] | None = None
) -> "Figure":
    """Draw llc, ELBO and work of every run.

    Args:
        results: The place of each run in the grid, and what is shown of it.
        steps: Training step of each checkpoint, where their names tell it.
    """
    first = next(iter(results[0][0]))
    positions, labels = _positions([_on_axis(first, values, steps or {}) for values, _ in results])
    lines: dict[str, list[int]] = {}
    for place, (values, _) in enumerate(results):
        others = ", ".join(
            f"{name} {_on_axis(name, values, steps or {})}" for name in values if name != first
        )
        lines.setdefault(others or "llc", []).append(place)
    # Walks without a fit have no ELBO.
    has_fits = any(not math.isnan(numbers.elbo) for _, numbers in results)
    titles = ("llc ± sem", "work, FGE", "ELBO, nats")[: 3 if has_fits else 2]
    with styled_figure((4 * len(titles), 4), layout="constrained") as figure:
        panels = figure.subplots(1, len(titles))
        for color, (label, places) in enumerate(lines.items()):
            at = _beside(positions, color - 0.5 * (len(lines) - 1))[places]
            kept = [results[place][1] for place in places]
            style = {"color": chain_color(color), "linewidth": 1.4, "markersize": 4}
            panels[0].errorbar(
                at,
                [result.llc for result in kept],
                yerr=[result.llc_sem for result in kept],
                fmt="o-",
                capsize=3,
                label=label,
                **style,
            )
            panels[1].plot(at, [result.fge for result in kept], "o-", **style)
            if has_fits:
                panels[2].plot(at, [result.elbo for result in kept], "o-", **style)
        for axes, title in zip(panels, titles, strict=True):
            axes.set(title=title, xlabel="training step" if first == "params" and steps else first)
            _label_axis(axes, positions, labels)
        panels[1].set_ylim(bottom=0)
        panels[0].legend(loc="best")
    return figure


def _on_axis(name: str, values: Mapping[str, Any], steps: Mapping[str, int]) -> Any:
    """Return a value as the figure has it: of a checkpoint the step, if it is known."""
    return steps.get(values[name], values[name]) if name == "params" else values[name]


def _positions(values: list[Any]) -> tuple[np.ndarray, list[str] | None]:
    """Place numbers where they are, anything else side by side with labels."""
    # A bool is an int to Python, and True is no place on an axis.
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return np.asarray(values, float), None
    labels = list(dict.fromkeys(map(str, values)))
    return np.asarray([labels.index(str(value)) for value in values], float), labels


def _beside(positions: np.ndarray, place: float) -> np.ndarray:
    """Move the points of a line a little aside, so that lines that coincide are all seen."""
    if _is_logarithmic(positions):
        return positions * (positions.max() / positions.min()) ** (ASIDE * place)
    return positions + ASIDE * place * max(np.ptp(positions), 1.0)


def _is_logarithmic(positions: np.ndarray) -> bool:
    return bool(positions.min() > 0 and positions.max() > LOG_FROM * positions.min())


def _label_axis(axes: Any, positions: np.ndarray, labels: list[str] | None) -> None:
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels)
        return
    if _is_logarithmic(positions):
        axes.set_xscale("log")
    ticks = np.unique(positions)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
