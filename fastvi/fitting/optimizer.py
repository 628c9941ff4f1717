"""Adam on natural coordinates, and a guard against outliers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fastvi._typing import Array, PyTree, Scalar
from fastvi.families.updates import Blocks, UpdateRules

ADAM_B1 = 0.9  # of Kingma & Ba
ADAM_B2 = 0.99  # second moments are means over 100 steps, since a fit has some hundreds
TYPICAL_NORM_DECAY = 0.98  # a mean over 50 steps
TRUNCATION_STEPS = 100.0  # steps after which the clipping bound starts to grow


class TypicalNormState(NamedTuple):
    """Running mean of the squared gradient norm."""

    mean_square: Scalar
    count: Scalar


def clip_by_typical_norm(max_ratio: float) -> optax.GradientTransformation:
    """Clip gradients longer than `max_ratio` times the root mean square of earlier norms.

    A bound in units of the gradient's own noise touches outliers only. A fixed bound on
    single-sample gradients, whose norm grows with the dimension, rescales nearly all of them and
    biases the fit. The bound grows with the square root of the number of steps, as for a truncated
    mean, so that heavy tails are cut early on but not in the limit.
    """

    def init(params):
        return TypicalNormState(jnp.zeros(()), jnp.zeros(()))

    def update(updates, state, params=None):
        norm = gradient_norm(updates)
        # The zeros of the start weigh decay^count in the running mean, as in Adam.
        typical = jnp.sqrt(
            state.mean_square / jnp.maximum(1 - TYPICAL_NORM_DECAY**state.count, 1e-9)
        )
        growth = jnp.sqrt(jnp.maximum(1.0, state.count / TRUNCATION_STEPS))
        # nothing is known before the first gradient, which passes as it is
        bound = jnp.where(state.count > 0, max_ratio * growth * typical, norm)
        # A NaN exceeds no bound: it passes, and shows.
        factor = jnp.where(norm > bound, bound / norm, 1.0)
        # an outlier raises the typical norm no further than to the bound
        square = jnp.minimum(norm, bound) ** 2
        mean_square = TYPICAL_NORM_DECAY * state.mean_square + (1 - TYPICAL_NORM_DECAY) * square
        return scale(updates, factor.astype(norm.dtype)), TypicalNormState(
            mean_square.astype(state.mean_square.dtype), state.count + 1
        )

    return optax.GradientTransformation(init, update)


def scale(updates: PyTree, factor: Array | float) -> PyTree:
    """Multiply a gradient by a number, blocks included."""
    return jax.tree_util.tree_map(
        lambda leaf: leaf.scaled(factor) if _is_blocks(leaf) else leaf * factor,
        updates,
        is_leaf=_is_blocks,
    )


def gradient_norm(updates: PyTree) -> Scalar:
    """Return the global norm of a gradient, blocks included."""
    leaves = jax.tree_util.tree_leaves(updates, is_leaf=_is_blocks)
    return jnp.sqrt(
        sum(leaf.square_norm() if _is_blocks(leaf) else jnp.sum(leaf**2) for leaf in leaves)
    )


class MomentState(NamedTuple):
    """Moments in the structure of the parameters.

    `square` has a last axis of length 1 where a row shares it. `unseen` is the weight that the
    zeros of the start still have in mean and square, and `block_unseen` that in the square of each
    block of the leaves that are updated block by block (empty for the others). Those have no first
    moment.
    """

    mean: PyTree
    square: PyTree
    unseen: tuple[Scalar, Scalar]
    block_unseen: PyTree


def scale_by_moments(rules: UpdateRules) -> optax.GradientTransformationExtraArgs:
    """Adam, with one second moment for a whole row where the rules say so.

    It is lazy where gradients are `Blocks`.

    A natural gradient points along steep and flat directions in the right proportion; dividing its
    entries by different numbers would mix them again, and one part in a hundred of a flat step is
    fatal in a direction that is a hundred times steeper. A shared second moment keeps the direction
    and saves the memory of the other.

    A `Blocks` gradient touches the second moments of its blocks alone, as if time stood still
    between their draws.

    Second moments freeze as the schedule runs out (`elapsed`, an extra argument, goes to 1): with
    them fixed a step is linear in the gradient, so that heavy-tailed noise does not move the point
    of rest.

    References:
        Kingma & Ba, Adam (2015); Ginsburg et al., NovoGrad (2019), for moments shared by a layer.
    """

    def init(params):
        zero = jax.tree_util.tree_map(jnp.zeros_like, params)
        return MomentState(
            mean=jax.tree_util.tree_map(
                lambda leaf, blocked: jnp.zeros(0, leaf.dtype) if blocked else leaf,
                zero,
                rules.blocked,
            ),
            square=jax.tree_util.tree_map(_square, zero, rules.shared_rows),
            unseen=(jnp.ones(()), jnp.ones(())),
            block_unseen=jax.tree_util.tree_map(
                lambda leaf, blocked: jnp.ones(leaf.shape[0] if blocked else 0, leaf.dtype),
                params,
                rules.blocked,
            ),
        )

    def update(updates, state, params=None, **extra_args):
        # goes to zero with the schedule, at which second moments stand still
        gain = (1 - ADAM_B2) * (1 - jnp.asarray(extra_args["elapsed"])) ** 2
        unseen = (
            ADAM_B1 * state.unseen[0],
            ((1 - gain) * state.unseen[1]).astype(state.unseen[1].dtype),
        )
        correction = (1 / (1 - unseen[0]), 1 / (1 - unseen[1]))
        treedef = jax.tree_util.tree_structure(updates, is_leaf=_is_blocks)
        trees = (
            updates,
            state.mean,
            state.square,
            state.block_unseen,
            rules.shared_rows,
            rules.damping,
        )
        stepped = [
            _step_blocks(leaf, mean, square, waiting, shared, damping, gain)
            if _is_blocks(leaf)
            else (*_step(leaf, mean, square, shared, damping, gain, correction), waiting)
            for leaf, mean, square, waiting, shared, damping in zip(
                *map(treedef.flatten_up_to, trees), strict=True
            )
        ]
        scaled, mean, square, waiting = (
            treedef.unflatten(column) for column in zip(*stepped, strict=True)
        )
        return scaled, MomentState(mean, square, unseen, waiting)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_blocks(leaf) -> bool:
    return isinstance(leaf, Blocks)


def _square(leaf, shared):
    return jnp.mean(leaf**2, axis=-1, keepdims=True) if shared else leaf**2


def _step(gradient, mean, square, shared, damping, gain, correction):
    """Advance the moments of one leaf; return the scaled gradient and the moments."""
    gain, first, second = (scalar.astype(gradient.dtype) for scalar in (gain, *correction))
    mean = ADAM_B1 * mean + (1 - ADAM_B1) * gradient
    square = square + gain * (_square(gradient, shared) - square)
    return mean * (first / (jnp.sqrt(square * second) + damping)), mean, square


def _step_blocks(gradient: Blocks, mean, square, unseen, shared, damping, gain):
    """Scale the blocks that the gradient names by their own second moments, one after another.

    There is no first moment: averaging happens in the parameters, and an array as large as they are
    need not be moved.
    """
    if not shared:
        raise ValueError("blocks need second moments that their rows share.")
    factors, gain = [], gain.astype(square.dtype)
    squares = gradient.row_squares()[..., None] / gradient.right.shape[-1]
    # In turn, since two draws may be of one component.
    for index, own in zip(gradient.index, squares, strict=True):
        left = _read(unseen, index) * (1 - gain)
        moment = _read(square, index)
        moment = moment + gain * (own - moment)
        factors.append(1 / (jnp.sqrt(moment / (1 - left)) + damping))
        square = square.at[index].set(moment, mode="promise_in_bounds")
        unseen = unseen.at[index].set(left, mode="promise_in_bounds")
    # a row's number scales an entry of every left vector
    factor = jnp.swapaxes(jnp.stack(factors), -1, -2)
    return gradient.scaled(factor), mean, square, unseen


def _read(whole, index):
    # The family draws the index of a component that exists.
    return whole.at[index].get(mode="promise_in_bounds")


def make_optimizer(
    max_ratio: float | None, rules: UpdateRules
) -> optax.GradientTransformationExtraArgs:
    """Return the gradient transformation of a fit; the caller multiplies by the learning rate.

    Args:
        max_ratio: Longest gradient relative to the typical norm; None: no bound.
        rules: How each parameter is treated.
    """
    guard = optax.identity() if max_ratio is None else clip_by_typical_norm(max_ratio)
    return optax.chain(optax.with_extra_args_support(guard), scale_by_moments(rules))
