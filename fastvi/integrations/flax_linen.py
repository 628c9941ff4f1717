"""A flax linen module as `fastvi.estimate_llc` takes it."""

from collections.abc import Mapping
from typing import Any

from fastvi._errors import DataError
from fastvi._optional import import_optional
from fastvi._typing import PyTree
from fastvi.integrations.outputs import OutputLoss, ParamsLoss, loss_of_params


def linen_loss(
    module: Any, variables: Mapping[str, Any], loss: OutputLoss, **apply_options: Any
) -> tuple[ParamsLoss, PyTree]:
    """Make a loss of a module's "params"; its other collections stay as they are.

    Args:
        module: A `flax.linen.Module`.
        variables: What `init` returned, trained.
        loss: `(outputs, targets)` to the mean loss, to one loss for each example, or to (losses,
            weights), in nats.
        **apply_options: Passed to `apply`, such as `train=False`.

    Returns:
        The loss of `(params, (inputs, targets))`, and the parameters.

    Raises:
        DataError: If this is no module, or the variables hold no "params".
        MissingExtraError: If flax is not installed.
    """
    linen = import_optional("flax.linen", extra="flax", distribution="flax", purpose="linen_loss")
    # An nnx module has no `apply`, and would fail within the estimate.
    if not isinstance(module, linen.Module):
        raise DataError(
            f"module must be a flax.linen.Module; got {type(module).__name__}. For nnx use "
            "nnx_loss."
        )
    if "params" not in variables:
        raise DataError(f'variables must hold the collection "params"; got {sorted(variables)}.')
    fixed = {name: collection for name, collection in variables.items() if name != "params"}

    def apply(params: PyTree, inputs: Any) -> Any:
        return module.apply({"params": params, **fixed}, inputs, **apply_options)

    return loss_of_params(apply, loss), variables["params"]
