"""Adam on natural coordinates, a guard against outliers, and the learning-rate schedule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fastvi._typing import PyTree, Scalar
from fastvi.config import VIConfig

FINAL_RATE = 0.01  # last learning rate relative to the peak, for the decaying schedules
ADAM_B1 = 0.9
ADAM_B2 = 0.99
ADAM_EPS = 0.05  # entries of natural gradients are O(1) off the optimum; below eps, steps shrink with the gradient
TYPICAL_NORM_DECAY = 0.98
TRUNCATION_STEPS = 100.0  # steps after which the clipping bound starts to grow


class TypicalNormState(NamedTuple):
    """Running mean of the squared gradient norm."""

    mean_square: Scalar
    count: Scalar


def clip_by_typical_norm(max_ratio: float) -> optax.GradientTransformation:
    """Clip gradients whose norm exceeds `max_ratio` times the running root mean square of earlier norms.

    A bound in units of the gradient's own noise touches outliers only. A fixed bound on single-sample gradients,
    whose norm grows with the dimension, rescales nearly all of them and biases the fit. The bound grows with the square root of
    the number of steps, as for a truncated mean, so that heavy tails are cut early on but not in the limit.
    """

    def init(params):
        del params
        return TypicalNormState(jnp.zeros(()), jnp.zeros(()))

    def update(updates, state, params=None):
        del params
        norm = optax.tree.norm(updates)
        typical = jnp.sqrt(state.mean_square / jnp.maximum(1 - TYPICAL_NORM_DECAY**state.count, 1e-9))
        growth = jnp.sqrt(jnp.maximum(1.0, state.count / TRUNCATION_STEPS))
        bound = jnp.where(state.count > 0, max_ratio * growth * typical, norm)
        factor = jnp.where(norm > bound, bound / norm, 1.0)
        square = jnp.minimum(norm, bound) ** 2
        mean_square = TYPICAL_NORM_DECAY * state.mean_square + (1 - TYPICAL_NORM_DECAY) * square
        clipped = jax.tree_util.tree_map(lambda leaf: leaf * factor.astype(leaf.dtype), updates)
        return clipped, TypicalNormState(mean_square.astype(state.mean_square.dtype), state.count + 1)

    return optax.GradientTransformation(init, update)


class MomentState(NamedTuple):
    """First moment and mean of squares; the latter has a last axis of length 1 where a row shares it."""

    mean: PyTree
    square: PyTree
    count: Scalar
    unseen: Scalar  # weight of the zero that `square` started from


def scale_by_moments(shared_rows: PyTree) -> optax.GradientTransformation:
    """Adam, with one second moment for a whole row where `shared_rows` says so.

    A natural gradient points along steep and flat directions in the right proportion; dividing its entries by
    different numbers would mix them again, and one part in a hundred of a flat step is fatal in a direction
    that is a hundred times steeper. A shared second moment keeps the direction and saves the memory of the other.

    Second moments freeze as the schedule runs out (`elapsed`, an extra argument, goes to 1): with them fixed a
    step is linear in the gradient, so that heavy-tailed noise does not move the point of rest.

    Args:
        shared_rows: Pytree of bools in the structure of the parameters.

    References:
        Kingma & Ba, Adam (2015); Ginsburg et al., NovoGrad (2019), for moments shared by a layer.
    """

    def square(leaf, shared):
        return jnp.mean(leaf**2, axis=-1, keepdims=True) if shared else leaf**2

    def init(params):
        zero = jax.tree_util.tree_map(jnp.zeros_like, params)
        return MomentState(zero, jax.tree_util.tree_map(square, zero, shared_rows), jnp.zeros((), jnp.int32), jnp.ones(()))

    def update(updates, state, params=None, *, elapsed):
        del params
        count = state.count + 1
        gain = (1 - ADAM_B2) * (1 - elapsed) ** 2
        mean = jax.tree_util.tree_map(lambda m, g: ADAM_B1 * m + (1 - ADAM_B1) * g, state.mean, updates)
        squares = jax.tree_util.tree_map(
            lambda v, g, shared: v + gain.astype(v.dtype) * (square(g, shared) - v), state.square, updates, shared_rows
        )
        unseen = state.unseen * (1 - gain)
        first, second = 1 - ADAM_B1 ** count.astype(jnp.float32), 1 - unseen
        scaled = jax.tree_util.tree_map(
            lambda m, v: m * ((1 / first) / (jnp.sqrt(v / second) + ADAM_EPS)).astype(m.dtype), mean, squares
        )
        return scaled, MomentState(mean, squares, count, unseen)

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(config: VIConfig, shared_rows: PyTree) -> optax.GradientTransformation:
    """Return the gradient transformation of a fit; the caller multiplies by the learning rate."""
    guard = optax.identity() if config.clip_global_norm is None else clip_by_typical_norm(config.clip_global_norm)
    return optax.chain(optax.with_extra_args_support(guard), scale_by_moments(shared_rows))


class Horizon(NamedTuple):
    """The phases of a fit in steps: warm-up, then the peak rate, then decay from `decay_start` to `end`."""

    warmup: Scalar
    decay_start: Scalar
    end: Scalar


def elapsed_decay(horizon: Horizon, step: Scalar) -> Scalar:
    """Return the share of the decay phase that lies behind, from 0 to 1."""
    return jnp.clip((step - horizon.decay_start) / jnp.maximum(horizon.end - horizon.decay_start, 1), 0.0, 1.0)


def learning_rate(config: VIConfig, horizon: Horizon, step: Scalar) -> Scalar:
    """Evaluate the schedule; it reaches `FINAL_RATE` times the peak at the end of the horizon."""
    warm = jnp.minimum(1.0, (step + 1) / jnp.maximum(horizon.warmup, 1))
    elapsed = elapsed_decay(horizon, step)
    if config.lr_schedule == "cosine":
        decay = optax.schedules.cosine_decay_schedule(1.0, 1, alpha=FINAL_RATE)(elapsed)
    elif config.lr_schedule == "linear_decay":
        decay = optax.schedules.linear_schedule(1.0, FINAL_RATE, 1)(elapsed)
    else:
        decay = 1.0
    return config.lr * warm * decay
