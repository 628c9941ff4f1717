"""A torch module as a loss of a pytree of parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fastvi._errors import ConfigError, DataError
from fastvi._optional import import_optional
from fastvi._typing import Batch, PyTree
from fastvi.integrations.outputs import BatchLoss, ParamsLoss


def torch_loss(
    module: Any,
    loss: Callable[[Any, Any], Any] | None = None,
    *,
    batch_loss: Callable[[Any, Any], Any] | None = None,
) -> tuple[ParamsLoss, PyTree]:
    """Make a loss of the parameters of a torch module; torch computes it and its gradient.

    The module runs on its own device, inside jax's programs too. Parameters that require no
    gradient and buffers stay as they are now. Call `module.eval()` first, where dropout or batch
    normalisation is part of it.

    Give `loss` or `batch_loss`. Either returns a torch tensor, in nats: the mean of the batch, one
    loss for each example or for each of its tokens, or (losses, weights). Integers of 32 bits
    arrive as int64, and floating-point arrays in single precision, or in double where `params` are.
    A module whose parameters are all in one half precision gets inputs in it beside `loss`, which
    sees outputs in single precision; `batch_loss` casts inputs itself. Losses in double precision
    are returned in that of `params`.

    Args:
        module: A `torch.nn.Module`.
        loss: `(outputs, targets)` to the loss, for batches `(inputs, targets)` of which the module
            is called on the inputs: `torch.nn.functional.cross_entropy`, for one.
        batch_loss: `(module, batch)` to the loss, for any batch, with the parameters in the module:
            `lambda model, batch: model(**batch).loss`.

    Returns:
        The loss of `(params, batch)`, and the parameters by name as jax arrays, shared ones once.
        The loss may be under jax.jit, vmap, grad and a second, forward derivative by the
        parameters.

    Raises:
        ConfigError: If both losses are given, or none.
        DataError: If the module cannot vary: no floating-point parameters, layers in training
            mode, several devices. The loss raises it too, where what it returns cannot be used.
        MissingExtraError: If torch is not installed.

    Cost:
        A call of the loss tries it once for each kind of batch, on 2 and on 3 examples of the
        batch, or made-up ones inside a program: zeros, ones, noise, the first that it takes.
        A gradient is one forward and one backward pass, and a product with the Hessian two of
        each. A pass keeps at most 64 MiB for its backward pass, as long as one example does.
    """
    import_optional("torch", extra="torch", distribution="torch", purpose="torch_loss")
    from fastvi.integrations.torch.checks import check_module
    from fastvi.integrations.torch.dtypes import loss_of_outputs
    from fastvi.integrations.torch.host import own_arrays
    from fastvi.integrations.torch.model import ModuleLoss

    if (loss is None) == (batch_loss is None):
        raise ConfigError(
            "torch_loss takes one of loss, of (outputs, targets), and batch_loss, of (module, "
            f"batch); got {'none' if loss is None else 'both'}."
        )
    check_module(module)
    model = ModuleLoss(module, batch_loss or loss_of_outputs(module, loss))
    return _loss_of(model), {
        name: jnp.array(one) for name, one in own_arrays(model, module).items()
    }


def _loss_of(model: Any) -> ParamsLoss:
    from fastvi.integrations.torch.host import Hosts
    from fastvi.integrations.torch.rules import fixed, losses

    hosts = Hosts(model)

    def loss_fn(params: PyTree, batch: Batch) -> BatchLoss:
        flat = _ravel(params, model)
        arrays = tuple(fixed(jnp.asarray(one)) for one in jax.tree_util.tree_leaves(batch))
        _check_batch(arrays)
        host = hosts.find(batch, arrays, flat.dtype)
        found: Any = losses(host, flat, arrays)
        return found if host.tried.form.is_weighted else found[0]

    return loss_fn


def _ravel(params: PyTree, model: Any) -> jax.Array:
    """Join the parameters to one vector: a callback takes as long for each array as for all.

    XLA finds the vector that they were taken from in it.
    """
    if not isinstance(params, dict) or set(params) != set(model.names):
        came = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise DataError(f"params must hold the arrays {list(model.names)} by name; got {came}.")
    leaves = [jnp.asarray(params[name]) for name in model.names]
    for name, leaf, shape in zip(model.names, leaves, model.shapes, strict=True):
        if leaf.shape != shape:
            raise DataError(f"params[{name!r}] must have shape {shape}; got {leaf.shape}.")
    is_double = any(leaf.dtype == jnp.float64 for leaf in leaves)
    dtype = jnp.float64 if is_double else jnp.float32
    return jnp.concatenate([leaf.ravel().astype(dtype) for leaf in leaves])


def _check_batch(arrays: tuple[jax.Array, ...]) -> None:
    lengths = {one.shape[:1] for one in arrays}
    if len(lengths) != 1 or lengths == {()}:
        raise DataError(
            "the arrays of a batch need one leading axis of examples; got shapes "
            f"{[one.shape for one in arrays]}."
        )
