"""Drop mixture components that carry too little weight, without changing a shape."""

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Bool, Float, PyTree
from fastvi.config import VIConfig
from fastvi.families.mfa import MFAParams
from fastvi.fitting.optimizer import MomentState


def kept_components(
    weights: Float[Array, " comp"], threshold: float | None, cap: int | None
) -> Bool[Array, " comp"]:
    """Choose the most components whose renormalised weights all reach `threshold`, at most `cap`, at least one.

    The lightest goes first and the others share its weight, so that equal weights below the
    threshold do not all go.
    """
    order = jnp.argsort(-weights, stable=True)
    ordered = weights[order]
    share = ordered / jnp.cumsum(ordered)  # of the lightest, if it and the heavier ones are kept
    rank = jnp.arange(weights.size)
    keep = (share >= (threshold or 0.0)) & (ordered > 0) & (rank < (cap or weights.size))
    return jnp.zeros_like(keep).at[order].set(keep | (rank == 0))


def prune(params: MFAParams, opt_state: PyTree, weights: Float[Array, " comp"], config: VIConfig):
    """Give pruned components a logit of minus infinity, hence no weight, and forget their moments.

    A pruned component stays so: no gradient brings its logit back. Factors keep their ranks.

    Returns:
        The parameters and the optimiser's state.
    """
    keep = kept_components(weights, config.filled.prune_threshold, config.mixture_cap)
    params = params._replace(logits=jnp.where(keep, params.logits, -jnp.inf))
    is_moments = lambda node: isinstance(node, MomentState)  # noqa: E731
    return params, jax.tree_util.tree_map(
        lambda node: _forget(node, keep) if is_moments(node) else node,
        opt_state,
        is_leaf=is_moments,
    )


def _forget(moments: MomentState, keep: Bool[Array, " comp"]) -> MomentState:
    """Reset the moments of the components that are not kept to those of the start."""

    def reset(per_component: MFAParams, initial: float) -> MFAParams:
        def choose(leaf):
            if leaf.shape[0] == 0:
                return leaf
            return jnp.where(
                keep.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.asarray(initial, leaf.dtype)
            )

        means_apart = per_component.offsets.shape[0] == keep.size and keep.size > 1
        return per_component._replace(
            logits=choose(per_component.logits),
            offsets=choose(per_component.offsets) if means_apart else per_component.offsets,
            factors=choose(per_component.factors),
        )

    return moments._replace(
        mean=reset(moments.mean, 0.0),
        square=reset(moments.square, 0.0),
        block_unseen=reset(moments.block_unseen, 1.0),
    )
