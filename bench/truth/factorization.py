"""Matrix factorisation: U V^T fitted to some entries of a matrix of lower rank."""

import functools

import numpy as np

from bench.truth.gibbs import GIBBS, factorization_answer
from bench.truth.problem import Problem, default_nbeta

ROWS, COLUMNS, RANK, TRUE_RANK = 8, 7, 3, 2
OBSERVED, REPEATS = 34, 30
UNKNOWN = "none known: some entries are not observed"


def factors():
    """Return U and V of the true rank, in bases that a rotation has mixed."""
    rng = np.random.default_rng(60)
    mixing = np.linalg.qr(rng.normal(size=(RANK, RANK)))[0][:TRUE_RANK]
    return tuple(
        (rng.normal(size=(size, TRUE_RANK)) @ mixing).astype(np.float32) for size in (ROWS, COLUMNS)
    )


def observed_entries():
    """Return rows and columns of the entries, at least two in each."""
    rng = np.random.default_rng(61)
    while True:
        mask = np.zeros(ROWS * COLUMNS, bool)
        mask[rng.permutation(ROWS * COLUMNS)[:OBSERVED]] = True
        mask = mask.reshape(ROWS, COLUMNS)
        if min(mask.sum(axis=0).min(), mask.sum(axis=1).min()) >= TRUE_RANK:
            return np.nonzero(mask)


def factorization(name: str, gamma: float, noise: float = 0.5) -> Problem:
    """Return the mean squared error over entries that are each measured many times with noise.

    The noise of an entry averages to zero, so that w* is the minimum.
    """
    left, right = factors()
    rows, columns = observed_entries()
    errors = noise * np.random.default_rng(62).normal(size=(REPEATS, OBSERVED))
    values = (left @ right.T)[rows, columns] + errors - errors.mean(axis=0)
    count = REPEATS * OBSERVED
    weights = np.zeros((ROWS, COLUMNS))
    weights[rows, columns] = 1 / OBSERVED

    def loss_fn(params, batch):
        rows, columns, values = batch
        products = (params["U"][rows] * params["V"][columns]).sum(axis=1)
        return 0.5 * ((products - values) ** 2).mean()

    return Problem(
        name,
        loss_fn,
        {"U": left, "V": right},
        (
            np.tile(rows, REPEATS).astype(np.int32),
            np.tile(columns, REPEATS).astype(np.int32),
            values.ravel().astype(np.float32),
        ),
        gamma,
        count,
        theory_source=UNKNOWN,
        exact=functools.partial(
            factorization_answer, left, right, weights, default_nbeta(count), gamma
        ),
        exact_method=GIBBS,
    )


FACTORIZATIONS = {"factorization_8_7_g1": lambda: factorization("factorization_8_7_g1", 1.0)}
