"""What a training loop keeps beside the parameters, and is none: refused by name."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax

from fastvi._errors import DataError
from fastvi._typing import PyTree

# Beside `opt_state`, what train states of flax, optimizers of nnx and people's own have.
MODEL_FIELDS = ("params", "model", "tx")


def refuse_training_state(params: PyTree) -> None:
    """Refuse train states, optimiser states and states of layers among the parameters.

    Their arrays are floating-point numbers, which would be moved as if they were weights.

    Raises:
        DataError: If there are some.
    """
    for path, reason in _found(params):
        raise DataError(f"params{jax.tree_util.keystr(path)} is {reason}")


def refuse_varying_optimiser(params: PyTree, varying: Sequence[Any]) -> None:
    """Refuse a mask that lets numbers of an optimiser vary, which have the names of weights.

    Args:
        params: Parameters, perhaps within a train state.
        varying: Of each leaf whether it varies: False, or anything else.

    Raises:
        DataError: If it does.
    """
    states = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_of_optimiser)[0]
    places = [path for path, node in states if _is_of_optimiser(node)]
    leaves = jax.tree_util.tree_flatten_with_path(params)[0] if places else []
    for (path, _), which in zip(leaves, varying if places else (), strict=True):
        if which is not False and any(path[: len(place)] == place for place in places):
            raise DataError(
                f"param_mask lets params{jax.tree_util.keystr(path)} vary, which is an optimiser's "
                "state. Pass the parameters alone, such as state.params."
            )


def _found(params: PyTree) -> list[tuple[Any, str]]:
    """Return the outermost nodes that are no parameters: where, and what they are."""
    nodes = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: _reason(node) is not None
    )[0]
    reasons = [(path, _reason(node)) for path, node in nodes]
    return [(path, reason) for path, reason in reasons if reason is not None]


def _reason(node: Any) -> str | None:
    """Say what a node is that is no parameter, and what to pass instead."""
    kind = type(node).__name__
    if hasattr(node, "opt_state") and any(hasattr(node, name) for name in MODEL_FIELDS):
        return f"a train state, {kind}. Pass its parameters alone, such as state.params."
    if isinstance(node, Mapping) and {"params", "opt_state"} <= set(node):
        return 'the dict of a train state. Pass its parameters alone, state["params"].'
    if isinstance(node, Mapping) and {"params", "batch_stats"} <= set(node):
        return (
            'what init returned, with batch statistics. Pass variables["params"], and close over '
            "the statistics in loss_fn, as fastvi.integrations.flax_linen.linen_loss does."
        )
    if _is_of_optimiser(node):
        return f"an optimiser's state, {kind}. Of (params, opt_state) pass the parameters alone."
    # whoever passes one has imported flax
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(node, nnx.BatchStat):
        return (
            "a batch statistic of an nnx model. Pass what fastvi.integrations.flax_nnx.nnx_loss("
            "model, loss) returns, or nnx.state(model, nnx.Param) and a loss that merges it."
        )
    if isinstance(node, eqx.nn.State):
        return (
            "the state of an equinox model. Pass the model, and close over the state in loss_fn, "
            "as fastvi.integrations.equinox.equinox_loss(model, loss, state=state) does."
        )
    return None


def _is_of_optimiser(node: Any) -> bool:
    return type(node).__module__.partition(".")[0] == "optax"
