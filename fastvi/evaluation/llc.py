"""The local learning coefficient under a fitted q, with its Monte Carlo error."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._modes import their_products
from fastvi._typing import Array, Batch, Float, Key, Scalar
from fastvi.evaluation.control_variate import hessian_columns, regress, regress_one
from fastvi.evaluation.errors import pair_mean
from fastvi.evaluation.stein import even_monomials, stein_columns
from fastvi.families.base import AbstractFamily, Draws
from fastvi.kernels.noise import streams
from fastvi.target.data import Problem
from fastvi.target.objective import FlatObjective

# Draws that share a pass over a slice of the data, with w* beside them: half as many evaluate w*
# twice as often, a ninth more losses; twice as many halve the examples of a slice.
EVALUATION_GROUP = 8


class DataLosses(NamedTuple):
    """What the data say at w* and at draws of q.

    Attributes:
        excess: `L_n(w) - L_n(w*)` at each draw.
        reference: `L_n(w*)`.
        slope: Gradient of L_n at w*; None where the loss on all data is a function of the caller's.
        beside: The excess at the points of `Beside`, zero where they were not wanted; None where
            none were given.
    """

    excess: Float[Array, "*chains draws"]
    reference: Float[Array, "*chains"]
    slope: Float[Array, "*chains dim"] | None
    beside: Float[Array, "*chains points"] | None = None


class Beside(NamedTuple):
    """Displacements from w* beside the draws of q, evaluated where `wanted`."""

    displacement: Float[Array, "points dim"]
    wanted: Array


class EvaluationSettings(NamedTuple):
    """What an evaluation is made for.

    Attributes:
        num_draws: Draws of q, an even number: mirrored pairs.
        control_variate: "auto" (q's own curvature), "hvp" (the Hessian at w*) or "none".
        trace_probes: Hutchinson probes of "hvp".
    """

    num_draws: int = 64
    control_variate: str = "auto"
    trace_probes: int = 16


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
    draws: Draws,
    losses: DataLosses,
    key: Key,
    *,
    control_variate: str,
    trace_probes: int,
) -> Evaluation:
    """Estimate `nbeta (E_q[L_n] - L_n(w*))` on all data.

    The same draws give the plain and the corrected mean; differences to w* are paired on the data.

    Args:
        family: The family.
        params: Its fitted parameters.
        objective: The loss.
        problem: Target and data.
        draws: Draws from q, from `evaluation_draws`.
        losses: What the data say at them.
        key: Random key, of the probes.
        control_variate: "auto" (q's own curvature; free), "hvp" (Hessian at w*) or "none".
        trace_probes: Hutchinson probes of "hvp".

    Cost:
        "hvp" takes a Hessian-vector product for each draw, probe and factor row.
    """
    posterior, excess = problem.posterior, losses.excess
    pairs = excess.shape[0] // 2
    contribution = posterior.learning_coefficient(excess)
    log_density = jax.vmap(posterior.log_density)(draws.displacement, losses.reference + excess)
    if control_variate == "hvp":
        columns, expected, trace_variance = hessian_columns(
            family,
            params,
            objective,
            problem,
            draws,
            streams.derive(key, streams.Purpose.PROBES),
            trace_probes,
        )
    else:
        columns, expected = (
            quadratic_columns(family, params, draws, pairs)
            if control_variate == "auto"
            else (jnp.zeros((2 * pairs, 0), contribution.dtype), jnp.zeros(0, contribution.dtype))
        )
        # The family's own columns have expectations that are known exactly.
        trace_variance = jnp.zeros(columns.shape[1], contribution.dtype)
    units, centred = pair_mean(contribution), pair_mean(columns - expected)
    fit = (
        # Probes leave the expectation uncertain, which makes the coefficient smaller.
        regress_one(units, centred[:, 0], trace_variance[0])
        if control_variate == "hvp"
        else regress(units, centred)
    )
    plain_variance, variance = jnp.var(units, ddof=1), fit.residual_variance
    trace_error = jnp.sum(fit.coefficients**2 * trace_variance)
    log_weight = log_density - draws.log_prob
    return Evaluation(
        llc=fit.mean,
        llc_sem=jnp.sqrt(variance / pairs + trace_error),
        llc_mc=jnp.mean(contribution),
        # The bound keeps a regression that leaves nothing from an infinite quotient.
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
    return family.sample(
        params, key, 2 * (num_draws // 2), antithetic=True, block=streams.EVALUATION
    )


def losses_at(
    objective: FlatObjective,
    center: Float[Array, " dim"],
    displacement: Float[Array, "draws dim"],
    batch: Batch,
    beside: Beside | None = None,
) -> DataLosses:
    """Evaluate what a batch says at w* and at draws, a group of draws at a time.

    Each group has w* beside its draws, so that a program holds the model once, and the difference
    of losses by the same operations on the same examples keeps float32 accurate.

    Cost:
        A gradient, and a loss for each draw and group; `losses_beside` where points beside the
        draws are wanted.
    """
    count, size = displacement.shape[0], draws_at_once(displacement.shape[0])
    used = count // size
    if beside is not None:
        more = _groups_beside(beside.displacement.shape[0], count)
        filled = jnp.zeros((more * size, center.size), center.dtype)
        filled = filled.at[: beside.displacement.shape[0]].set(beside.displacement)
        displacement = jnp.concatenate([displacement, filled])
        used = used + more * beside.wanted.astype(jnp.int32)
    groups = displacement.reshape(-1, size, center.size)

    def one_group(number, carry):
        excess, reference, slope = carry
        v = groups[number]
        points = center + jnp.concatenate([jnp.zeros_like(v[:1]), v])
        # a gradient of each group would cost three times as much; only the first is asked for
        losses, slope = _losses_and_slope(objective, points, batch, slope, number == 0)
        excess = excess.at[number].set((losses[1:] - losses[0]).astype(center.dtype))
        return excess, jnp.where(number == 0, losses[0].astype(center.dtype), reference), slope

    zero = jnp.zeros_like(center)
    blank = jnp.zeros(groups.shape[:2], center.dtype), zero[0], zero
    # The number of groups is a value: those beside the draws cost nothing where not wanted.
    excess, reference, slope = jax.lax.fori_loop(0, used, one_group, blank)
    excess = excess.reshape(-1)
    if beside is None:
        return DataLosses(excess, reference, slope)
    # What fills up the last group has displacement zero, and is nobody's.
    at_beside = excess[count : count + beside.displacement.shape[0]]
    return DataLosses(excess[:count], reference, slope, at_beside)


def _groups_beside(points: int, draws: int) -> int:
    return -(-points // draws_at_once(draws))


def losses_beside(points: int, draws: int) -> int:
    """Count the losses that so many points beside the draws take: whole groups, each with w*."""
    return _groups_beside(points, draws) * (draws_at_once(draws) + 1)


def _losses_and_slope(
    objective: FlatObjective,
    points: Float[Array, "points dim"],
    batch: Batch,
    slope: Float[Array, " dim"],
    wanted: Array,
) -> tuple[Float[Array, " points"], Float[Array, " dim"]]:
    """Evaluate the losses at points and, where wanted, the gradient at the first."""
    if getattr(objective, "has_own_gradient", True):
        losses = jax.vmap(lambda w: objective.loss(w, batch))(points)
        first = points[0]
        return losses, jax.lax.cond(wanted, lambda: objective.grad(first, batch), lambda: slope)
    with their_products():
        losses, pulls = jax.vmap(lambda w: jax.vjp(lambda w: objective.loss(w, batch), w))(points)
        # of what the forward pass keeps for a gradient, that of the first point alone is used
        pull = jax.tree_util.tree_map(lambda leaf: leaf[0], pulls)
        one = jnp.ones_like(losses[0])
        return losses, jax.lax.cond(wanted, lambda: pull(one)[0], lambda: slope)


def draws_at_once(num_draws: int) -> int:
    """Return how many draws share a pass: as many as divide them evenly."""
    most = min(EVALUATION_GROUP, num_draws)
    return next(size for size in range(most, 0, -1) if num_draws % size == 0)


def full_losses_at(
    loss_full: Callable[[Float[Array, " dim"]], Scalar],
    center: Float[Array, " dim"],
    displacement: Float[Array, "draws dim"],
) -> DataLosses:
    """Evaluate a caller's own loss on all data at w* and at draws."""
    reference = loss_full(center)
    excess = jax.lax.map(lambda v: loss_full(center + v) - reference, displacement)
    return DataLosses(excess, reference, None)


def error_over_pieces(running_means: Sequence[float]) -> float:
    """Return the standard error of a mean over pieces of one size, from its values after each."""
    # k times the mean of k pieces is their sum, whose differences are the pieces
    counts = np.arange(1, len(running_means) + 1)
    pieces = np.diff(counts * np.asarray(running_means), prepend=0.0)
    return float(np.std(pieces, ddof=1) / np.sqrt(pieces.size))


def quadratic_columns(family: AbstractFamily, params, draws: Draws, pairs: int):
    """Return the family's own control variates; in few dimensions polynomials, which reach more."""
    exponents = even_monomials(draws.displacement.shape[1], pairs)
    if exponents.shape[0] == 0:
        return family.control_variates(params, draws)
    center = jnp.mean(draws.displacement, axis=0)
    spread = family.second_moment(params).marginal()
    # Monomials of high degree need coordinates of order one; the bound keeps off a negative root.
    unit = jnp.sqrt(jnp.maximum(spread - center**2, 1e-6 * spread))
    columns = stein_columns((draws.displacement - center) / unit, draws.score * unit, exponents)
    return columns, jnp.zeros(exponents.shape[0], columns.dtype)
