"""The loss of a model's outputs, and the loss of its parameters that follows from it."""

from collections.abc import Callable
from typing import Any, TypeAlias

from fastvi._typing import Array, Batch, Float, PyTree, Scalar

# A mean over the batch, one loss for each example or each token of each example, or (losses,
# weights) of that shape; see `fastvi.target.losses`.
BatchLoss: TypeAlias = (
    Scalar | Float[Array, "examples ..."] | tuple[Float[Array, "..."], Float[Array, "..."]]
)
OutputLoss: TypeAlias = Callable[[Array, Array], BatchLoss]
ParamsLoss: TypeAlias = Callable[[PyTree, Batch], BatchLoss]


def loss_of_params(apply: Callable[[PyTree, Any], Any], loss: OutputLoss) -> ParamsLoss:
    """Return `(params, (inputs, targets)) -> loss(apply(params, inputs), targets)`."""

    def loss_fn(params: PyTree, batch: Batch) -> BatchLoss:
        inputs, targets = batch
        return loss(apply(params, inputs), targets)

    return loss_fn
