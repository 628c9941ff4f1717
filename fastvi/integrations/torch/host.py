"""What runs on the host when a program of jax reaches the loss: arrays in, torch, arrays out.

Nothing here computes by jax: a callback that waits for jax would wait for itself. Tensors are made
outside inference_mode, in which the caller may be, since none made inside it take part in a graph.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch

from fastvi.integrations.torch.dtypes import as_example
from fastvi.integrations.torch.model import TRIED, ModuleLoss
from fastvi.integrations.torch.passes import Tried
from fastvi.integrations.torch.trials import Rows, as_tensor, first_that_works, trials_of

Place: TypeAlias = tuple[int, ...]  # along the leading axes
# Relative rounding, in units of the last place, within which seeds are a multiple of the usual
# ones. Half may take rounding in jax for other seeds, which costs a second pass; double changes a
# gradient by less than torch's own rounding.
SEED_UNITS = 8


@dataclasses.dataclass(frozen=True)
class Host:
    """The loss on batches of one structure, on arrays with leading axes that vmap has added.

    Each method takes the parameters first and the arrays of a batch last. All arrays have the same
    number of leading axes, of length 1 where they do not vary. A loop goes over these axes:
    torch.vmap was no faster on a transformer, and refuses some modules. Hosts are equal where the
    `ModuleLoss` is the same and the structure too.

    Attributes:
        model: The loss.
        tried: Its form, and the size of a pass.
        treedef: The structure of a batch.
    """

    model: ModuleLoss
    tried: Tried
    treedef: Any

    def values(self, flat: Any, *batch: Any) -> list[np.ndarray]:
        """Evaluate the loss."""
        return self._each(self.model.values, flat, batch)

    def slope(self, flat: Any, *batch: Any) -> list[np.ndarray]:
        """Evaluate the loss, and the gradient that a mean over the data most likely needs."""
        return self._each(self.model.slope, flat, batch)

    def _each(self, function: Callable[..., Any], flat: Any, batch: Any) -> list[np.ndarray]:
        points, examples = self._read(flat), self._examples(batch, flat)
        return _over(
            _lead(flat, flat, *batch),
            lambda at: function(_at(points, at), self._batch(examples, at), self.tried),
        )

    def pull(self, flat: Any, slope: Any, seeds: Any, usual: Any, *batch: Any) -> list[np.ndarray]:
        """Return the gradient of the sum of seeds times losses.

        `slope` is that of the usual seeds: a multiple of these needs no pass.
        """
        points, known, wanted, common = map(self._read, (flat, slope, seeds, usual))
        examples = self._examples(batch, flat)

        def one(at: Place) -> list[torch.Tensor]:
            own = _at(wanted, at)
            factor = _multiple(own, _at(common, at))
            if factor is not None:
                return [factor * _at(known, at)]
            return [self.model.pull(_at(points, at), self._batch(examples, at), self.tried, own)]

        return _over(_lead(flat, flat, slope, seeds, usual, *batch), one)

    def turn(self, flat: Any, tangent: Any, *batch: Any) -> list[np.ndarray]:
        """Return the derivatives along a tangent of what `slope` returns."""
        found = self._twice(flat, tangent, None, batch)
        weights = [np.zeros_like(found[0])] * self.tried.form.is_weighted
        return [found[0], *weights, found[1]]

    def turn_pull(
        self, flat: Any, seeds: Any, tangent: Any, change: Any, *batch: Any
    ) -> list[np.ndarray]:
        """Return the derivative of what `pull` returns, along a tangent and a change of seeds."""
        turned = self._twice(flat, tangent, seeds, batch)[1]
        points, changes = self._read(flat), self._read(change)
        if not changes.any():
            return [turned]
        examples = self._examples(batch, flat)
        moved = _over(
            _lead(flat, flat, change, *batch),
            lambda at: [
                self.model.pull(
                    _at(points, at), self._batch(examples, at), self.tried, _at(changes, at)
                )
            ],
        )
        return [turned + moved[0]]

    def _twice(self, flat: Any, tangent: Any, seeds: Any, batch: Any) -> list[np.ndarray]:
        """Differentiate twice, once for all tangents at one point."""
        points, tangents, examples = (
            self._read(flat),
            self._read(tangent),
            self._examples(batch, flat),
        )
        weights = None if seeds is None else self._read(seeds)
        fixed = [flat, *batch, *([] if seeds is None else [seeds])]
        lead, own = _lead(flat, tangent, *fixed), _lead(flat, *fixed)
        groups: dict[Place, list[Place]] = {}
        for at in np.ndindex(lead):
            groups.setdefault(_place(at, own), []).append(at)
        found: dict[Place, list[torch.Tensor]] = {}
        for place, members in groups.items():
            pairs = self.model.product(
                _at(points, place),
                self._batch(examples, place),
                self.tried,
                None if weights is None else _at(weights, place),
                [_at(tangents, at) for at in members],
            )
            found |= dict(zip(members, pairs, strict=True))
        return _over(lead, found.__getitem__)

    @torch.inference_mode(False)
    def _read(self, array: Any) -> torch.Tensor:
        """Return XLA's memory as a tensor; nothing writes to it.

        Parameters require a gradient before torch computes with them, and other arrays are read.
        """
        return torch.from_dlpack(array).to(self.model.device)

    @torch.inference_mode(False)
    def _examples(self, batch: Any, flat: Any) -> list[torch.Tensor]:
        """Return copies, since modules may change their inputs in place."""
        dtype = torch.from_dlpack(flat).dtype
        tensors = [torch.from_dlpack(array) for array in batch]
        device, dtypes = self.model.device, self.model.dtypes
        return [as_example(tensor.to(device, copy=True), dtype, dtypes) for tensor in tensors]

    def _batch(self, examples: list[torch.Tensor], at: Place) -> Any:
        return self.treedef.unflatten([_at(one, at) for one in examples])


class Hosts:
    """The hosts of a loss, one for each kind of batch, tried when it is first met.

    A program that calls a host is known by which object that is.
    """

    def __init__(self, model: ModuleLoss):
        self._model = model
        self._known: dict[Any, Host] = {}

    @torch.inference_mode(False)
    def find(self, batch: Any, arrays: Sequence[Any], dtype: Any) -> Host:
        """Return the host of batches of these shapes, of parameters of this dtype.

        Args:
            batch: As it came; outside a trace of jax the loss is tried on some of it.
            arrays: Its leaves as jax has them.
            dtype: Of the parameters.

        Raises:
            DataError: If the loss cannot be used.
        """
        leaves, treedef = jax.tree_util.tree_flatten(batch)
        kind = treedef, tuple((one.shape[1:], str(one.dtype)) for one in arrays), str(dtype)
        if kind not in self._known:
            kinds, own = [str(one.dtype) for one in arrays], getattr(torch, str(dtype))
            tried = first_that_works(
                trials_of(leaves, arrays),
                lambda rows: self._model.try_on(
                    [treedef.unflatten(self._tensors(rows, size, kinds, own)) for size in TRIED],
                    own,
                ),
            )
            self._known[kind] = Host(self._model, tried, treedef)
        return self._known[kind]

    def _tensors(
        self, rows: Rows, size: int, kinds: list[str], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        model = self._model
        return [
            as_example(as_tensor(values, getattr(torch, kind), model.device), dtype, model.dtypes)
            for values, kind in zip(rows(size), kinds, strict=True)
        ]


def own_arrays(model: ModuleLoss, module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return copies of the parameters that vary, as they are in the module, by name."""
    named = dict(module.named_parameters())
    return {name: np.array(_to_numpy(named[name])) for name in model.names}


