"""One step of underdamped Langevin dynamics, for walkers side by side.

A step is half a kick, half a drift, friction and noise, half a drift, half a kick (BAOAB): it
samples the positions of a quadratic potential without bias, and nothing is rejected. Positions are
*round* coordinates, in which q has unit covariance. `first_half_step` says where the potential is
wanted, whoever computes gradients evaluates it there, and `second_half_step` ends the step.

References:
    Leimkuhler & Matthews, Molecular Dynamics (2015).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Bool, Float, Scalar, Vectors
from fastvi._vectors import scale_rows, shape_of, sum_rows
from fastvi.sampling.tuning import HOLD, is_runaway

# Share of the kinetic energy along the spread that friction takes off in a step, at most: momenta
# keep their sign. Half leaves more for later steps; at 1, momenta along the spread are stopped.
MOST_TAKEN = 0.9
# What a walker owes, at most. At half, more of what rare examples heat is left; at double, walkers
# move in round directions under friction that is due elsewhere for twice as many steps.
MOST_OWED = 4.0


class Evaluation(NamedTuple):
    """What a walker is told of the position where it is.

    `potential` is `-log p` in nats, up to a constant, and `gradient` its gradient in round
    coordinates. `observed` is what a run averages there: any pytree of arrays with a leading axis
    of walkers. `spread` is a draw of the noise of the gradient, independent of the noise that it
    has; None where it has none, or where what it heats is left.
    """

    potential: Float[Array, " walkers"]
    gradient: Vectors
    observed: Any
    spread: Vectors | None = None


class State(NamedTuple):
    """Walkers between two steps: all that the next step needs.

    `owed` is the friction along spreads that steps so far have left to later ones.
    """

    position: Vectors
    momentum: Vectors
    here: Evaluation
    owed: Float[Array, " walkers"] | None = None


class HalfStep(NamedTuple):
    """Walkers half-way through a step, where their potential is evaluated next.

    `heat` is the energy that friction and noise have put in; `owed` as in `State`.
    """

    position: Vectors
    momentum: Vectors
    heat: Float[Array, " walkers"]
    owed: Float[Array, " walkers"] | None


class Info(NamedTuple):
    """What a step says of itself: its energy error in nats, and whether it was taken back."""

    energy_error: Float[Array, " walkers"]
    is_returned: Bool[Array, " walkers"]


def first_half_step(
    state: State,
    step: Scalar | float,
    friction_time: Scalar | float,
    noise: Vectors,
) -> HalfStep:
    """Kick, drift, let friction and noise act, and drift again.

    Args:
        state: The walkers.
        step: Step size, in standard deviations of q.
        friction_time: Time after which a momentum is forgotten, in the same unit.
        noise: Independent standard normals.

    Returns:
        The walkers at the position where the potential is to be evaluated.
    """
    before = state.momentum - 0.5 * step * state.here.gradient
    # the exact solution of friction and noise over the step: momenta stay standard normal
    kept = jnp.exp(-step / jnp.asarray(friction_time))
    cooled, owed = take_heat_off(before, state.here.spread, state.owed, step)
    after = kept * cooled + jnp.sqrt(1 - kept**2) * noise
    # Both halves of the drift at once: friction acts between them and moves nothing.
    position = state.position + 0.5 * step * (before + after)
    return HalfStep(position, after, kinetic_energy(after) - kinetic_energy(before), owed)


def take_heat_off(
    momentum: Vectors,
    spread: Vectors | None,
    owed: Float[Array, " walkers"] | None,
    step: Scalar | float,
) -> tuple[Vectors, Float[Array, " walkers"] | None]:
    """Take as much energy off the momenta as the noise of gradients puts in, where it puts it in.

    Noise of covariance C that is held for `HOLD` steps adds `HOLD step^2 C` to the covariance of
    the momenta in each step. Friction along a draw of this noise, by the share
    `HOLD step^2 |spread|^2` of the energy there, takes the same off in the mean over draws: in
    every direction, whatever C is at the walker. What would be more than `MOST_TAKEN` is owed.

    Args:
        momentum: Momenta after half a kick.
        spread: As in `Evaluation`; where None, nothing is done.
        owed: As in `State`.
        step: Step size.

    Returns:
        The momenta, and what is owed then.

    References:
        Shang, Zhu, Leimkuhler & Storkey, Covariance-controlled adaptive Langevin thermostat (2015),
        who average the covariance instead of drawing from it.
    """
    if spread is None or owed is None:
        return momentum, owed
    size = sum_rows(spread**2)
    # a blank evaluation has no spread, and a step of length zero takes nothing off
    is_noisy = (size > 0) & (jnp.asarray(step) > 0)
    due = owed + HOLD * step**2 * size
    taken = jnp.where(is_noisy, jnp.minimum(due, MOST_TAKEN), 0.0)
    along = sum_rows(momentum * spread) / jnp.where(is_noisy, size, 1.0)
    cooled = momentum - scale_rows((1 - jnp.sqrt(1 - taken)) * along, spread)
    return cooled, jnp.minimum(due - taken, MOST_OWED)


def second_half_step(
    state: State,
    half: HalfStep,
    there: Evaluation,
    step: Scalar | float,
    is_same_data: Bool[Array, ""] | bool,
) -> tuple[State, Info]:
    """Kick with the gradient at the new position, and take the step back where it met a wall.

    The energy error is the change of the energy less the heat. A step that is taken back ends where
    it began, with the momentum reversed. A step of length zero only evaluates: it moves nothing and
    is never taken back.

    Args:
        state: The walkers before the step.
        half: What `first_half_step` returned.
        there: The potential at `half.position`.
        step: Step size, as in the first half.
        is_same_data: Whether both ends of the step were evaluated on the same data. Elsewhere the
            potential has changed for no fault of the step.

    Returns:
        The walkers after the step, and what it says of itself.
    """
    momentum = half.momentum - 0.5 * step * there.gradient
    gained = kinetic_energy(momentum) - kinetic_energy(state.momentum)
    error = there.potential - state.here.potential + gained - half.heat
    # the kick tells a wall from a change of data: it is large at walls alone
    kick = jnp.where(is_same_data, jnp.inf, kinetic_energy(0.5 * step * there.gradient))
    is_returned = jnp.asarray(step > 0) & is_runaway(error, kick, shape_of(state.position)[1])

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(is_returned.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

    # generalised HMC too reverses the momentum of a rejected step, to keep the posterior invariant
    moved = State(half.position, momentum, there, half.owed)
    back = state._replace(momentum=-state.momentum)
    return jax.tree_util.tree_map(chosen, moved, back), Info(error, is_returned)


def kinetic_energy(momentum: Vectors) -> Float[Array, " walkers"]:
    """Evaluate `|p|^2 / 2` of each walker."""
    return 0.5 * sum_rows(momentum**2)
