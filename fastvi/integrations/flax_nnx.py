"""A flax nnx model as `fastvi.estimate_llc` takes it."""

from typing import Any

from fastvi._optional import import_optional
from fastvi._typing import PyTree
from fastvi.integrations.outputs import OutputLoss, ParamsLoss, loss_of_params


def nnx_loss(model: Any, loss: OutputLoss) -> tuple[ParamsLoss, PyTree]:
    """Make a loss of a model's `nnx.Param` variables; all others stay as they are.

    Put the model into evaluation mode first (`model.eval()`), where dropout or batch statistics
    matter.

    Args:
        model: An `nnx.Module`, called on inputs.
        loss: `(outputs, targets)` to the mean loss, to one loss for each example, or to (losses,
            weights), in nats.

    Returns:
        The loss of `(params, (inputs, targets))`, and the parameters.

    Raises:
        MissingExtraError: If flax is not installed.
    """
    nnx = import_optional("flax.nnx", extra="flax", distribution="flax", purpose="nnx_loss")
    # The last filter takes what is left: statistics of batches, keys, caches.
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params: PyTree, inputs: Any) -> Any:
        return nnx.merge(graph, params, rest)(inputs)

    return loss_of_params(apply, loss), params
