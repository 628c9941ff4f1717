"""A flax linen module as `fastvi.estimate_llc` takes it."""

from collections.abc import Callable, Mapping
from typing import Any

from fastvi._errors import DataError
from fastvi._optional import import_optional
from fastvi._typing import Array, Batch, PyTree, Scalar

Loss = Callable[[Array, Array], Scalar]


def linen_loss(
    module: Any, variables: Mapping[str, Any], loss: Loss, **apply_options: Any
) -> tuple[Callable[[PyTree, Batch], Any], PyTree]:
    """Make a loss of a module's "params"; its other collections stay as they are.

    Args:
        module: A `flax.linen.Module`.
        variables: What `init` returned, trained.
        loss: `(outputs, targets) -> mean loss per example`, in nats.
        **apply_options: Passed to `apply`, such as `train=False`.

    Returns:
        `(params, (inputs, targets)) -> mean loss per example`, and the parameters.

    Raises:
        DataError: If this is no module, or the variables hold no "params".
        MissingExtraError: If flax is not installed.
    """
    linen = import_optional("flax.linen", extra="flax", distribution="flax", purpose="linen_loss")
    if not isinstance(module, linen.Module):
        raise DataError(
            f"module must be a flax.linen.Module; got {type(module).__name__}. For nnx use "
            "nnx_loss."
        )
    if "params" not in variables:
        raise DataError(f'variables must hold the collection "params"; got {sorted(variables)}.')
    fixed = {name: collection for name, collection in variables.items() if name != "params"}

    def loss_fn(params: PyTree, batch: Batch) -> Any:
        inputs, targets = batch
        return loss(module.apply({"params": params, **fixed}, inputs, **apply_options), targets)

    return loss_fn, variables["params"]
