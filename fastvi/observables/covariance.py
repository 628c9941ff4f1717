"""Means and covariances over walkers, with errors from blocks of their draws.

Draws of a walker depend on each other. They are cut into *blocks* of consecutive draws, long beside
the time that walkers remember. Blocks of all walkers are taken for independent: the spread of what
each says is the error, for every entry of a matrix at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastvi._typing import Float
from fastvi.sampling.averages import STUDENT

# Draws of a block over the integrated autocorrelation time of the slowest trace that is known. At
# half, errors are 5 % too small; at double, half as many blocks tell them.
BLOCK_TIMES = 10.0
# Blocks of all walkers, at most: as many tell an error to 9 %. Half tells it to 13 %, double costs
# twice as many small products of matrices.
MOST_BLOCKS = 64
# Entries of a covariance that are formed at once: some six arrays of 32 MiB are. Half takes half of
# that, double is no faster.
MOST_ENTRIES = 2**22


class Estimate(NamedTuple):
    """A number, or an array of them, with the standard error of each."""

    value: np.ndarray
    sem: np.ndarray


def blocks_per_walker(walkers: int, draws: int, time: float) -> int:
    """Return into how many blocks the draws of each walker are cut, at least one."""
    most = max(1, MOST_BLOCKS // walkers)
    return int(np.clip(draws / (BLOCK_TIMES * time), 1, most))


def cut(values: Float[np.ndarray, "walkers draws *rest"], count: int) -> np.ndarray:
    """Cut the draws of each walker into blocks of one length; the first that do not fit are left.

    Returns:
        Of shape (blocks of all walkers, draws of a block, ...).
    """
    walkers, draws = values.shape[:2]
    length = draws // count
    kept = values[:, draws - count * length :]
    return kept.reshape(walkers * count, length, *values.shape[2:])


def mean_of(blocks: Float[np.ndarray, "blocks draws *rest"]) -> Estimate:
    """Return the mean of draws."""
    means = np.asarray(blocks, float).mean(axis=1)
    error = _error(np.var(means, axis=0, ddof=1), len(means))
    return Estimate(np.asarray(means.mean(axis=0)), error)


def covariance_of(
    one: Float[np.ndarray, "blocks draws rows"], other: Float[np.ndarray, "blocks draws columns"]
) -> Estimate:
    """Return the covariance of every entry of one with every entry of the other.

    The mean of the draws is taken for that of the posterior, which lowers a covariance by that of
    the two means: it is added.

    Returns:
        Arrays of shape (rows, columns).
    """
    count = one.shape[0]
    one, other = (np.asarray(part, float) for part in (one, other))
    one, other = (part - part.mean(axis=(0, 1)) for part in (one, other))
    means = one.mean(axis=1), other.mean(axis=1)
    value = np.empty((one.shape[2], other.shape[2]))
    sem = np.empty_like(value)
    step = max(1, MOST_ENTRIES // max(1, other.shape[2]))
    for start in range(0, one.shape[2], step):
        rows = slice(start, start + step)
        total, squares = 0.0, 0.0
        # a first guess is taken off, as sums of squares of what varies little cancel
        guess = one[0, :, rows].T @ other[0] / one.shape[1]
        for part, counterpart in zip(one, other, strict=True):
            product = part[:, rows].T @ counterpart / part.shape[0] - guess
            total, squares = total + product, squares + product**2
        mean = total / count
        of_means = means[0][:, rows].T @ means[1] / (count * (count - 1))
        value[rows] = guess + mean + of_means
        sem[rows] = _error((squares / count - mean**2) * count / (count - 1), count)
    return Estimate(value, sem)


def jackknifed(
    statistic: Callable[..., float], *blocks: Float[np.ndarray, "blocks draws"]
) -> Estimate:
    """Return a statistic of several traces, and its error by leaving out each block in turn."""
    count = blocks[0].shape[0]
    arrays = [np.asarray(part, float) for part in blocks]
    whole = statistic(*(part.ravel() for part in arrays))
    without = np.array(
        [
            statistic(*(np.delete(part, one, axis=0).ravel() for part in arrays))
            for one in range(count)
        ]
    )
    variance = (count - 1) * np.mean((without - without.mean()) ** 2)
    # the statistic's own bias is of the order of one over the draws, and taken off with it
    value = count * whole - (count - 1) * without.mean()
    return Estimate(np.asarray(value), _error(variance * count, count))


def correlation_of(
    one: Float[np.ndarray, "blocks draws rows"], other: Float[np.ndarray, "blocks draws columns"]
) -> Estimate:
    """Return the correlation of every entry of one with every entry of the other.

    With r = c_ij / sqrt(c_ii c_jj) and x, y the entries over their standard deviations, a block
    moves r by the mean of x y - r (x^2 + y^2) / 2 over its draws, to first order. The spread of
    that over blocks is the error.

    Returns:
        Arrays of shape (rows, columns); NaN where an entry does not vary.
    """
    one, other = _standardised(one), _standardised(other)
    squares = [np.mean(part**2, axis=1) for part in (one, other)]
    value = np.empty((one.shape[2], other.shape[2]))
    sem = np.empty_like(value)
    step = max(1, MOST_ENTRIES // max(1, other.shape[2]))
    for start in range(0, one.shape[2], step):
        rows = slice(start, start + step)
        columns = squares[0][:, rows], squares[1]
        value[rows], sem[rows] = _correlation_rows(one[:, :, rows], other, *columns)
    return Estimate(value, sem)


def _standardised(values: Float[np.ndarray, "blocks draws entries"]) -> np.ndarray:
    values = np.asarray(values, float)
    values = values - values.mean(axis=(0, 1))
    with np.errstate(invalid="ignore"):
        return values / np.sqrt(np.mean(values**2, axis=(0, 1)))


def _correlation_rows(
    one: np.ndarray, other: np.ndarray, squares: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    count, draws = one.shape[:2]
    value = np.tensordot(one, other, axes=((0, 1), (0, 1))) / (count * draws)
    total = np.zeros_like(value)
    for part, counterpart, of_one, of_other in zip(one, other, squares, others, strict=True):
        moved = part.T @ counterpart / draws
        moved -= value * (0.5 * (of_one[:, None] + of_other))
        total += moved**2
    # these have mean zero over all blocks
    return value, _error(total / (count - 1), count)


def _error(variance: Any, count: int) -> np.ndarray:
    """Return the error of a mean of so many blocks of this variance, wider where they are few."""
    return np.asarray(np.sqrt(np.maximum(variance, 0.0) / count) * (1 + STUDENT / (count - 1)))
