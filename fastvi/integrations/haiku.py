"""A transformed haiku function as `fastvi.estimate_llc` takes it."""

from collections.abc import Callable
from typing import Any

from fastvi._optional import import_optional
from fastvi._typing import Array, Batch, PyTree, Scalar

Loss = Callable[[Array, Array], Scalar]


def haiku_loss(
    transformed: Any, loss: Loss, *, state: PyTree = None, rng: Any = None
) -> Callable[[PyTree, Batch], Any]:
    """Make a loss of the parameters that `init` returned.

    Args:
        transformed: What `hk.transform` or `hk.transform_with_state` returned.
        loss: `(outputs, targets) -> mean loss per example`, in nats.
        state: The state of a function transformed with state; it is read and not updated.
        rng: Key of a function that draws; the same at every call, so that the loss is a function of the parameters.

    Returns:
        `(params, (inputs, targets)) -> mean loss per example`.

    Raises:
        MissingExtraError: If haiku is not installed.
    """
    haiku = import_optional("haiku", extra="haiku", distribution="dm-haiku", purpose="haiku_loss")
    with_state = isinstance(transformed, haiku.TransformedWithState)

    def loss_fn(params: PyTree, batch: Batch) -> Any:
        inputs, targets = batch
        if with_state:
            return loss(transformed.apply(params, state, rng, inputs)[0], targets)
        return loss(transformed.apply(params, rng, inputs), targets)

    return loss_fn
