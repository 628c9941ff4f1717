"""Functions of the draws that have mean zero under the posterior, taken off all that is averaged.

For any smooth P, the Laplacian of P less the inner product of its gradient with that of U = -log p
has mean zero under p (Stein's identity), whatever p is. Here P are the monomials up to a degree, in
coordinates in which the draws are round. A regression of what is averaged on these columns takes
their noise off it. Its result is linear in what is averaged, so that it is a change of the weights
of the draws: one set of weights serves every mean and every entry of every covariance.

Coefficients for the draws of some walkers are fitted on those of the others, so that they do not
know the noise that they take off.

References:
    Mira, Solgi & Imparato, Zero variance Markov chain Monte Carlo for Bayesian estimators (2013).
    Oates, Girolami & Chopin, Control functionals for Monte Carlo integration (2017).
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fastvi._typing import Float, Int

# Groups of walkers, each of which takes the coefficients that the others fit. At half, a fit has
# two thirds of the draws; at double, one has a sixth more, for twice the work.
FOLDS = 4
# Added to the variance of each column, relative to it. Without it, 454 columns on 6,400 draws of a
# tanh network leave a fifth more variance; at three times, a column that explains everything leaves
# 5 % in place of 1 %.
RIDGE = 0.1
# Columns at most, and over the number of draws. Half of either leaves out cubic terms in 10
# dimensions, double takes four times as long to fit.
MOST_COLUMNS, COLUMN_SHARE = 512, 0.1
MOST_DEGREE = 4  # of the monomials: products of two quadratic losses; 3 leaves out their tails
# Traces that choose the columns, and the directions of many dimensions that these are of. Half sees
# fewer directions, double takes four times as long for the products of all pairs.
MOST_TRACES = 32
# Part of the variance that columns must take off to be used: the choice of the best of a few is
# lucky by some per cent. Half uses columns that only seem to help.
LEAST_GAIN = 0.1
# Blocks, at most, where each has weights for all draws, so that a covariance takes a product of
# whole matrices for each. Half of the most tell an error to 18 % in place of 13, double takes twice
# as long.
LEAST_MERGED, MOST_MERGED = 16, 32
# Added to variances of about one: half or double of it keeps directions apart that nearly coincide.
ROUNDING = 1e-6


class Columns(NamedTuple):
    """Which columns: of monomials up to a degree in so many directions."""

    directions: int
    degree: int

    @property
    def number(self) -> int:
        """Count them."""
        return math.comb(self.directions + self.degree, self.degree) - 1


def stein_columns(
    position: Float[np.ndarray, "draws directions"],
    slope: Float[np.ndarray, "draws directions"],
    degree: int,
) -> Float[np.ndarray, "draws columns"]:
    """Return the Laplacian of P less grad P . grad U at each draw, for each monomial P.

    Args:
        position: The draws.
        slope: Gradient of U there, in the same coordinates; an unbiased estimate will do.
        degree: The largest degree of a monomial.

    Cost:
        The square of the degree operations for each draw and column.
    """
    powers = position[:, :, None] ** np.arange(degree + 1)
    columns = []
    for exponents in _monomials(position.shape[1], degree):
        axes = np.flatnonzero(exponents)
        column = np.zeros(len(position))
        for axis in axes:
            others = axes[axes != axis]
            rest = np.prod(powers[:, others, exponents[others]], axis=1)
            times = exponents[axis]
            column -= times * powers[:, axis, times - 1] * rest * slope[:, axis]
            if times > 1:
                column += times * (times - 1) * powers[:, axis, times - 2] * rest
        columns.append(column)
    return np.stack(columns, axis=1)


def _monomials(directions: int, degree: int) -> Iterator[Int[np.ndarray, " directions"]]:
    """Yield the exponents of all monomials of a degree of at least one."""
    for total in range(1, degree + 1):
        for axes in itertools.combinations_with_replacement(range(directions), total):
            yield np.bincount(axes, minlength=directions)


def plain_weights(walkers: int, draws: int, blocks: int) -> Float[np.ndarray, "blocks draws"]:
    """Return weights of which each row averages over the draws of a block.

    Args:
        walkers: Number of walkers.
        draws: Draws of each.
        blocks: Blocks of each, of one length; the first draws that do not fit are left out.
    """
    length = draws // blocks
    of_walker = np.zeros((blocks, draws))
    for block in range(blocks):
        first = draws - (blocks - block) * length
        of_walker[block, first : first + length] = 1 / length
    return np.kron(np.eye(walkers), of_walker)


def adjusted_weights(
    plain: Float[np.ndarray, "blocks draws"],
    columns: Float[np.ndarray, "draws columns"],
    walkers: int,
) -> Float[np.ndarray, "blocks draws"]:
    """Return weights with which each block has the columns taken off, as the other folds fit them.

    Args:
        plain: From `plain_weights`.
        columns: Functions of mean zero at the draws.
        walkers: Number of walkers.

    Returns:
        Weights that sum to one in each row. A row has weights for draws outside of its block: they
        are the coefficients.
    """
    scale = columns.std(axis=0)
    columns = (columns / np.where(scale > 0, scale, 1.0)).astype(np.float32)
    rows = np.array_split(np.arange(len(plain)).reshape(walkers, -1), min(FOLDS, walkers))
    folds = [
        _Fold(plain, columns, fold.ravel(), draws)
        for fold, draws in zip(
            rows,
            np.array_split(np.arange(len(columns)).reshape(walkers, -1), len(rows)),
            strict=True,
        )
    ]
    adjusted = plain.copy()
    for fold in folds:
        others = [other for other in folds if other is not fold]
        count = sum(other.count for other in others)
        mean = sum(other.total for other in others) / count
        square = sum(other.square for other in others) / count - np.outer(mean, mean)
        square[np.diag_indices_from(square)] += RIDGE
        coefficients = np.linalg.solve(square, fold.seen.T) / count
        for other in others:
            adjusted[np.ix_(fold.rows, other.used)] -= (
                columns[other.used] @ coefficients - mean @ coefficients
            ).T
    return adjusted


class _Fold:
    """Walkers whose draws fit coefficients for the others: sums over their draws.

    Attributes:
        rows: Their blocks.
        used: Their draws that are in a block.
        count: How many these are.
        total: Sum of the columns over them.
        square: Sum of products of the columns.
        seen: What each block says of the columns.
    """

    def __init__(self, plain: np.ndarray, columns: np.ndarray, rows: np.ndarray, draws: np.ndarray):
        draws = draws.ravel()
        self.rows = rows
        self.used = draws[plain[np.ix_(rows, draws)].any(axis=0)]
        fitted = columns[self.used]
        self.count = len(fitted)
        self.total = fitted.sum(axis=0, dtype=float)
        self.square = (fitted.T @ fitted).astype(float)
        self.seen = plain[np.ix_(rows, draws)] @ columns[draws]


def _merged(weights: Float[np.ndarray, "blocks draws"]) -> Float[np.ndarray, "merged draws"]:
    """Make fewer blocks of neighbouring ones, where they can be parted evenly."""
    rows = len(weights)
    fewer = [count for count in range(LEAST_MERGED, MOST_MERGED + 1) if rows % count == 0]
    if rows <= MOST_MERGED or not fewer:
        return weights
    return weights.reshape(fewer[-1], -1, weights.shape[1]).mean(axis=1)


def choose_weights(
    displacement: Float[np.ndarray, "draws dim"],
    slope: Float[np.ndarray, "draws dim"],
    traces: Float[np.ndarray, "draws traces"],
    plain: Float[np.ndarray, "blocks draws"],
    walkers: int,
) -> tuple[Float[np.ndarray, "merged draws"], Columns | None]:
    """Return the weights that take most off the variance of the traces and of their products.

    Args:
        displacement: The draws.
        slope: Gradient of U at each.
        traces: Quantities of the kind that will be averaged.
        plain: Weights without columns.
        walkers: Number of walkers.

    Returns:
        The weights, and of which columns they are; the plain ones and None where none help.
    """
    if walkers < 2:  # nobody else's draws to fit coefficients on
        return plain, None
    traces = traces - traces.mean(axis=0)
    kept = traces.std(axis=0)
    traces = traces[:, kept > 0] / kept[kept > 0]
    one, other = np.triu_indices(traces.shape[1])
    targets = np.concatenate([traces, traces[:, one] * traces[:, other]], axis=1)
    position, slope = _round(displacement, slope, traces)
    before = np.var(plain @ targets, axis=0)
    best, weights, chosen = 1 - LEAST_GAIN, plain, None
    for candidate in _candidates(*position.shape):
        some = slice(candidate.directions)
        columns = stein_columns(position[:, some], slope[:, some], candidate.degree)
        found = adjusted_weights(plain, columns, walkers)
        # of the logarithms, so that no entry that is nearly explained outweighs the others
        left = float(np.exp(np.mean(np.log(np.var(found @ targets, axis=0) / before))))
        if left < best:
            best, weights, chosen = left, found, candidate
    return (weights if chosen is None else _merged(weights)), chosen


def _candidates(draws: int, directions: int) -> Iterator[Columns]:
    """Yield the columns of each degree, in as many directions as the draws can fit."""
    most = min(MOST_COLUMNS, int(COLUMN_SHARE * draws))
    for degree in range(1, MOST_DEGREE + 1):
        fitting = (
            Columns(count, degree)
            for count in range(directions, 0, -1)
            if Columns(count, degree).number <= most
        )
        yield from itertools.islice(fitting, 1)


def _round(
    displacement: Float[np.ndarray, "draws dim"],
    slope: Float[np.ndarray, "draws dim"],
    traces: Float[np.ndarray, "draws traces"],
) -> tuple[Float[np.ndarray, "draws directions"], Float[np.ndarray, "draws directions"]]:
    """Turn draws and slopes to coordinates of unit covariance, those that the traces see first.

    Of more dimensions than traces only the directions are kept along which the traces move.
    """
    center = displacement.mean(axis=0)
    spread = displacement.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    position, slope = (displacement - center) / spread, slope * spread
    seen = np.linalg.svd(traces.T @ position, full_matrices=position.shape[1] <= traces.shape[1])[2]
    position, slope = position @ seen.T, slope @ seen.T
    covariance = position.T @ position / len(position)
    covariance[np.diag_indices_from(covariance)] += ROUNDING
    # triangular, so that the first directions span the same as before
    lower = np.linalg.cholesky(covariance)
    return np.linalg.solve(lower, position.T).T, slope @ lower
