"""A batch in parts that fit the memory of a pass, and what a loss returns on all of them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import torch

from fastvi.integrations.torch.checks import Form

# What a loss returns on a part of a batch, and the share of the examples that the part has.
Part: TypeAlias = tuple[list[torch.Tensor], float]


class Tried(NamedTuple):
    """What trying a loss shows: its form, and how many examples a pass takes."""

    form: Form
    most: int


def map_tensors(function: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    """Apply a function to each tensor of a batch."""
    return jax.tree_util.tree_map(function, batch)


def usual_seeds(outputs: list[torch.Tensor], share: float) -> torch.Tensor:
    """Return what the gradient of the mean weighs losses by, up to a factor where weighted."""
    if len(outputs) == 2:
        return outputs[1]
    return torch.full_like(outputs[0], share / outputs[0].numel(), requires_grad=False)


def _num_examples(batch: Any) -> int:
    return jax.tree_util.tree_leaves(batch)[0].shape[0]


def _rows(size: int, tried: Tried) -> list[slice]:
    """Split so many examples into passes of about one size."""
    count = -(-size // tried.most)
    return [slice(i * size // count, (i + 1) * size // count) for i in range(count)]


def parts_of(batch: Any, tried: Tried) -> Iterator[tuple[Any, float]]:
    """Yield a batch in parts of the size of a pass, each with its share of the examples."""
    size = _num_examples(batch)
    if size <= tried.most:
        yield batch, 1.0
        return
    for rows in _rows(size, tried):
        part = map_tensors(lambda one, rows=rows: one[rows], batch)
        yield part, (rows.stop - rows.start) / size


def split_seeds(seeds: torch.Tensor, tried: Tried) -> list[torch.Tensor]:
    """Return the seeds of each part."""
    return [seeds[rows] for rows in _rows(seeds.shape[0], tried)]


def sum_of(vectors: list[torch.Tensor]) -> torch.Tensor:
    """Add vectors."""
    return vectors[0] if len(vectors) == 1 else torch.stack(vectors).sum(0)


def joined(found: list[Part], form: Form) -> list[torch.Tensor]:
    """Return what a loss returns on a batch, of what it returned on its parts."""
    if len(found) == 1:
        # a loss may return memory of the module, which the next call overwrites
        return [one.clone() for one in found[0][0]]
    if form.of_example is None:
        return [torch.stack([share * one for (one,), share in found]).sum()]
    return [torch.cat(column) for column in zip(*(one for one, _ in found), strict=True)]
