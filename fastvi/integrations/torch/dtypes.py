"""In which precision data, modules and losses are."""

from collections.abc import Callable
from typing import Any

import jax
import torch

HALVES = (torch.bfloat16, torch.float16)
# jax has no 64-bit integers by default, and torch wants them for indices and classes.
TO_INT64 = (torch.int32, torch.uint32)


def cast_full(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of single or double precision in this one."""
    is_full = tensor.is_floating_point() and tensor.dtype.itemsize >= 4
    return tensor.to(dtype) if is_full else tensor


def as_example(
    tensor: torch.Tensor, dtype: torch.dtype, in_module: frozenset[torch.dtype]
) -> torch.Tensor:
    """Return data as modules take them, beside parameters of these dtypes.

    Args:
        tensor: Of the data.
        dtype: Single or double precision, in which all is that is not in half precision.
        in_module: Dtypes of the module's parameters.
    """
    if tensor.dtype in TO_INT64:
        return tensor.long()
    if tensor.dtype in HALVES and tensor.dtype not in in_module:
        return tensor.to(dtype)
    return cast_full(tensor, dtype)


def dtypes_of(module: torch.nn.Module) -> frozenset[torch.dtype]:
    """Return the dtypes of a module's parameters."""
    return frozenset(one.dtype for one in module.parameters())


def loss_of_outputs(module: torch.nn.Module, loss: Any) -> Callable[[Any, Any], Any]:
    """Return `(module, (inputs, targets)) -> loss(module(inputs), targets)`.

    A module in one half precision takes inputs in it. The loss is computed in single precision, or
    in that of the targets: in bfloat16 it has three digits, of which a difference leaves none.
    """
    dtypes = dtypes_of(module)
    half = next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= set(HALVES) else None

    def batch_loss(module: torch.nn.Module, batch: Any) -> Any:
        inputs, targets = batch
        inputs = inputs if half is None else _map_floats(inputs, lambda one: one.to(half))
        targets = _widen(targets, torch.float32)
        is_double = getattr(targets, "dtype", None) == torch.float64
        dtype = torch.float64 if is_double else torch.float32
        return loss(_widen(module(inputs), dtype), targets)

    return batch_loss


def _widen(tree: Any, dtype: torch.dtype) -> Any:
    return _map_floats(tree, lambda one: one.to(dtype) if one.dtype in HALVES else one)


def _map_floats(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return jax.tree_util.tree_map(
        lambda one: (
            function(one) if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        ),
        tree,
    )


def cast_losses(outputs: Any, dtype: torch.dtype) -> Any:
    """Return what a loss returned with its tensors of single and double precision in this one."""
    return _map_floats(outputs, lambda one: cast_full(one, dtype))


def note_on_halves(dtypes: frozenset[torch.dtype]) -> str:
    """Return what to try where data in another precision were at fault; nothing if none was."""
    halves = sorted(str(one) for one in dtypes & set(HALVES))
    if not halves:
        return ""
    return (
        f" Parameters are in {' and '.join(halves)}, and batch_loss gets floating-point data in "
        f"single or double precision: cast inputs by .to({halves[0]}) where the module wants it."
    )
