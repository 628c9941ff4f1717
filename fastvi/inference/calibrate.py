"""Shrink an overwide start until the loss agrees with it."""

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Int, Key
from fastvi.families.base import AbstractFamily
from fastvi.inference.loop import Problem, evaluate_target
from fastvi.objective import FlatObjective

CALIBRATION_DRAWS = 8
MAX_ROUNDS = 16
WIDE = 1.5  # virial above which q reaches into steeper loss than its own curvature claims


def calibrate_scale(
    family: AbstractFamily, params, objective: FlatObjective, problem: Problem, key: Key
) -> tuple[object, Int[Array, ""]]:
    """Shrink q as a whole while its virial exceeds `WIDE`.

    The virial `E_q[v . (nbeta grad L + gamma v)] / dim` is 1 at the best scale; where the loss is homogeneous of
    degree D it grows as scale^D, so each round divides the scale by virial^(1/4), at most e. A quadratic start
    is left as it is.

    Returns:
        The parameters and the number of rounds, each of `CALIBRATION_DRAWS` minibatch gradients.
    """

    def measure(shift, key_round):
        shifted = params._replace(log_scale=params.log_scale + shift)
        key_draw, key_batch = jax.random.split(key_round)
        draws = family.sample(shifted, key_draw, CALIBRATION_DRAWS, antithetic=True)
        _, grad = evaluate_target(objective, problem.posterior, draws, problem.next_batch(key_batch))
        return -jnp.mean(jnp.sum(draws.displacement * grad, axis=-1)) / draws.displacement.shape[-1]

    def narrow(carry):
        shift, round_index, virial = carry
        shift = shift - jnp.clip(0.25 * jnp.log(jnp.maximum(virial, 1.0)), 0.05, 1.0)
        return shift, round_index + 1, measure(shift, jax.random.fold_in(key, round_index + 1))

    def too_wide(carry):
        _, round_index, virial = carry
        return (~(virial <= WIDE)) & (round_index < MAX_ROUNDS)

    zero = jnp.zeros((), params.log_scale.dtype)
    shift, rounds, _ = jax.lax.while_loop(
        too_wide, narrow, (zero, jnp.asarray(0), measure(zero, jax.random.fold_in(key, 0)))
    )
    return params._replace(log_scale=params.log_scale + shift), rounds + 1
