"""Unbiased control variates.

Functions of the draws with known expectation, and their cross-fitted coefficients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Key, Scalar
from fastvi.evaluation.errors import pair_mean
from fastvi.families.base import AbstractFamily, Draws, SecondMoment
from fastvi.kernels import hutchinson
from fastvi.target.data import Problem
from fastvi.target.hessian import data_hvp
from fastvi.target.objective import FlatObjective

# Singular values of the columns below this share of the largest are dropped: rounding of float32
# columns is 1e-7 of the largest. Ten times less would fit noise, ten times more drops weak columns.
RELATIVE_CUTOFF = 1e-6


def pairs_for(columns: int) -> int:
    """Count the independent units that the coefficients of so many control variates take."""
    return 4 * (columns + 1)


class Regression(NamedTuple):
    """A mean corrected by control variates."""

    mean: Scalar
    residual_variance: Scalar
    coefficients: Float[Array, " columns"]


@jax.jit  # one program where it is called from the host
def regress(values: Float[Array, " units"], columns: Float[Array, "units columns"]) -> Regression:
    """Correct the mean of independent `values` by centred `columns`.

    Coefficients come from one half of the units and are applied to the other, which keeps the mean
    unbiased.
    """
    units = values.shape[0]
    if columns.shape[1] == 0 or units < pairs_for(columns.shape[1]):
        return Regression(
            jnp.mean(values), jnp.var(values, ddof=1), jnp.zeros(columns.shape[1], values.dtype)
        )
    half = units // 2
    first, second = (
        _coefficients(values[:half], columns[:half]),
        _coefficients(values[half:], columns[half:]),
    )
    residual = jnp.concatenate(
        [values[:half] - columns[:half] @ second, values[half:] - columns[half:] @ first]
    )
    return Regression(jnp.mean(residual), jnp.var(residual, ddof=1), 0.5 * (first + second))


def _coefficients(values, columns):
    """Fit by least squares with an intercept, whatever the columns' scales and collinearity."""
    centred = columns - jnp.mean(columns, axis=0)
    spread = jnp.sqrt(jnp.mean(centred**2, axis=0))
    spread = jnp.where(spread > 0, spread, 1.0)
    target = values - jnp.mean(values)
    return jnp.linalg.lstsq(centred / spread, target, rcond=RELATIVE_CUTOFF)[0] / spread


def regress_one(
    values: Float[Array, " units"], column: Float[Array, " units"], expectation_variance: Scalar
) -> Regression:
    """Correct the mean of independent `values` by one column whose expectation is uncertain.

    A unit's coefficient comes from all the others, which keeps the mean unbiased. It is smaller by
    what makes up for the variance of the expectation, and by what chance alone explains (Stein): a
    column that says little of the values, or whose expectation is vague, then adds no variance.
    """
    units = values.shape[0]
    if units < pairs_for(1):
        return Regression(jnp.mean(values), jnp.var(values, ddof=1), jnp.zeros(1, values.dtype))
    x, y, weight = column - jnp.mean(column), values - jnp.mean(values), units / (units - 1)
    # One entry for each unit, about the means of the others.
    xx, xy, yy = (jnp.sum(a * b) - weight * a * b for a, b in ((x, x), (x, y), (y, y)))
    floor = RELATIVE_CUTOFF * jnp.sum(x**2)
    slope = jnp.where(
        xx > floor,
        xy / jnp.where(xx > floor, xx + (units - 1) * units * expectation_variance, 1.0),
        0.0,
    )
    explained = slope**2 * xx
    chance = jnp.maximum(yy - 2 * slope * xy + explained, 0.0) / (units - 3)
    slope = slope * jnp.maximum(1 - chance / jnp.where(explained > 0, explained, 1.0), 0.0)
    residual = values - slope * column
    return Regression(jnp.mean(residual), jnp.var(residual, ddof=1), jnp.mean(slope)[None])


def hessian_columns(
    family: AbstractFamily,
    params,
    objective: FlatObjective,
    problem: Problem,
    draws: Draws,
    key: Key,
    num_probes: int,
) -> tuple[Float[Array, "draws 1"], Float[Array, " 1"], Float[Array, " 1"]]:
    """Return `nbeta v.H v / 2`, its expectation under q and the variance of that.

    H is the Hessian at w*. The trace covers the whole second moment D + F^T W F: exactly on the
    span of F D^{-1/2}, where a steep H would make large terms that cancel, and by probes,
    independent of the draws, on what that leaves of D^{1/2} H D^{1/2}.

    Cost:
        One Hessian-vector product on all data for each draw, each direction of the span (as many as
        `second_moment` has factor rows, at most the dimension) and each probe.
    """
    nbeta = problem.posterior.nbeta
    hvp = data_hvp(objective, problem.posterior.center, problem.data)
    moment = family.second_moment(params)
    values = 0.5 * jax.lax.map(lambda direction: direction @ hvp(direction), draws.displacement)
    deviation = jnp.sqrt(moment.diagonal)
    # Where q has no diagonal, any positive root does: it divides out again.
    root = jnp.where(moment.diagonal > 0, deviation, family.scale)
    basis = jnp.linalg.qr((moment.factors / root).T)[0].T
    inner = jax.lax.map(lambda row: basis @ (root * hvp(root * row)), basis)
    mix = (moment.factors / root) @ basis.T
    low_rank, low_rank_variance = _expected_form(moment, mix @ inner @ mix.T)
    share = jnp.mean(moment.diagonal / root**2)  # 1, or 0 where q has no diagonal
    probes = hutchinson.rademacher(key, num_probes, deviation.size, deviation.dtype)
    beyond, beyond_variance = _trace_beyond(basis, lambda z: deviation * hvp(deviation * z), probes)
    expected = 0.5 * (low_rank + share * jnp.trace(inner) + beyond)
    variance = 0.25 * (beyond_variance + low_rank_variance)
    return nbeta * values[:, None], nbeta * expected[None], nbeta**2 * variance[None]


def _trace_beyond(basis: Float[Array, "terms dim"], operator, probes: Float[Array, "probes dim"]):
    """Return the trace of a symmetric operator off the span of orthonormal rows, and its variance.

    Both are found by probes.
    """
    if basis.shape[0] >= basis.shape[1]:
        return jnp.zeros((), probes.dtype), jnp.zeros((), probes.dtype)

    def off(x):
        return x - (basis @ x) @ basis

    def one(probe):
        beyond = off(probe)
        image = off(operator(beyond))
        return beyond @ image, image @ image

    samples, squares = jax.lax.map(one, probes)
    # one probe has no spread: the variance is at most twice the square of the operator's norm,
    # which its image shows
    variance = jnp.var(samples, ddof=1) if probes.shape[0] > 1 else 2 * jnp.mean(squares)
    return jnp.mean(samples), variance / probes.shape[0]


def _expected_form(
    moment: SecondMoment, gram: Float[Array, "terms terms"]
) -> tuple[Scalar, Scalar]:
    """Return E[c^T gram c] over the low-rank part of a second moment, and its variance.

    The variance is of the part that draws say.
    """
    exact = jnp.sum(moment.weights * jnp.diagonal(gram))
    pairs = moment.coefficients.shape[0] // 2
    if pairs == 0:
        return exact, jnp.zeros_like(exact)
    forms = pair_mean(jnp.sum((moment.coefficients @ gram) * moment.coefficients, axis=-1))
    return exact + jnp.mean(forms), jnp.var(forms, ddof=1) / pairs
