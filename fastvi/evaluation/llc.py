"""The local learning coefficient under a fitted q, with its Monte Carlo error."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Key, Scalar
from fastvi.evaluation.control_variate import hessian_columns, regress, regress_one
from fastvi.evaluation.errors import pair_mean
from fastvi.evaluation.stein import even_monomials, stein_columns
from fastvi.families.base import AbstractFamily, Draws
from fastvi.target.data import Problem
from fastvi.target.objective import FlatObjective, call_full_loss, excess_loss

EVALUATION_BLOCK = (
    2**31 + 2**16
)  # counters of a chain's key beyond those of its steps and its start
PROBE_STREAM = 2**31
EVALUATION_GROUP = 8  # draws whose full-data losses are evaluated together


class Evaluation(NamedTuple):
    """What one chain's q says; `llc` is corrected by the control variates, `llc_mc` is not.

    `columns` are these, less their expectations, whose own errors have `expectation_variance`.
    """

    llc: Scalar
    llc_sem: Scalar
    llc_mc: Scalar
    variance_reduction: Scalar
    trace_term: Scalar
    elbo: Scalar
    log_weight_sd: Scalar
    excess: Float[Array, " draws"]
    columns: Float[Array, "pairs columns"]
    expectation_variance: Float[Array, " columns"]
    log_weight: Float[Array, " draws"]
    log_prob: Float[Array, " draws"]
    resp_entropy: Float[Array, " draws"]


def evaluate(
    family: AbstractFamily,
    params,
    objective: FlatObjective,
    problem: Problem,
    excess_fn,
    reference_loss: Scalar,
    key: Key,
    *,
    num_draws: int,
    control_variate: str,
    trace_probes: int,
    excess: Float[Array, " draws"] | None = None,
) -> Evaluation:
    """Estimate `nbeta (E_q[L_n] - L_n(w*))` on all data.

    The same draws give the plain and the corrected mean; differences to w* are paired on the data.

    Args:
        family: The family.
        params: Its fitted parameters.
        objective: The loss.
        problem: Target and data.
        excess_fn: `(w) -> L_n(w) - L_n(w*)`.
        reference_loss: `L_n(w*)`.
        key: Random key.
        num_draws: Draws from q, rounded down to an even number (antithetic pairs).
        control_variate: "auto" (q's own curvature; free), "hvp" (Hessian at w*) or "none".
        trace_probes: Hutchinson probes of "hvp".
        excess: What `excess_fn` gives at the draws, where it is known already.

    Cost:
        `num_draws` full losses; "hvp" adds a Hessian-vector product for each draw, probe and factor
        row.
    """
    posterior = problem.posterior
    pairs = num_draws // 2
    draws = evaluation_draws(family, params, key, num_draws)
    excess = excess_at(draws, posterior.center, excess_fn) if excess is None else excess
    contribution = posterior.learning_coefficient(excess)
    log_density = jax.vmap(posterior.log_density)(draws.displacement, reference_loss + excess)
    if control_variate == "hvp":
        columns, expected, trace_variance = hessian_columns(
            family,
            params,
            objective,
            problem,
            draws,
            jax.random.fold_in(key, PROBE_STREAM),
            trace_probes,
        )
    elif control_variate == "auto":
        columns, expected = quadratic_columns(family, params, draws, pairs)
    else:
        columns, expected = (
            jnp.zeros((2 * pairs, 0), contribution.dtype),
            jnp.zeros(0, contribution.dtype),
        )
    if control_variate != "hvp":
        trace_variance = jnp.zeros(columns.shape[1], contribution.dtype)
    units, centred = pair_mean(contribution), pair_mean(columns - expected)
    fit = (
        regress_one(units, centred[:, 0], trace_variance[0])
        if control_variate == "hvp"
        else regress(units, centred)
    )
    plain_variance = jnp.var(units, ddof=1)
    variance = fit.residual_variance
    trace_error = jnp.sum(fit.coefficients**2 * trace_variance)
    log_weight = log_density - draws.log_prob
    return Evaluation(
        llc=fit.mean,
        llc_sem=jnp.sqrt(variance / pairs + trace_error),
        llc_mc=jnp.mean(contribution),
        variance_reduction=plain_variance
        / jnp.maximum(variance + pairs * trace_error, 1e-12 * plain_variance + 1e-30),
        trace_term=jnp.sum(fit.coefficients * expected),
        elbo=jnp.mean(log_weight),
        log_weight_sd=jnp.std(log_weight, ddof=1),
        excess=excess,
        columns=centred,
        expectation_variance=trace_variance,
        log_weight=log_weight,
        log_prob=draws.log_prob,
        resp_entropy=family.resp_entropy(draws),
    )


def evaluation_draws(family: AbstractFamily, params, key: Key, num_draws: int) -> Draws:
    """Return the draws that a chain is evaluated at, in mirrored pairs."""
    return family.sample(params, key, 2 * (num_draws // 2), antithetic=True, block=EVALUATION_BLOCK)


def excess_at(draws: Draws, center: Float[Array, " dim"], excess_fn) -> Float[Array, " draws"]:
    """Evaluate `excess_fn` at every draw, a group at a time."""
    group = min(EVALUATION_GROUP, draws.displacement.shape[0])
    return jax.lax.map(lambda v: excess_fn(center + v), draws.displacement, batch_size=group)


def quadratic_columns(family: AbstractFamily, params, draws: Draws, pairs: int):
    """Return the family's own control variates or, in few dimensions, polynomials that reach further."""
    exponents = even_monomials(draws.displacement.shape[1], pairs)
    if exponents.shape[0] == 0:
        return family.control_variates(params, draws)
    center = jnp.mean(draws.displacement, axis=0)
    moment = family.second_moment(params)
    spread = moment.marginal()
    unit = jnp.sqrt(jnp.maximum(spread - center**2, 1e-6 * spread))
    columns = stein_columns((draws.displacement - center) / unit, draws.score * unit, exponents)
    return columns, jnp.zeros(exponents.shape[0], columns.dtype)


def make_excess_fn(objective: FlatObjective, problem: Problem, loss_full_flat=None):
    """Return `w -> L_n(w) - L_n(w*)`, by the given full-data loss or chunk by chunk."""
    center = problem.posterior.center
    if loss_full_flat is None:
        return lambda w: excess_loss(objective, w, center, problem.data)
    whole = functools.partial(call_full_loss, loss_full_flat, data=problem.data)
    return lambda w: whole(w) - whole(center)
