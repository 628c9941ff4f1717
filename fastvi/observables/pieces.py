"""Means and covariances of more numbers than fit the memory: some entries at a time.

An entry is a number of each draw: the loss of an example or of a token, or a number of an
observable. Entries that belong to different pieces are read from disk apart.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastvi._typing import Float
from fastvi.observables.covariance import (
    Estimate,
    correlation_of,
    covariance_of,
    mean_of,
)

# Numbers that are read from disk at once. Some five arrays of as many, in float64, are held beside
# them: half reads a chunk of the disk more often, double takes 20 MB more.
PIECE_NUMBERS = 2**19
# The same of arrays in memory: half of it makes a covariance of thousands of entries a quarter
# slower, double takes 80 MB more.
HELD_NUMBERS = 2**21
Weights = Float[np.ndarray, "blocks draws"]  # of the draws, in what each block says


def entries_in(values: Any) -> int:
    """Count the numbers of each draw."""
    return math.prod(values.shape[2:])


def pieces_of(values: Any) -> Iterator[tuple[slice, Float[np.ndarray, "draws entries"]]]:
    """Read values a piece at a time.

    Args:
        values: Of shape (walkers, draws, ...); an array, or one that is on disk.

    Yields:
        Which entries, and their values, of all walkers one after the other.
    """
    walkers, draws, *rest = values.shape
    if not rest:
        yield slice(0, 1), np.asarray(values[:, :]).reshape(walkers * draws, 1)
        return
    inner = math.prod(rest[1:])
    numbers = HELD_NUMBERS if isinstance(values, np.ndarray) else PIECE_NUMBERS
    step = max(1, numbers // max(1, walkers * draws * inner))
    for start in range(0, rest[0], step):
        stop = min(start + step, rest[0])
        part = np.asarray(values[:, :, start:stop])
        yield slice(start * inner, stop * inner), part.reshape(walkers * draws, -1)


def mean_by_entry(weights: Weights, values: Any) -> Estimate:
    """Return the mean of each entry over draws, in the shape of a draw."""
    found = [mean_of(weights, part) for _, part in pieces_of(values)]
    shape = values.shape[2:]
    return Estimate(*(np.concatenate(parts).reshape(shape) for parts in zip(*found, strict=True)))


def covariance_by_entry(weights: Weights, one: Any, other: Any) -> Estimate:
    """Return the covariance of each entry of one with each entry of the other.

    Cost:
        Two numbers in float64 for each pair; what is read for a pair of pieces comes on top.
    """
    return _by_pairs(covariance_of, weights, one, other)


def correlation_by_entry(weights: Weights, one: Any, other: Any) -> Estimate:
    """Return the correlation of each entry of one with each entry of the other.

    Its cost is that of a covariance.
    """
    return _by_pairs(correlation_of, weights, one, other)


def _by_pairs(moment: Callable[..., Estimate], weights: Weights, one: Any, other: Any) -> Estimate:
    """Return a moment of each entry of one with each entry of the other, by pairs of pieces."""
    value = np.empty((entries_in(one), entries_in(other)))
    sem = np.empty_like(value)
    for rows, part in pieces_of(one):
        for columns, counterpart in pieces_of(other):
            found = moment(weights, part, counterpart)
            value[rows, columns], sem[rows, columns] = found
    return Estimate(value, sem)


def mean_over_entries(
    values: Any, less: Float[np.ndarray, "..."] | None = None
) -> Float[np.ndarray, "walkers draws"]:
    """Return the mean of all entries of each draw, less a value for each entry."""
    total = np.zeros(values.shape[0] * values.shape[1])
    for which, part in pieces_of(values):
        given = part if less is None else part - less.reshape(-1)[which]
        total += given.sum(axis=-1, dtype=float)
    return (total / entries_in(values)).reshape(values.shape[:2])


def some_entries(values: Any, count: int) -> Float[np.ndarray, "draws some"]:
    """Return at most so many entries of the first axis of a draw, evenly spaced."""
    walkers, draws, *rest = values.shape
    if not rest:
        return np.asarray(values[:, :], float).reshape(walkers * draws, 1)
    rows = np.unique(np.linspace(0, rest[0] - 1, min(count, rest[0])).round().astype(int))
    columns = [np.asarray(values[:, :, row : row + 1], float) for row in rows]
    firsts = [column.reshape(walkers * draws, -1)[:, 0] for column in columns]
    return np.stack(firsts, axis=1)
