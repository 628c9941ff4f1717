"""Batches that a loss is tried on, of which it need take one: its form is the same on all."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.core
import numpy as np
import torch

# What torch and modules raise at values out of range; of other errors no values are the cause.
VALUE_ERRORS = (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError)
Result = TypeVar("Result")
Rows = Callable[[int], list[np.ndarray]]  # so many examples, an array for each of a batch


def trials_of(leaves: Sequence[Any], arrays: Sequence[Any]) -> Iterator[tuple[str, Rows]]:
    """Yield a name and examples: real ones outside a trace of jax, then made-up ones.

    Args:
        leaves: Arrays of a batch as they came.
        arrays: Their shapes and dtypes in jax.
    """
    if arrays[0].shape[0] and not any(isinstance(one, jax.core.Tracer) for one in leaves):
        yield "real examples", lambda size: [_first(one, size) for one in leaves]
    for name, fill in (("zeros", _zeros), ("ones", _ones), ("noise", _noise)):
        yield (
            name,
            lambda size, fill=fill: [fill((size, *one.shape[1:]), one.dtype) for one in arrays],
        )
    yield "full lengths", lambda size: _full_lengths(arrays, size)


def _first(array: Any, size: int) -> np.ndarray:
    """Return the first examples, over again where they are fewer."""
    rows = np.asarray(array)
    return rows[np.arange(size) % len(rows)]


def _zeros(shape: tuple[int, ...], _: Any) -> np.ndarray:
    return np.zeros(shape)


def _ones(shape: tuple[int, ...], _: Any) -> np.ndarray:
    return np.ones(shape)


def _noise(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return noise, or ones in place of integers."""
    is_float = jax.numpy.issubdtype(dtype, np.floating)
    return np.random.default_rng(0).standard_normal(shape) if is_float else np.ones(shape)


def _full_lengths(arrays: Sequence[Any], size: int) -> list[np.ndarray]:
    """Return ones, and for an integer of each example the longest second axis, as of a sequence."""
    longest = max((one.shape[1] for one in arrays if len(one.shape) > 1), default=1)
    return [
        np.full(
            (size, *one.shape[1:]),
            longest if len(one.shape) == 1 and np.issubdtype(one.dtype, np.integer) else 1,
        )
        for one in arrays
    ]


def as_tensor(values: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return values as a tensor of their own."""
    # numpy's bfloat16 is none of torch's
    wide = values.astype(float) if dtype.is_floating_point else values
    return torch.from_numpy(np.array(wide)).to(device, dtype)


def first_that_works(
    trials: Iterator[tuple[str, Rows]], function: Callable[[Rows], Result]
) -> Result:
    """Return what a function gives on the first examples that it takes.

    Raises:
        Exception: What it raised on the first, with a note of the others, if it takes none.
    """
    failed: list[tuple[str, Exception]] = []
    for name, rows in trials:
        try:
            return function(rows)
        except VALUE_ERRORS as error:
            failed.append((name, error))
    (name, first), *others = failed
    if any(str(one) != str(first) for _, one in others):
        first.add_note(f"fastvi: this was on {name}; {'; '.join(map(_told, others))}.")
    if name != "real examples":
        first.add_note(
            "fastvi: if the loss takes real examples alone, call loss_fn(params, batch) once on "
            "some, outside jax.jit, before the estimate; the dtypes must be those of the estimate."
        )
    raise first


def _told(failure: tuple[str, Exception]) -> str:
    name, error = failure
    return f"on {name} {type(error).__name__}: {error}"
