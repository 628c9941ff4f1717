"""Adam on natural coordinates, a guard against outliers, and the learning-rate schedule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fastvi._typing import Scalar
from fastvi.config import VIConfig

FINAL_RATE = 0.01  # last learning rate relative to the peak, for the decaying schedules
ADAM_B2 = 0.99
ADAM_EPS = 1e-3  # natural gradients are O(1) away from the optimum: below eps, steps shrink with the gradient
TYPICAL_NORM_DECAY = 0.98


class TypicalNormState(NamedTuple):
    """Running mean of the squared gradient norm."""

    mean_square: Scalar
    count: Scalar


def clip_by_typical_norm(max_ratio: float) -> optax.GradientTransformation:
    """Clip gradients whose norm exceeds `max_ratio` times the running root mean square of earlier norms.

    A bound in units of the gradient's own noise touches outliers only. A fixed bound on single-sample gradients, whose norm
    grows with the dimension, rescales nearly all of them and biases the fit.
    """

    def init(params):
        del params
        return TypicalNormState(jnp.zeros(()), jnp.zeros(()))

    def update(updates, state, params=None):
        del params
        norm = optax.tree.norm(updates)
        typical = jnp.sqrt(state.mean_square / jnp.maximum(1 - TYPICAL_NORM_DECAY**state.count, 1e-9))
        bound = jnp.where(state.count > 0, max_ratio * typical, norm)
        factor = jnp.where(norm > bound, bound / norm, 1.0)
        square = jnp.minimum(norm, bound) ** 2
        mean_square = TYPICAL_NORM_DECAY * state.mean_square + (1 - TYPICAL_NORM_DECAY) * square
        clipped = jax.tree_util.tree_map(lambda leaf: leaf * factor.astype(leaf.dtype), updates)
        return clipped, TypicalNormState(mean_square.astype(state.mean_square.dtype), state.count + 1)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: VIConfig) -> optax.GradientTransformation:
    """Return the gradient transformation of a fit; the caller multiplies by the learning rate."""
    guard = optax.identity() if config.clip_global_norm is None else clip_by_typical_norm(config.clip_global_norm)
    return optax.chain(guard, optax.scale_by_adam(b1=0.9, b2=ADAM_B2, eps=ADAM_EPS))


class Horizon(NamedTuple):
    """The phases of a fit in steps: warm-up, then the peak rate, then decay from `decay_start` to `end`."""

    warmup: Scalar
    decay_start: Scalar
    end: Scalar


def learning_rate(config: VIConfig, horizon: Horizon, step: Scalar) -> Scalar:
    """Evaluate the schedule; it reaches `FINAL_RATE` times the peak at the end of the horizon."""
    warm = jnp.minimum(1.0, (step + 1) / jnp.maximum(horizon.warmup, 1))
    length = jnp.maximum(horizon.end - horizon.decay_start, 1)
    elapsed = jnp.clip((step - horizon.decay_start) / length, 0.0, 1.0)
    if config.lr_schedule == "cosine":
        decay = optax.schedules.cosine_decay_schedule(1.0, 1, alpha=FINAL_RATE)(elapsed)
    elif config.lr_schedule == "linear_decay":
        decay = optax.schedules.linear_schedule(1.0, FINAL_RATE, 1)(elapsed)
    else:
        decay = 1.0
    return config.lr * warm * decay
