"""Means and covariances over walkers, with errors from blocks of their draws.

Draws of a walker depend on each other. They are cut into *blocks* of consecutive draws, long beside
the time that walkers remember. Blocks of all walkers are taken for independent: the spread of what
each says is the error, for every entry of a matrix at once. What a block says is a weighted mean of
draws: of its own with equal weights, or of all where control variates are taken off.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastvi._numbers import with_error
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

    def __str__(self) -> str:
        """Format for a terminal."""
        if np.size(self.value) == 1:
            return with_error(float(np.ravel(self.value)[0]), float(np.ravel(self.sem)[0]))
        return f"{self.value}\n± {self.sem}"


def blocks_per_walker(walkers: int, draws: int, time: float) -> int:
    """Return into how many blocks the draws of each walker are cut, two at least of a lone one."""
    least, most = (2 if walkers == 1 else 1), max(1, MOST_BLOCKS // walkers)
    return int(np.clip(draws / (BLOCK_TIMES * time), least, most))


def mean_of(
    weights: Float[np.ndarray, "blocks draws"], values: Float[np.ndarray, "draws ..."]
) -> Estimate:
    """Return the mean of draws.

    Args:
        weights: Of the draws in what each block says, from `fastvi.observables.control_variates`.
        values: What is averaged.
    """
    values = np.asarray(values)
    # about the mean, as single precision has few digits and weights of both signs lose some
    center = values.mean(axis=0, dtype=float)
    about = (values - center).reshape(len(values), -1)
    means = (weights @ about).reshape(len(weights), *values.shape[1:])
    error = _error(np.var(means, axis=0) * len(means) / max(len(means) - 1, 1), len(means))
    return Estimate(np.asarray(center + means.mean(axis=0)), error)


def covariance_of(
    weights: Float[np.ndarray, "blocks draws"],
    one: Float[np.ndarray, "draws rows"],
    other: Float[np.ndarray, "draws columns"],
) -> Estimate:
    """Return the covariance of every entry of one with every entry of the other.

    The mean of the draws is taken for that of the posterior, which lowers a covariance by that of
    the two means: it is added.

    Args:
        weights: Of the draws in what each block says, from `fastvi.observables.control_variates`.
        one: What varies.
        other: With what.

    Returns:
        Arrays of shape (rows, columns).

    Cost:
        A product of matrices for each block, of the draws that have a weight in it.
    """
    one, other = (np.asarray(part, float) for part in (one, other))
    one, other = (part - part.mean(axis=0) for part in (one, other))
    value = np.empty((one.shape[1], other.shape[1]))
    sem = np.empty_like(value)
    step = max(1, MOST_ENTRIES // max(1, other.shape[1]))
    for start in range(0, one.shape[1], step):
        rows = slice(start, start + step)
        value[rows], sem[rows] = _covariance_rows(weights, one[:, rows], other)
    return Estimate(value, sem)


def _covariance_rows(
    weights: np.ndarray, one: np.ndarray, other: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return covariances of centered values, and their errors."""
    count, weight = len(weights), weights.mean(axis=0)
    value = (weight[:, None] * one).T @ other
    squares = np.zeros_like(value)
    # single precision is enough for the spread of blocks, and takes half of the time
    rough = [np.asarray(part, np.float32) for part in (weights, one, other)]
    for row in rough[0]:
        used = np.flatnonzero(row)
        product = (row[used, None] * rough[1][used]).T @ rough[2][used]
        squares += (product - value) ** 2
    means = weights @ one, weights @ other
    middle = [part.mean(axis=0) for part in means]
    left, right = (part - center for part, center in zip(means, middle, strict=True))
    of_means = left.T @ right / (count * max(count - 1, 1)) - np.outer(*middle)
    return value + of_means, _error(squares / max(count - 1, 1), count)


