"""A flax nnx model as `fastvi.estimate_llc` takes it."""

from typing import Any

import jax

from fastvi._errors import DataError
from fastvi._optional import import_optional
from fastvi._typing import PyTree
from fastvi.integrations.modes import training_mode
from fastvi.integrations.names import few
from fastvi.integrations.outputs import OutputLoss, ParamsLoss, loss_of_params


def nnx_loss(model: Any, loss: OutputLoss, *, wrt: Any = None) -> tuple[ParamsLoss, PyTree]:
    """Make a loss of a model's parameters; its other variables stay as they are.

    A variable that several layers share is one parameter, whose gradient is the sum of theirs.

    Args:
        model: An `nnx.Module` in evaluation mode (`model.eval()`), called on inputs.
        loss: `(outputs, targets)` to the mean loss, to one loss for each example, or to (losses,
            weights), in nats.
        wrt: The filter of the variables that vary, as `nnx.Optimizer` takes it; `nnx.Param` when
            left out.

    Returns:
        The loss of `(params, (inputs, targets))`, and the parameters. The loss raises `DataError`
        where the model draws random numbers or updates statistics of batches.

    Raises:
        DataError: If this is no nnx module, such as an optimizer that holds one.
        MissingExtraError: If flax is not installed.
    """
    nnx = import_optional("flax.nnx", extra="flax", distribution="flax", purpose="nnx_loss")
    _check_model(nnx, model)
    # The last filter takes what is left: statistics of batches, keys, caches.
    graph, params, rest = nnx.split(model, nnx.Param if wrt is None else wrt, ...)
    drawn_or_updated = nnx.Any(nnx.RngState, nnx.BatchStat)

    def apply(params: PyTree, inputs: Any) -> Any:
        # nnx writes into variables that it is given: these are of this call alone.
        mine = nnx.merge(graph, *jax.tree_util.tree_map(lambda leaf: leaf, (params, rest)))
        before = nnx.state(mine, drawn_or_updated)
        values = dict(_leaves(before))
        outputs = mine(inputs)
        _refuse_changes(values, dict(_leaves(nnx.state(mine, drawn_or_updated))))
        return outputs

    return loss_of_params(apply, loss), params


def _check_model(nnx: Any, model: Any) -> None:
    if isinstance(model, nnx.Optimizer):
        # Of the optimizers of nnx only one holds its model.
        its = "optimizer.model" if hasattr(model, "model") else "the model that it updates"
        raise DataError(f"model is an optimizer, {type(model).__name__}. Pass {its}.")
    if not isinstance(model, nnx.Module):
        raise DataError(
            f"model must be an nnx.Module; got {type(model).__name__}. Of (graph, state) pass "
            "nnx.merge(graph, state); for linen use linen_loss."
        )


def _leaves(state: PyTree) -> list[tuple[str, Any]]:
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return [(jax.tree_util.keystr(path).removesuffix(".value"), leaf) for path, leaf in flat]


def _refuse_changes(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Refuse a model that wrote: an array that nobody writes is the same object afterwards."""
    changed = [name for name, leaf in before.items() if after.get(name) is not leaf]
    if changed:
        raise training_mode(
            f"a call changes {few(changed)} (dropout draws, batch normalisation updates its "
            "statistics)",
            "Call model.eval() before nnx_loss(model, loss).",
        )
