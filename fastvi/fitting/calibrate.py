"""Shrink an overwide start until the loss agrees with it."""

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Int, Key, Scalar
from fastvi.evaluation.errors import virial
from fastvi.families.base import AbstractFamily
from fastvi.kernels.noise import streams
from fastvi.target.data import Problem, evaluate_target
from fastvi.target.objective import FlatObjective

CALIBRATION_DRAWS = (
    32  # the virial of a Gaussian in d dimensions then has a standard deviation of sqrt(1 / (8 d))
)
MAX_ROUNDS = 16
WIDE = 1.5  # virial above which q reaches into steeper loss than its own curvature claims


def calibrate_scale(
    family: AbstractFamily, params, objective: FlatObjective, problem: Problem, key: Key
) -> tuple[Scalar, Int[Array, ""]]:
    """Shrink q as a whole while its virial exceeds `WIDE`.

    The virial `E_q[v . (nbeta grad L + gamma v)] / dim` is 1 at the best scale; where the loss is
    homogeneous of degree D it grows as scale^D, so each round divides the scale by virial^(1/4), at
    most e. A quadratic start is left as it is.

    Returns:
        The shift for `widened`, and the number of rounds, each of `CALIBRATION_DRAWS` minibatch
        gradients.
    """

    def adjust(carry):
        shift, round_index, _ = carry
        block = streams.step_noise(round_index)
        shifted = family.widened(params, shift)
        draws = family.sample(shifted, key, CALIBRATION_DRAWS, antithetic=True, block=block)
        _, grad = evaluate_target(
            objective,
            problem,
            draws.displacement,
            problem.next_batch(key, streams.step_batch(round_index)),
        )
        reach = virial(draws.displacement, grad)
        wide = ~(reach <= WIDE)
        step = jnp.clip(0.25 * jnp.log(jnp.where(wide, reach, 1.0)), 0.05, 1.0)
        return (
            shift - jnp.where(wide, jnp.where(jnp.isnan(step), 1.0, step), 0.0),
            round_index + 1,
            wide,
        )

    def unsettled(carry):
        _, round_index, wide = carry
        return wide & (round_index < MAX_ROUNDS)

    start = (jnp.zeros((), family.scale.dtype), jnp.asarray(0), jnp.asarray(True))
    shift, rounds, _ = jax.lax.while_loop(unsettled, adjust, start)
    return shift, rounds
