"""Drop mixture components that carry too little weight, without changing a shape."""

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Bool, Float, Int, PyTree, Scalar
from fastvi.families.base import AbstractFamily
from fastvi.fitting.optimizer import MomentState


def kept_components(
    weights: Float[Array, " comp"], least_weight: Scalar | float, most: Int[Array, ""] | int
) -> Bool[Array, " comp"]:
    """Choose as many components as renormalised weights allow that all reach `least_weight`.

    At most `most` stay, and one always does. The lightest goes first and the others share its
    weight, so that equal weights below the bound do not all go.
    """
    order = jnp.argsort(-weights, stable=True)
    ordered = weights[order]
    share = ordered / jnp.cumsum(ordered)  # of the lightest, if it and the heavier ones are kept
    rank = jnp.arange(weights.size)
    keep = (share >= least_weight) & (ordered > 0) & (rank < most)
    return jnp.zeros_like(keep).at[order].set(keep | (rank == 0))


def prune(
    family: AbstractFamily,
    params: PyTree,
    opt_state: PyTree,
    per_component: PyTree,
    least_weight: Scalar | float,
    most: Int[Array, ""] | int,
) -> tuple[PyTree, PyTree]:
    """Take the weight of light components, and forget their moments.

    A pruned component stays so: no gradient brings its weight back. Shapes stay.

    Args:
        family: The family.
        params: Its parameters.
        opt_state: The optimiser's state.
        per_component: Which parameters have a first axis of components, `UpdateRules`.
        least_weight: Weight below which a component goes.
        most: Most components that stay.

    Returns:
        The parameters and the optimiser's state.
    """
    keep = kept_components(jnp.exp(family.log_weights(params)), least_weight, most)
    forgotten = jax.tree_util.tree_map(
        lambda node: _forget(node, keep, per_component) if _is_moments(node) else node,
        opt_state,
        is_leaf=_is_moments,
    )
    return family.pruned(params, keep), forgotten


def _is_moments(node) -> bool:
    return isinstance(node, MomentState)


def _forget(moments: MomentState, keep: Bool[Array, " comp"], per_component) -> MomentState:
    """Reset the moments of the components that are not kept to those of the start."""

    def reset(tree: PyTree, initial: float) -> PyTree:
        def choose(leaf, has_components):
            # Leaves that are updated block by block have no first moment, and an empty leaf for it.
            if not has_components or leaf.shape[0] == 0:
                return leaf
            kept = jnp.expand_dims(keep, tuple(range(1, leaf.ndim)))
            return jnp.where(kept, leaf, jnp.asarray(initial, leaf.dtype))

        return jax.tree_util.tree_map(choose, tree, per_component)

    return moments._replace(
        mean=reset(moments.mean, 0.0),
        square=reset(moments.square, 0.0),
        block_unseen=reset(moments.block_unseen, 1.0),
    )
