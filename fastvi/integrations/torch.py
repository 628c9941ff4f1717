"""A torch module as `fastvi.estimate_llc` takes it, run by JAX through torchax."""

from typing import Any

from fastvi._optional import import_optional
from fastvi._typing import PyTree
from fastvi.integrations.outputs import OutputLoss, ParamsLoss, loss_of_params


def torch_loss(module: Any, loss: OutputLoss) -> tuple[ParamsLoss, PyTree]:
    """Make a loss of a module's parameters; its buffers stay as they are.

    Put the module into evaluation mode first (`module.eval()`), where dropout or batch statistics
    matter.

    Args:
        module: A `torch.nn.Module`, called on the inputs of a batch.
        loss: `(outputs, targets)` to the mean loss, to one loss for each example, or to (losses,
            weights), in nats, on jax arrays.

    Returns:
        The loss of `(params, (inputs, targets))`, and the parameters by name.

    Raises:
        MissingExtraError: If torchax is not installed.
    """
    torchax = import_optional(
        "torchax", extra="torch", distribution="torchax", purpose="torch_loss"
    )
    # torchax's states are parameters and buffers together.
    states, apply = torchax.extract_jax(module)
    names = {name for name, _ in module.named_parameters()}
    fixed = {name: state for name, state in states.items() if name not in names}

    loss_fn = loss_of_params(lambda params, inputs: apply({**params, **fixed}, (inputs,)), loss)
    return loss_fn, {name: states[name] for name in names}
