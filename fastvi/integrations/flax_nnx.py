"""A flax nnx model as `fastvi.estimate_llc` takes it."""

from collections.abc import Callable
from typing import Any

from fastvi._optional import import_optional
from fastvi._typing import Array, Batch, PyTree, Scalar

Loss = Callable[[Array, Array], Scalar]


def nnx_loss(model: Any, loss: Loss) -> tuple[Callable[[PyTree, Batch], Any], PyTree]:
    """Make a loss of a model's `nnx.Param` variables; all others stay as they are.

    Put the model into evaluation mode first (`model.eval()`), where dropout or batch statistics
    matter.

    Args:
        model: An `nnx.Module`, called on inputs.
        loss: `(outputs, targets) -> mean loss per example`, in nats.

    Returns:
        `(params, (inputs, targets)) -> mean loss per example`, and the parameters.

    Raises:
        MissingExtraError: If flax is not installed.
    """
    nnx = import_optional("flax.nnx", extra="flax", distribution="flax", purpose="nnx_loss")
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: PyTree, batch: Batch) -> Any:
        inputs, targets = batch
        return loss(nnx.merge(graph, params, rest)(inputs), targets)

    return loss_fn, params
