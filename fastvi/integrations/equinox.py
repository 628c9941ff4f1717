"""An equinox module as `fastvi.estimate_llc` takes it."""

from typing import Any

import equinox as eqx
import jax

from fastvi._typing import PyTree
from fastvi.integrations.outputs import OutputLoss, ParamsLoss, loss_of_params


def equinox_loss(
    model: Any, loss: OutputLoss, *, filter_spec: Any = eqx.is_inexact_array, batched: bool = False
) -> tuple[ParamsLoss, PyTree]:
    """Make a loss of the part of a module that a filter selects; the rest stays as it is.

    Args:
        model: An equinox module, called on the inputs of one example.
        loss: `(outputs, targets)` to the mean loss, to one loss for each example, or to (losses,
            weights), in nats, on a batch.
        filter_spec: What `equinox.partition` selects the parameters by.
        batched: Whether the module takes a batch of inputs itself.

    Returns:
        The loss of `(params, (inputs, targets))`, and the parameters.
    """
    params, fixed = eqx.partition(model, filter_spec)

    def apply(params: PyTree, inputs: Any) -> Any:
        # An equinox module takes one example by convention.
        whole = eqx.combine(params, fixed)
        return whole(inputs) if batched else jax.vmap(whole)(inputs)

    return loss_of_params(apply, loss), params