def _lead(flat: Any, *arrays: Any) -> Place:
    """Return the lengths of the leading axes that arrays have together."""
    axes = flat.ndim - 1
    return np.broadcast_shapes(*(array.shape[:axes] for array in arrays))


def _place(at: Place, lengths: Sequence[int]) -> Place:
    """Return where an array with leading axes of these lengths has what belongs to a place."""
    return tuple(0 if length == 1 else i for i, length in zip(at, lengths, strict=False))


def _at(tensor: torch.Tensor, at: Place) -> torch.Tensor:
    return tensor[_place(at, tensor.shape)] if at else tensor


def _over(lead: Place, function: Callable[[Place], Sequence[torch.Tensor]]) -> list[np.ndarray]:
    """Return what a function gives at each place, stacked."""
    if not lead:
        return [_to_numpy(one) for one in function(())]
    stacked: list[np.ndarray] = []
    for at in np.ndindex(lead):
        found = [_to_numpy(one) for one in function(at)]
        # as soon as they are known, so that gradients are not held twice
        stacked = stacked or [np.empty((*lead, *one.shape), one.dtype) for one in found]
        for whole, one in zip(stacked, found, strict=True):
            whole[at] = one
    return stacked


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    on_host = tensor.detach().cpu()
    if on_host.dtype == torch.bfloat16:  # which numpy has by jax alone
        return on_host.view(torch.int16).numpy().view(jnp.bfloat16)
    return on_host.numpy()


def _multiple(seeds: torch.Tensor, usual: torch.Tensor) -> torch.Tensor | None:
    """Return how many times the usual seeds these are; None where they are no multiple."""
    factor = torch.sum(seeds * usual) / torch.sum(usual * usual)
    rounding = SEED_UNITS * torch.finfo(seeds.dtype).eps
    is_multiple = torch.all(torch.abs(seeds - factor * usual) <= rounding * torch.abs(seeds))
    return factor if is_multiple else None
