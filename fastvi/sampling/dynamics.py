"""Underdamped Langevin dynamics on the local posterior, in the coordinates that a fitted q makes round."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Int, Key, Keys, Scalar
from fastvi.families.base import LinearMap
from fastvi.sampling.gradients import Anchor, anchored_value_and_grad
from fastvi.target.data import Problem
from fastvi.target.objective import FlatObjective

# steps that a walker keeps its block of data: every other step conserves an energy but for its own
# error
HOLD = 2
FIRST_STEP = (
    0.3  # times dim^(-1/4), the scaling of the step at constant energy error in a round Gaussian
)
SHRINK, GROW = 0.8, 1.1  # bounds on what one step changes of the step size
# of the log-normal window that outliers of the energy error fall out of: 6 x 1.5, as blackjax has
# it
WIDTH = 9.0
FIRST_MEMORY, LAST_MEMORY = 20.0, 100.0  # steps that the running mean of the energy error covers
WORST_ERROR = (
    1e3  # nats, and one for each dimension, at which a step is taken back and the momentum reversed
)


class Walker(NamedTuple):
    """A point with what the next step needs.

    `gradient` is that of the potential `-log p` in v, estimated on `block`; `potential` is the one
    it belongs to.
    """

    x: Float[Array, " dim"]
    momentum: Float[Array, " dim"]
    gradient: Float[Array, " dim"]
    potential: Scalar
    excess: Scalar


class Tuning(NamedTuple):
    """Step size, and the running means that set it."""

    step: Scalar
    total: Scalar
    weight: Scalar
    count: Int[Array, ""]


class Record(NamedTuple):
    """What is kept of each bin of steps.

    Means of nbeta (L_n - L_n(w*)), of |w - w*|^2, of the virial columns.
    """

    llc: Float[Array, " bins"]
    radius2: Float[Array, " bins"]
    virial: Float[Array, "bins columns"]
    energy_error: Float[Array, " bins"]
    returned: Float[Array, " bins"]


def heat(noise: float, step: float, friction_time: float) -> float:
    """Return what gradient noise adds to llc.

    Half of what it adds to the mean squares of x, summed.

    Args:
        noise: Variance of the gradient in x over the blocks, summed over directions.
        step: Step size.
        friction_time: After which a momentum is forgotten.
    """
    return HOLD * noise * step * friction_time / 4


def start_tuning(dim: int, dtype) -> Tuning:
    """Return the tuning before the first step."""
    zero = jnp.zeros((), dtype)
    return Tuning(jnp.asarray(FIRST_STEP * dim**-0.25, dtype), zero, zero + 1e-6, jnp.asarray(0))


def make_potential(
    objective: FlatObjective,
    problem: Problem,
    linear_map: LinearMap,
    reference_loss: Scalar,
    copies: int = 1,
):
    """Return `(anchor, x, momentum, block) -> Walker`, of which `copies` run side by side."""
    posterior = problem.posterior

    def evaluate(anchor: Anchor, x, momentum, block) -> Walker:
        v = linear_map.displacement(x)
        excess, gradient, surrogate = anchored_value_and_grad(
            objective, problem, anchor, reference_loss, v, block, copies
        )
        gradient = -posterior.log_density_grad(v, gradient)
        return Walker(x, momentum, gradient, -posterior.log_density(v, surrogate), excess)

    return evaluate


def run_steps(
    evaluate,
    linear_map: LinearMap,
    anchor: Anchor,
    walkers: Walker,
    tuning: Tuning,
    keys: Keys,
    first: Int[Array, ""],
    columns_fn,
    *,
    friction_time: Scalar,
    energy_error: Scalar,
    bins: int,
    bin_length: int,
) -> tuple[Walker, Tuning, Record]:
    """Run `bins * bin_length` steps of every walker side by side, adapting one step size for all.

    A step is half a kick, half a drift, friction and noise, half a drift, half a kick (BAOAB):
    positions are sampled without bias where the potential is quadratic, and nothing is rejected.
    The step size keeps the mean square of the energy error, the change of the energy less the heat,
    at `energy_error`. A step that ends behind a wall is taken back: by its energy error and, where
    the block changes, which moves the potential for no fault of the step's, by the energy of the
    kick that it ends with as well. Both are a small part of d where walkers are at home.

    Args:
        evaluate: From `make_potential`.
        linear_map: The round coordinates.
        anchor: What makes gradients on blocks precise.
        walkers: Points, stacked.
        tuning: The step size.
        keys: One key for each walker.
        first: Index of the first step.
        columns_fn: `(displacement, gradient, x, gradient in x) -> columns`, all of mean zero.
        friction_time: After which a momentum is forgotten, in q's standard deviations.
        energy_error: Mean square of the energy error of a step, in nats^2.
        bins: Records to keep.
        bin_length: Steps averaged in each.

    Returns:
        Walkers, tuning, and records with a leading axis of walkers.

    References:
        Leimkuhler & Matthews, Molecular Dynamics (2015); Robnik & Seljak, Fluctuation without
        dissipation (2023) for the control of the energy error; Baker et al., Control variates for
        SGMCMC (2019).
    """
    num_blocks = anchor.block_loss.shape[0]
    held = HOLD if num_blocks > 1 else 1

    def advance(walker: Walker, key, step, index):
        block = jax.random.randint(jax.random.fold_in(key, index // held), (), 0, num_blocks)
        force = linear_map.pull_back(walker.gradient)
        before = walker.momentum - 0.5 * step * force
        kept = jnp.exp(-step / friction_time)
        noise = jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(key, index), 1), before.shape, before.dtype
        )
        after = kept * before + jnp.sqrt(1 - kept**2) * noise
        moved = evaluate(anchor, walker.x + 0.5 * step * (before + after), after, block)
        pulled = linear_map.pull_back(moved.gradient)
        moved = moved._replace(momentum=after - 0.5 * step * pulled)
        heat = _kinetic(after) - _kinetic(before)
        error = (
            moved.potential
            - walker.potential
            + _kinetic(moved.momentum)
            - _kinetic(walker.momentum)
            - heat
        )
        is_clean = index % held == held - 1  # the block at both ends is the same
        kick = jnp.where(is_clean, jnp.inf, _kinetic(0.5 * step * pulled))
        measure = jnp.minimum(jnp.abs(error), kick)
        worst = WORST_ERROR + walker.x.size
        is_lost = ~((measure < worst) & jnp.isfinite(error))
        back = walker._replace(momentum=-walker.momentum)
        walker = jax.tree_util.tree_map(lambda old, new: jnp.where(is_lost, old, new), back, moved)
        v = linear_map.displacement(walker.x)
        columns = columns_fn(v, walker.gradient, walker.x, jnp.where(is_lost, force, pulled))
        return walker, (walker.excess, v @ v, columns, jnp.where(is_lost, worst, error), is_lost)

    def one_step(carry, index):
        walkers, tuning = carry
        walkers, (excess, radius2, columns, error, lost) = jax.vmap(
            advance, in_axes=(0, 0, None, None)
        )(walkers, keys, tuning.step, index)
        kept = ~lost  # a step that was taken back says nothing of how long steps may be
        error = jnp.sum(jnp.where(kept, error**2, 0.0)) / jnp.maximum(jnp.sum(kept), 1)
        is_clean = index % held == held - 1  # the block at both ends is the same
        tuned = _adapt(tuning, error, energy_error)
        tuning = jax.tree_util.tree_map(
            lambda new, old: jnp.where(is_clean, new, old), tuned, tuning
        )
        return (walkers, tuning), (
            excess,
            radius2,
            columns,
            jnp.where(is_clean, error, jnp.nan),
            jnp.mean(lost),
        )

    def one_bin(carry, start):
        carry, (excess, radius2, columns, error, lost) = jax.lax.scan(
            one_step, carry, start + jnp.arange(bin_length)
        )
        return carry, Record(
            excess.mean(0), radius2.mean(0), columns.mean(0), jnp.nanmean(error), lost.mean()
        )

    starts = first + bin_length * jnp.arange(bins)
    (walkers, tuning), record = jax.lax.scan(one_bin, (walkers, tuning), starts)
    swapped = record._replace(
        llc=record.llc.T, radius2=record.radius2.T, virial=jnp.swapaxes(record.virial, 0, 1)
    )
    return walkers, tuning, swapped


def _kinetic(momentum: Float[Array, " dim"]) -> Scalar:
    return 0.5 * jnp.sum(momentum**2)


def _adapt(tuning: Tuning, error: Scalar, target: Scalar) -> Tuning:
    """Move the step size to where the mean energy error, which grows as its sixth power, meets the target."""
    ratio = jnp.minimum(error / target, 1e6) + 1e-8
    weight = jnp.exp(-0.5 * (jnp.log(ratio) / WIDTH) ** 2)
    memory = jnp.minimum(FIRST_MEMORY + tuning.count, LAST_MEMORY)
    decay = (memory - 1) / (memory + 1)
    total = decay * tuning.total + weight * ratio / tuning.step**6
    weights = decay * tuning.weight + weight
    step = jnp.clip((total / weights) ** (-1 / 6), SHRINK * tuning.step, GROW * tuning.step)
    dtype = tuning.step.dtype
    return Tuning(step.astype(dtype), total.astype(dtype), weights.astype(dtype), tuning.count + 1)


def refresh(evaluate, anchor: Anchor, walkers: Walker, keys: Keys, index: Int[Array, ""]) -> Walker:
    """Evaluate the walkers anew, on the block that their next step begins with."""
    num_blocks = anchor.block_loss.shape[0]

    def one(walker: Walker, key: Key) -> Walker:
        block = jax.random.randint(jax.random.fold_in(key, index // HOLD), (), 0, num_blocks)
        return evaluate(anchor, walker.x, walker.momentum, block)

    return jax.vmap(one)(walkers, keys)
