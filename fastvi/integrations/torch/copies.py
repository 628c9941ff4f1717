"""A copy of a module, whose buffers are at each pass as they were given."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from fastvi._errors import DataError
from fastvi.integrations.torch.dtypes import cast_full


def copy_module(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module; of activations that it keeps their values, not how they came about.

    Torch refuses to copy a tensor with a graph. Hooks, as of weight_norm, compute it anew.

    Raises:
        DataError: If it cannot be copied.
    """
    kept = [one for layer in module.modules() for one in _tensors(vars(layer)) if not one.is_leaf]
    memo: dict[int, Any] = {id(one): one.detach().clone() for one in kept}
    try:
        return copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"the module cannot be copied: {error}. Delete or detach what it keeps beside "
            "parameters and buffers, until copy.deepcopy(module) works."
        ) from error


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


@dataclasses.dataclass
class _Buffer:
    """A buffer in one place of a module; `version` counts torch's writes to it."""

    owner: torch.nn.Module
    name: str
    tensor: torch.Tensor
    given: torch.Tensor
    version: int

    def write(self, values: torch.Tensor) -> None:
        if self.tensor.requires_grad:  # written with what depends on parameters
            self.tensor.detach_()
        self.tensor.copy_(values)


class Buffers:
    """The buffers of a module, with their values as they were given.

    A buffer that nothing wrote to costs one comparison of numbers.
    """

    def __init__(self, module: torch.nn.Module):
        given: dict[int, torch.Tensor] = {}  # those in several places once
        self._all = [
            _Buffer(owner, name, one, given.setdefault(id(one), one.detach().clone()), one._version)
            for owner in module.modules()
            for name, one in owner.named_buffers(recurse=False, remove_duplicate=False)
        ]

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute in single or double precision, from what was given, since a cast may round."""
        for one in self._all:
            one.tensor.data = cast_full(one.given, dtype).clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Give buffers that a pass wrote to, or put others in the place of, their values again."""
        for one in self._all:
            if getattr(one.owner, one.name) is not one.tensor:
                setattr(one.owner, one.name, one.tensor)
            if one.tensor._version != one.version:
                one.write(one.given)
        for one in self._all:
            one.version = one.tensor._version
