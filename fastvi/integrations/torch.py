"""A torch module as `fastvi.estimate_llc` takes it, run by JAX through torchax."""

from collections.abc import Callable
from typing import Any

from fastvi._optional import import_optional
from fastvi._typing import Array, Batch, PyTree, Scalar

Loss = Callable[[Array, Array], Scalar]


def torch_loss(module: Any, loss: Loss) -> tuple[Callable[[PyTree, Batch], Any], PyTree]:
    """Make a loss of a module's parameters; its buffers stay as they are.

    Put the module into evaluation mode first (`module.eval()`), where dropout or batch statistics
    matter.

    Args:
        module: A `torch.nn.Module`, called on the inputs of a batch.
        loss: `(outputs, targets) -> mean loss per example`, in nats, on jax arrays.

    Returns:
        `(params, (inputs, targets)) -> mean loss per example`, and the parameters by name.

    Raises:
        MissingExtraError: If torchax is not installed.
    """
    torchax = import_optional(
        "torchax", extra="torch", distribution="torchax", purpose="torch_loss"
    )
    states, apply = torchax.extract_jax(module)
    names = {name for name, _ in module.named_parameters()}
    fixed = {name: state for name, state in states.items() if name not in names}

    def loss_fn(params: PyTree, batch: Batch) -> Any:
        inputs, targets = batch
        return loss(apply({**params, **fixed}, (inputs,)), targets)

    return loss_fn, {name: states[name] for name in names}
