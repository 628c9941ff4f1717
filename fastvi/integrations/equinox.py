"""An equinox module as `fastvi.estimate_llc` takes it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from fastvi._typing import Array, Batch, PyTree, Scalar

Loss = Callable[[Array, Array], Scalar]


def equinox_loss(
    model: Any, loss: Loss, *, filter_spec: Any = eqx.is_inexact_array, batched: bool = False
) -> tuple[Callable[[PyTree, Batch], Any], PyTree]:
    """Make a loss of the part of a module that a filter selects; the rest stays as it is.

    Args:
        model: An equinox module, called on the inputs of one example.
        loss: `(outputs, targets) -> mean loss per example`, in nats, on a batch.
        filter_spec: What `equinox.partition` selects the parameters by.
        batched: Whether the module takes a batch of inputs itself.

    Returns:
        `(params, (inputs, targets)) -> mean loss per example`, and the parameters.
    """
    params, fixed = eqx.partition(model, filter_spec)

    def loss_fn(params: PyTree, batch: Batch) -> Any:
        inputs, targets = batch
        whole = eqx.combine(params, fixed)
        return loss(whole(inputs) if batched else jax.vmap(whole)(inputs), targets)

    return loss_fn, params
