"""Temperature of the mixture weights and entropy bonus, where they change during a fit."""

import jax.numpy as jnp

from fastvi._typing import Array, Int, Scalar
from fastvi.config import VIConfig


def annealed(config: VIConfig, step: Int[Array, ""]) -> tuple[Scalar, Scalar]:
    """Return the temperature and the entropy bonus of a step, in the fit's dtype.

    The temperature falls linearly to 1, the bonus ends at once.
    """
    config = config.filled
    temperature, bonus = config.alpha_temperature, config.entropy_bonus
    if config.alpha_temperature_frac > 0:
        left = jnp.maximum(
            1 - step.astype(config.dtype) / (config.alpha_temperature_frac * config.steps), 0.0
        )
        temperature = 1 + (config.alpha_temperature - 1) * left
    if config.entropy_bonus_steps is not None:
        bonus = jnp.where(step < config.entropy_bonus_steps, bonus, 0.0)
    return jnp.asarray(temperature, config.dtype), jnp.asarray(bonus, config.dtype)
