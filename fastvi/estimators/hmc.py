"""Hamiltonian Monte Carlo on the local posterior, in the coordinates that a fitted q makes round."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Int, Key, Keys, Scalar
from fastvi.families.base import LinearMap
from fastvi.inference.loop import Problem
from fastvi.objective import FlatObjective, full_data_value_and_grad

TARGET_ACCEPTANCE = 0.8
TRAJECTORY = 1.6  # first mean length of a trajectory in q's standard deviations: a quarter of a period
SHORTEST = 0.5  # smallest step relative to the adapted one
MAX_LEAPFROG = 512
FIRST_STEP = 0.6  # times dim^(-1/4), the scaling of the optimal step in a round Gaussian
ADAPTATION_GAIN, ADAPTATION_DECAY = 0.6, 0.6  # Robbins-Monro on the log step: sum diverges, sum of squares does not


class Walker(NamedTuple):
    """A point with what the next trajectory needs: `excess` is L_n(w) - L_n(w*), `gradient` that of -log p in v."""

    x: Float[Array, " dim"]
    excess: Scalar
    potential: Scalar
    gradient: Float[Array, " dim"]


class Tuning(NamedTuple):
    """Step size, the trajectories that it has been adapted for, and the mean length of a trajectory."""

    log_step: Scalar
    count: Int[Array, ""]
    length: Scalar


class Record(NamedTuple):
    """What is kept of each trajectory: `llc` is nbeta (L_n - L_n(w*)), `virial` has mean zero under the posterior."""

    llc: Float[Array, " trajectories"]
    virial: Float[Array, "trajectories columns"]
    acceptance: Float[Array, " trajectories"]


def make_potential(objective: FlatObjective, problem: Problem, reference_loss: Scalar):
    """Return `(map, x) -> Walker`, one gradient on all data."""
    posterior = problem.posterior

    def evaluate(linear_map: LinearMap, x) -> Walker:
        v = linear_map.displacement(x)
        excess, gradient = full_data_value_and_grad(objective, posterior.center + v, problem.data, reference_loss)
        return Walker(x, excess, -posterior.log_density(v, excess), -posterior.log_density_grad(v, gradient))

    return evaluate


def run_trajectories(
    evaluate,
    linear_maps: LinearMap,
    walkers: Walker,
    tuning: Tuning,
    keys: Keys,
    first: Int[Array, ""],
    columns_fn,
    num,
) -> tuple[Walker, Tuning, Record, Int[Array, ""]]:
    """Run `num` trajectories of every walker in step, adapting one step size for all.

    Args:
        evaluate: From `make_potential`.
        linear_maps: One map for each walker, stacked.
        walkers: Their points, stacked.
        tuning: The step size.
        keys: One key for each walker.
        first: Index of the first trajectory.
        columns_fn: `(displacement, gradient, x, gradient in x) -> columns`, all of mean zero.
        num: Number of trajectories.

    Returns:
        Walkers, tuning, records with a leading axis of walkers, and the gradients that each walker took.

    References:
        Neal, MCMC Using Hamiltonian Dynamics (2011).
    """
    posterior_evaluate = jax.vmap(evaluate)

    def trajectory(carry, index):
        walkers, tuning, spent = carry
        chosen = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, index)))(keys)
        step, leaps = _plan(tuning, chosen[0, 1])
        momentum = jax.vmap(lambda key, x: jax.random.normal(key, x.shape, x.dtype))(chosen[:, 0], walkers.x)
        proposal, end = _leapfrog(posterior_evaluate, linear_maps, walkers, momentum, step, leaps)
        log_ratio = _energy(walkers, momentum) - _energy(proposal, end)
        probability = jnp.where(jnp.isfinite(log_ratio), jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
        accept = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(chosen[:, 1]) < probability
        walkers = jax.tree_util.tree_map(
            lambda new, old: jnp.where(accept.reshape(-1, *[1] * (new.ndim - 1)), new, old), proposal, walkers
        )
        displacement = jax.vmap(LinearMap.displacement)(linear_maps, walkers.x)
        pulled = jax.vmap(LinearMap.pull_back)(linear_maps, walkers.gradient)
        record = Record(walkers.excess, jax.vmap(columns_fn)(displacement, walkers, pulled, linear_maps), probability)
        return (walkers, _adapt(tuning, jnp.mean(probability)), spent + leaps), record

    (walkers, tuning, spent), record = jax.lax.scan(
        trajectory, (walkers, tuning, jnp.asarray(0)), first + jnp.arange(num)
    )
    return walkers, tuning, jax.tree_util.tree_map(lambda leaf: jnp.swapaxes(leaf, 0, 1), record), spent


def _plan(tuning: Tuning, key: Key) -> tuple[Scalar, Int[Array, ""]]:
    """Draw step size and number of steps: uneven, for narrow places, and so that no trajectory closes on itself."""
    jitter, stretch = jax.random.uniform(key, (2,))
    step = jnp.exp(tuning.log_step) * (SHORTEST + (1 - SHORTEST) * jitter)
    leaps = jnp.clip(jnp.ceil(tuning.length * (0.5 + stretch) / step), 1, MAX_LEAPFROG)
    return step, leaps.astype(jnp.int32)


def _leapfrog(evaluate, linear_maps: LinearMap, walkers: Walker, momentum, step, leaps):
    """Integrate Hamilton's equations with the identity as mass in round coordinates."""
    pull_back, step = jax.vmap(LinearMap.pull_back), step.astype(momentum.dtype)

    def leap(_, carry):
        walker, momentum, force = carry
        momentum = momentum - 0.5 * step * force
        walker = evaluate(linear_maps, walker.x + step * momentum)
        force = pull_back(linear_maps, walker.gradient)
        return walker, momentum - 0.5 * step * force, force

    force = pull_back(linear_maps, walkers.gradient)
    walkers, momentum, _ = jax.lax.fori_loop(0, leaps, leap, (walkers, momentum, force))
    return walkers, momentum


def _energy(walkers: Walker, momentum):
    return walkers.potential + 0.5 * jnp.sum(momentum**2, axis=-1)


def _adapt(tuning: Tuning, acceptance) -> Tuning:
    """Move the log step towards the target acceptance by a vanishing amount."""
    gain = ADAPTATION_GAIN * (tuning.count + 1.0) ** -ADAPTATION_DECAY
    change = gain * (acceptance - TARGET_ACCEPTANCE) / TARGET_ACCEPTANCE
    log_step = tuning.log_step + change.astype(tuning.log_step.dtype)
    return Tuning(log_step, tuning.count + 1, tuning.length)