def jackknifed(
    statistic: Callable[..., float],
    weights: Float[np.ndarray, "blocks draws"],
    *traces: Float[np.ndarray, " draws"],
) -> Estimate:
    """Return a statistic of several traces, and its error by leaving out each block in turn.

    Args:
        statistic: `(weights of the draws, *traces) -> number`.
        weights: Of the draws in what each block says.
        traces: What it is of.
    """
    count, total = len(weights), weights.sum(axis=0)
    if count < 2:
        return Estimate(np.asarray(statistic(total, *map(np.asarray, traces))), np.asarray(np.inf))
    arrays = [np.asarray(part, float) for part in traces]
    whole = statistic(total / count, *arrays)
    without = np.array([statistic((total - row) / (count - 1), *arrays) for row in weights])
    return from_left_out(whole, without)


def from_left_out(whole: float, without: Float[np.ndarray, " blocks"]) -> Estimate:
    """Return the jackknife's estimate: of a statistic of all, and of those that leave out one each.

    The statistic's own bias is of the order of one over the draws, and taken off with it.
    """
    count = len(without)
    variance = (count - 1) * np.mean((without - without.mean()) ** 2)
    value = count * whole - (count - 1) * without.mean()
    return Estimate(np.asarray(value), _error(variance * count, count))


def correlation_of(
    weights: Float[np.ndarray, "blocks draws"],
    one: Float[np.ndarray, "draws rows"],
    other: Float[np.ndarray, "draws columns"],
) -> Estimate:
    """Return the correlation of every entry of one with every entry of the other.

    With r = c_ij / sqrt(c_ii c_jj) and x, y the entries over their standard deviations, a block
    moves r by the mean of x y - r (x^2 + y^2) / 2 over its draws, to first order. The spread of
    that over blocks is the error.

    Args:
        weights: As in `covariance_of`.
        one: What varies.
        other: With what.

    Returns:
        Arrays of shape (rows, columns); NaN where an entry does not vary.
    """
    one, other = _standardised(weights, one), _standardised(weights, other)
    squares = [weights @ part**2 for part in (one, other)]
    value = np.empty((one.shape[1], other.shape[1]))
    sem = np.empty_like(value)
    step = max(1, MOST_ENTRIES // max(1, other.shape[1]))
    for start in range(0, one.shape[1], step):
        rows = slice(start, start + step)
        columns = squares[0][:, rows], squares[1]
        value[rows], sem[rows] = _correlation_rows(weights, one[:, rows], other, *columns)
    return Estimate(value, sem)


def _standardised(
    weights: Float[np.ndarray, "blocks draws"], values: Float[np.ndarray, "draws entries"]
) -> np.ndarray:
    """Return the values over their standard deviations, about their means."""
    weight, values = weights.mean(axis=0), np.asarray(values, float)
    values = values - values.mean(axis=0)
    values = values - weight @ values
    variance = weight @ values**2
    # weights of both signs may leave none of a variance that is nearly all noise
    return values / np.sqrt(np.where(variance > 0, variance, np.nan))


def _correlation_rows(
    weights: np.ndarray, one: np.ndarray, other: np.ndarray, squares: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    value = (weights.mean(axis=0)[:, None] * one).T @ other
    total = np.zeros_like(value)
    for weight, of_one, of_other in zip(weights, squares, others, strict=True):
        used = np.flatnonzero(weight)
        moved = (weight[used, None] * one[used]).T @ other[used]
        moved -= value * (0.5 * (of_one[:, None] + of_other))
        total += moved**2
    # these have mean zero over all blocks
    count = len(weights)
    return value, _error(total / max(count - 1, 1), count)


def _error(variance: Any, count: int) -> np.ndarray:
    """Return the error of a mean of so many blocks of this variance, wider where they are few.

    One block tells none.
    """
    if count < 2:
        return np.full(np.shape(variance), np.inf)
    return np.asarray(np.sqrt(np.maximum(variance, 0.0) / count) * (1 + STUDENT / (count - 1)))
