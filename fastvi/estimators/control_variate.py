"""Unbiased control variates: functions of the draws with known expectation, and their cross-fitted coefficients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Key, Scalar
from fastvi.families.base import AbstractFamily, Draws, SecondMoment
from fastvi.inference.loop import Problem
from fastvi.kernels import hutchinson
from fastvi.objective import FlatObjective, full_data_hvp

RELATIVE_CUTOFF = 1e-6  # singular values of the columns below this share of the largest are dropped


def pairs_for(columns: int) -> int:
    """Count the independent units that the coefficients of so many control variates take."""
    return 4 * (columns + 1)


class Regression(NamedTuple):
    """A mean corrected by control variates."""

    mean: Scalar
    residual_variance: Scalar
    coefficients: Float[Array, " columns"]


def regress(values: Float[Array, " units"], columns: Float[Array, "units columns"]) -> Regression:
    """Correct the mean of independent `values` by centred `columns`.

    Coefficients come from one half of the units and are applied to the other, which keeps the mean unbiased.
    """
    units = values.shape[0]
    if columns.shape[1] == 0 or units < pairs_for(columns.shape[1]):
        return Regression(jnp.mean(values), jnp.var(values, ddof=1), jnp.zeros(columns.shape[1], values.dtype))
    half = units // 2
    first, second = _coefficients(values[:half], columns[:half]), _coefficients(values[half:], columns[half:])
    residual = jnp.concatenate([values[:half] - columns[:half] @ second, values[half:] - columns[half:] @ first])
    return Regression(jnp.mean(residual), jnp.var(residual, ddof=1), 0.5 * (first + second))


def _coefficients(values, columns):
    """Least squares with an intercept, insensitive to the scale of the columns and to collinear ones."""
    centred = columns - jnp.mean(columns, axis=0)
    spread = jnp.sqrt(jnp.mean(centred**2, axis=0))
    spread = jnp.where(spread > 0, spread, 1.0)
    solution = jnp.linalg.lstsq(centred / spread, values - jnp.mean(values), rcond=RELATIVE_CUTOFF)[0]
    return solution / spread


def hessian_columns(
    family: AbstractFamily,
    params,
    objective: FlatObjective,
    problem: Problem,
    draws: Draws,
    key: Key,
    num_probes: int,
) -> tuple[Float[Array, "draws 1"], Float[Array, " 1"], Float[Array, " 1"]]:
    """Return `nbeta v . H v / 2` with H the Hessian at w*, its expectation under q and the variance of that.

    The trace covers the whole second moment: the low-rank terms exactly, the diagonal by probes that are
    independent of the draws.

    Cost:
        One Hessian-vector product on all data for each draw, each factor row of `second_moment` and each probe.
    """
    posterior = problem.posterior
    hvp = full_data_hvp(objective, posterior.center, problem.data)
    moment = family.second_moment(params)

    values = 0.5 * jax.lax.map(lambda direction: direction @ hvp(direction), draws.displacement)
    gram = jax.lax.map(lambda row: moment.factors @ hvp(row), moment.factors)
    low_rank, low_rank_variance = _expected_form(moment, gram)
    probes = hutchinson.rademacher(key, num_probes, moment.diagonal.size, moment.diagonal.dtype)
    deviation = jnp.sqrt(moment.diagonal)
    samples = hutchinson.trace_samples(lambda z: deviation * hvp(deviation * z), probes)
    expected = 0.5 * (low_rank + jnp.mean(samples))
    variance = 0.25 * (jnp.var(samples, ddof=1) / num_probes + low_rank_variance)
    nbeta = posterior.nbeta
    return nbeta * values[:, None], nbeta * expected[None], nbeta**2 * variance[None]


def _expected_form(moment: SecondMoment, gram: Float[Array, "terms terms"]) -> tuple[Scalar, Scalar]:
    """Return E[c^T gram c] over the low-rank part of a second moment, and the variance of what draws say of it."""
    exact = jnp.sum(moment.weights * jnp.diagonal(gram))
    pairs = moment.coefficients.shape[0] // 2
    if pairs == 0:
        return exact, jnp.zeros_like(exact)
    forms = jnp.sum((moment.coefficients @ gram) * moment.coefficients, axis=-1)
    forms = 0.5 * (forms[:pairs] + forms[pairs:])
    return exact + jnp.mean(forms), jnp.var(forms, ddof=1) / pairs
