"""An equinox module as `fastvi.estimate_llc` takes it."""

from typing import Any

import equinox as eqx
import jax

from fastvi._errors import DataError
from fastvi._typing import PyTree
from fastvi.integrations.modes import training_mode
from fastvi.integrations.outputs import OutputLoss, ParamsLoss, loss_of_params


def equinox_loss(
    model: Any,
    loss: OutputLoss,
    *,
    filter_spec: Any = eqx.is_inexact_array,
    batched: bool = False,
    state: Any = None,
) -> tuple[ParamsLoss, PyTree]:
    """Make a loss of the part of a module that a filter selects; the rest stays as it is.

    Layers that `equinox.nn.Shared` ties have one parameter, whose gradient is the sum of theirs.

    Args:
        model: An equinox module in inference mode (`eqx.nn.inference_mode`), called on the inputs
            of one example.
        loss: `(outputs, targets)` to the mean loss, to one loss for each example, or to (losses,
            weights), in nats, on a batch.
        filter_spec: What `equinox.partition` selects the parameters by.
        batched: Whether the module takes a batch of inputs itself.
        state: The state of a module of `eqx.nn.make_with_state`, which is called as
            `model(inputs, state) -> (outputs, state)`; it is read and not updated.

    Returns:
        The loss of `(params, (inputs, targets))`, and the parameters.

    Raises:
        DataError: If the module is in training mode, cannot be called, or has a state that is not
            given.
    """
    _check_model(model, state)
    params, fixed = eqx.partition(model, filter_spec)

    def apply(params: PyTree, inputs: Any) -> Any:
        whole = eqx.combine(params, fixed)
        # An equinox module takes one example by convention.
        if state is None:
            return whole(inputs) if batched else jax.vmap(whole)(inputs)
        # A state that a layer replaces cannot be read again: each call has its own.
        mine = jax.tree_util.tree_map(lambda leaf: leaf, state)
        if batched:
            return whole(inputs, mine)[0]
        return jax.vmap(lambda one: whole(one, mine)[0])(inputs)

    return loss_of_params(apply, loss), params


def _check_model(model: Any, state: Any) -> None:
    if not callable(model):
        raise DataError(
            f"model must be an equinox module that can be called; got {type(model).__name__}. Of "
            "(model, opt_state) pass the model, of (model, state) equinox_loss(model, loss, "
            "state=state)."
        )
    nodes = _nodes(model)
    training = {type(node).__name__: None for node in nodes if _is_training(node)}
    if training:
        raise training_mode(
            f"{', '.join(training)} would draw or take statistics of the batch",
            "Pass eqx.nn.inference_mode(model).",
        )
    if state is None and any(isinstance(node, eqx.nn.StateIndex) for node in nodes):
        raise DataError(
            "the model has layers with a state. Pass it, as in equinox_loss(model, loss, "
            "state=state), from model, state = eqx.nn.make_with_state(...)(...) after training."
        )
    if state is not None and not isinstance(state, eqx.nn.State):
        raise DataError(f"state must be an eqx.nn.State; got {type(state).__name__}.")


def _nodes(model: Any) -> list[Any]:
    """Return the module and all that is in it."""
    found: list[Any] = []
    jax.tree_util.tree_leaves(model, is_leaf=lambda node: found.append(node) is not None)
    return found


def _is_training(node: Any) -> bool:
    """Say whether a layer is one that `inference_mode` would change, and its noise is not zero."""
    return getattr(node, "inference", None) is False and getattr(node, "p", None) != 0
