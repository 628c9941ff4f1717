"""A module's loss and its derivatives, on torch tensors, with the parameters as one vector."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvi._errors import ErrorNote
from fastvi.integrations.torch.checks import read_form
from fastvi.integrations.torch.copies import Buffers, copy_module
from fastvi.integrations.torch.dtypes import cast_full, cast_losses, dtypes_of, note_on_halves
from fastvi.integrations.torch.passes import (
    Tried,
    joined,
    map_tensors,
    parts_of,
    split_seeds,
    sum_of,
    usual_seeds,
)

# Bytes that one forward pass keeps for its backward pass. Half of it calls torch's operations twice
# as often; double holds twice the memory.
PASS_BYTES = 2**26
# Examples of the two batches that a loss is tried on before it is compiled into a program. Any two
# different numbers show which axis is that of the batch, and what one example keeps in memory.
TRIED = (2, 3)


class ModuleLoss:
    """The loss of a module, as a function of the parameters that require a gradient.

    Compared by identity. It computes with a copy of the module, whose parameters are views of one
    vector, so that setting them is one copy. All else of the module stays as it was. Calls from
    several threads take turns.

    Attributes:
        names: Of the parameters that vary, sorted; shared ones once.
        shapes: Theirs.
        device: Where the module is.
        dtypes: Of its parameters.
    """

    @torch.inference_mode(False)
    def __init__(self, module: torch.nn.Module, batch_loss: Callable[[Any, Any], Any]):
        self._module = copy_module(module)
        self._module.zero_grad()  # the optimiser's, of no use here
        self._batch_loss = batch_loss
        given = dict(sorted(self._module.named_parameters()))
        varying = {name: one for name, one in given.items() if one.requires_grad}
        fixed = [one for one in given.values() if not one.requires_grad]
        self.names, self._varying = tuple(varying), list(varying.values())
        self.shapes = tuple(tuple(one.shape) for one in self._varying)
        self.device = self._varying[0].device
        self.dtypes = dtypes_of(module)
        # as they were given, since a cast may round
        self._fixed = [(one, one.detach()) for one in fixed]
        self._buffers = Buffers(self._module)
        self._flat = torch.cat([one.detach().ravel().float() for one in self._varying])
        self._set_dtype(self._flat.dtype)
        self._lock = threading.RLock()

    def values(self, flat: torch.Tensor, batch: Any, tried: Tried) -> list[torch.Tensor]:
        """Evaluate the loss: the mean, or losses, or losses and weights."""
        with self._at(flat), torch.no_grad():
            found = [(self._outputs(part), share) for part, share in parts_of(batch, tried)]
            return joined(found, tried.form)

    def slope(self, flat: torch.Tensor, batch: Any, tried: Tried) -> list[torch.Tensor]:
        """Evaluate the loss, and the gradient of its mean or of the sum of weights times losses."""
        found, slopes = [], []
        with self._at(flat):
            for part, share in parts_of(batch, tried):
                outputs = self._outputs(part)
                slopes.append(self._gradient(outputs[0], usual_seeds(outputs, share)))
                found.append(([one.detach() for one in outputs], share))
            return [*joined(found, tried.form), sum_of(slopes)]

    def pull(
        self, flat: torch.Tensor, batch: Any, tried: Tried, seeds: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of the sum of seeds times losses."""
        slopes, own = [], split_seeds(seeds, tried)
        with self._at(flat):
            for (part, _), some in zip(parts_of(batch, tried), own, strict=True):
                slopes.append(self._gradient(self._outputs(part)[0], some))
        return sum_of(slopes)

    def product(
        self,
        flat: torch.Tensor,
        batch: Any,
        tried: Tried,
        seeds: torch.Tensor | None,
        tangents: list[torch.Tensor],
    ) -> list[list[torch.Tensor]]:
        """Return the derivatives of losses and gradient along tangents, by double backward.

        Args:
            flat: The parameters.
            batch: The examples.
            tried: What trying showed.
            seeds: What the gradient weighs losses by; as in `slope` when left out.
            tangents: Directions.

        Returns:
            For each tangent that of the losses, and that of the gradient.
        """
        parts = list(parts_of(batch, tried))
        own = [None] * len(parts) if seeds is None else split_seeds(seeds, tried)
        with self._at(flat):
            found = [
                self._twice(part, share, some, tangents)
                for (part, share), some in zip(parts, own, strict=True)
            ]
        form = tried.form._replace(is_weighted=False)
        return [
            [
                joined([([change], share) for (change, _), (_, share) in pieces], form)[0],
                sum_of([turn for (_, turn), _ in pieces]),
            ]
            for pieces in (list(zip(one, parts, strict=True)) for one in zip(*found, strict=True))
        ]

    def _twice(
        self, batch: Any, share: float, seeds: torch.Tensor | None, tangents: list[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            outputs = self._outputs(batch)
        seeds = usual_seeds(outputs, share) if seeds is None else seeds
        # the derivative of the gradient by its seeds is that of the losses by the parameters
        seeds = seeds.detach().requires_grad_()
        gradients = torch.autograd.grad(
            outputs[0],
            self._varying,
            seeds,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        found = []
        for tangent in tangents:
            change, *turns = torch.autograd.grad(
                gradients,
                (seeds, *self._varying),
                self._as_tangents(tangent),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            found.append((change, self._as_vector(turns)))
        return found

    def try_on(self, batches: list[Any], dtype: torch.dtype) -> Tried:
        """Say what the loss returns, and how many examples one pass takes.

        Args:
            batches: Two batches of one kind, of the sizes `TRIED`.
            dtype: Of the parameters.

        Raises:
            DataError: If the loss returns none of the forms, or has no gradient.
        """
        flat = self._flat.detach().to(dtype, copy=True)
        with self._at(flat):
            found, kept = zip(*(self._try(batch) for batch in batches), strict=True)
            form = read_form(found, TRIED, self.device, self._varying)
        grown = (kept[1] - kept[0]) / (TRIED[1] - TRIED[0])
        return Tried(form, max(1, int(PASS_BYTES / max(grown, 1.0))))

    def _try(self, batch: Any) -> tuple[Any, int]:
        """Return what the loss returns, and the bytes that are kept for a backward pass."""
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        shapes = map_tensors(lambda one: f"{one.dtype}{list(one.shape)}", batch)
        with (
            ErrorNote(
                f"fastvi: raised by the torch loss, tried on {shapes}.{note_on_halves(self.dtypes)}"
            ),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            outputs = self._call(batch)
        return outputs, kept

    @contextlib.contextmanager
    def _at(self, flat: torch.Tensor) -> Iterator[None]:
        """Hold the module at these parameters."""
        with self._lock, torch.inference_mode(False), torch.enable_grad():
            if flat.dtype != self._flat.dtype:
                self._set_dtype(flat.dtype)
            with torch.no_grad():
                self._flat.copy_(flat)
                for parameter, values in self._narrow:
                    parameter.copy_(values)
            yield

    def _set_dtype(self, dtype: torch.dtype) -> None:
        """Compute in single or double precision; what is in half precision stays so."""
        self._flat = self._flat.to(dtype)
        self._narrow = []
        for parameter, values in zip(self._varying, self._as_parameters(self._flat), strict=True):
            if parameter.dtype.itemsize < values.dtype.itemsize and parameter.dtype.itemsize < 4:
                self._narrow.append((parameter, values))
            else:
                parameter.data = values
        for tensor, given in self._fixed:
            tensor.data = cast_full(given, dtype)
        self._buffers.set_dtype(dtype)

    def _as_parameters(self, vector: torch.Tensor) -> list[torch.Tensor]:
        sizes = [one.numel() for one in self._varying]
        pieces = zip(vector.split(sizes), self._varying, strict=True)
        return [piece.view(one.shape) for piece, one in pieces]

    def _as_tangents(self, vector: torch.Tensor) -> list[torch.Tensor]:
        pieces = zip(self._as_parameters(vector), self._varying, strict=True)
        return [piece.to(one.dtype) for piece, one in pieces]

    def _as_vector(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([one.reshape(-1).to(self._flat.dtype) for one in parameters])

    def _gradient(self, losses: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        return self._as_vector(
            torch.autograd.grad(
                losses, self._varying, seeds, allow_unused=True, materialize_grads=True
            )
        )

    def _call(self, batch: Any) -> Any:
        self._buffers.restore()
        return cast_losses(self._batch_loss(self._module, batch), self._flat.dtype)

    def _outputs(self, batch: Any) -> list[torch.Tensor]:
        """Call the loss; the weights come without a gradient, in the dtype of the losses."""
        outputs = self._call(batch)
        if not isinstance(outputs, (tuple, list)):
            return [outputs]
        losses, weights = outputs
        return [losses, weights.detach().to(losses.dtype)]
