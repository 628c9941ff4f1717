"""Figures of draws of the posterior: do walkers agree, and which examples go together."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Float, Int
from fastvi.observables.covariance import Estimate
from fastvi.observables.posterior import PosteriorDraws
from fastvi.results.report.style import FAINT, GUIDE, chain_color, styled_figure, window_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANK_BINS = 20  # of each walker's histogram: half hides a trend, double is noise
SHOWN_WALKERS = 12  # whose ranks are drawn each; of more, only the largest and the smallest
LARGEST_SHOWN = 99.0  # percentile of an influence matrix at which its colours end


def plot_draws(draws: PosteriorDraws) -> "Figure":
    """Draw traces and ranks of walkers.

    Walkers that sample the same posterior have ranks that are uniform: a histogram that lies off
    the dashed line, by more than its neighbours do, is of one that has stayed somewhere (Vehtari et
    al., 2021).

    Args:
        draws: From `fastvi.sample_posterior`.

    Returns:
        A figure that no window manager knows of.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with styled_figure((11, 4.2), layout="constrained") as figure:
        trace, ranked = figure.subplots(1, 2)
        window = window_of(draws.num_draws)
        for walker, llc in enumerate(draws.llc[:SHOWN_WALKERS]):
            smooth = np.convolve(llc, np.ones(window) / window, "valid")
            trace.plot(
                np.arange(smooth.size) + window // 2, smooth, color=chain_color(walker), lw=1
            )
        mean = float(draws.llc_estimate.value)
        trace.axhline(mean, **GUIDE)
        trace.set(
            title=f"n β (L - L(w*)), running means of {window} draws; dashed: {mean:.4g}",
            xlabel="draw",
        )
        counts = rank_counts(draws.llc)
        expected = draws.num_draws / counts.shape[1]
        middles = np.arange(counts.shape[1]) + 0.5
        for walker, count in enumerate(counts[:SHOWN_WALKERS]):
            ranked.step(middles, count / expected, where="mid", color=chain_color(walker), lw=1)
        if len(counts) > SHOWN_WALKERS:
            low, high = counts.min(axis=0) / expected, counts.max(axis=0) / expected
            ranked.fill_between(middles, low, high, color=FAINT, alpha=0.2, step="mid", lw=0)
        ranked.axhline(1.0, **GUIDE)
        ranked.set(title="ranks of each walker's draws, 1 where uniform", xlabel="rank, in bins")
        ranked.set_ylim(bottom=0)
    return figure


def plot_influence(influence: Estimate) -> "Figure":
    """Draw a matrix of influences among examples, like ones side by side.

    Examples are ordered by average-linkage clustering of the correlations of their losses, so that
    blocks on the diagonal are examples that the posterior learns together.

    Args:
        influence: Of a data set on itself, from `PosteriorDraws.influence`.

    Returns:
        A figure that no window manager knows of.

    Raises:
        DataError: If the matrix is not square.
        MissingExtraError: If matplotlib is not installed.
    """
    matrix = influence.value
    order = order_by_cluster(matrix)
    limit = float(np.percentile(np.abs(matrix), LARGEST_SHOWN)) or 1.0
    clear = float(np.mean(np.abs(matrix) > 2 * influence.sem))
    with styled_figure((6.4, 5.6), layout="constrained") as figure:
        axes = figure.subplots()
        image = axes.imshow(
            matrix[np.ix_(order, order)],
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
        )
        axes.grid(visible=False)
        axes.set(
            title=f"{100 * clear:.0f} % of the influences are beyond two errors",
            xlabel="example whose loss responds, by cluster",
            ylabel="example whose weight grows",
        )
        figure.colorbar(image, ax=axes, label="nats for a weight of one")
    return figure


def plot_susceptibilities(
    susceptibilities: Mapping[str, Sequence[Estimate]],
    steps: Sequence[float] | None = None,
    label: str = "checkpoint",
) -> "Figure":
    """Draw susceptibilities along training, with bands of two errors.

    Args:
        susceptibilities: By name, one estimate for each checkpoint, from
            `PosteriorDraws.susceptibility`: a number, or an array whose entries are drawn each.
        steps: Where the checkpoints are; 0, 1, 2 and so on when left out.
        label: What `steps` are of.

    Returns:
        A figure that no window manager knows of.

    Raises:
        DataError: If there is none, or they are of another number than the steps.
        MissingExtraError: If matplotlib is not installed.
    """
    counts = {len(along) for along in susceptibilities.values()}
    count = len(steps) if steps is not None else max(counts, default=0)
    if not count or counts != {count}:
        raise DataError(
            "susceptibilities must hold one estimate for each checkpoint; got "
            f"{sorted(counts) or 'none'} for {count} checkpoints."
        )
    where = np.arange(count) if steps is None else np.asarray(steps, float)
    with styled_figure((7, 4.2), layout="constrained") as figure:
        axes = figure.subplots()
        for number, (name, along) in enumerate(susceptibilities.items()):
            value, sem = (
                np.stack([np.ravel(getattr(one, part)) for one in along], axis=1)
                for part in ("value", "sem")
            )
            color = chain_color(number)
            for entry, (line, error) in enumerate(zip(value, sem, strict=True)):
                axes.plot(where, line, color=color, lw=1.2, label=name if entry == 0 else None)
                axes.fill_between(
                    where, line - 2 * error, line + 2 * error, color=color, alpha=0.15, lw=0
                )
        axes.axhline(0.0, **GUIDE)
        axes.set(title="susceptibilities, bands of two errors", xlabel=label)
        axes.legend(frameon=False)
    return figure


def rank_counts(llc: Float[np.ndarray, "walkers draws"]) -> Int[np.ndarray, "walkers bins"]:
    """Count each walker's draws by the rank that they have among those of all walkers."""
    ranks = np.argsort(np.argsort(llc.ravel())).reshape(llc.shape)
    bins = min(RANK_BINS, llc.shape[1])
    bin_of = ranks * bins // llc.size
    return np.stack([np.bincount(row, minlength=bins) for row in bin_of])


def order_by_cluster(matrix: Float[np.ndarray, "rows columns"]) -> Int[np.ndarray, " rows"]:
    """Return the rows in an order that has like ones side by side.

    Raises:
        DataError: If the matrix is not square.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise DataError(
            f"influence must be of a data set on itself, a square matrix; got {matrix.shape}."
        )
    if len(matrix) < 3:
        return np.arange(len(matrix))
    # jax depends on scipy
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    scale = np.sqrt(np.maximum(np.abs(np.diag(matrix)), np.finfo(float).tiny))
    # influences are covariances times a negative number
    distance = 1 + (matrix + matrix.T) / 2 / np.outer(scale, scale)
    np.fill_diagonal(distance, 0.0)
    joined = linkage(squareform(np.clip(distance, 0.0, 2.0), checks=False), "average")
    return leaves_list(joined).astype(int)
