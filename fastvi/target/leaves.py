"""One array of data, whatever holds it, as numpy reads it."""

from typing import Any

import numpy as np

from fastvi._errors import DataError
from fastvi.target.tables import by_name, is_a, is_frame

# What to do with sequences of different lengths.
RAGGED = " Pad sequences of different lengths: tokens, weights = fastvi.pad_sequences(sequences)."


def as_array(leaf: Any, name: str) -> np.ndarray:
    """Return anything that is an array to numpy as one; what it cannot read it names itself."""
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise DataError(
            f"{name} is a masked array, whose mask would be dropped. Leave masked rows out, or "
            "fill them."
        )
    try:
        array = np.asarray(_on_cpu(leaf))
    # h5py raises RuntimeError for an array of a file that is closed.
    except (TypeError, ValueError, RuntimeError) as error:
        said = str(error).split("\n")[0]
        raise DataError(
            f"{name} is {kind_of(leaf)}, which numpy cannot read: {said} Make it a numpy array "
            "first."
        ) from error
    if array.dtype == object and array.size and is_frame(leaf):
        # numpy reads nullable numbers, or booleans beside floats, as objects
        array = np.column_stack(list(by_name(leaf).values()))
    return _stacked(array, name) if array.dtype == object and array.size else array


def _on_cpu(leaf: Any) -> Any:
    """Return a torch tensor as one that numpy reads: without its gradient, and from a device."""
    if not is_a(leaf, "torch", "Tensor"):
        return leaf
    tensor = leaf.detach().cpu()
    # numpy has no bfloat16, whose numbers are all numbers of float32
    return tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor


def _stacked(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array of arrays, as a column of lists is, as one; refuse one that is ragged."""
    entries = list(array.flat)
    if not all(isinstance(entry, (list, tuple, np.ndarray)) for entry in entries):
        return array
    lengths = {
        np.shape(entry)[:1] if isinstance(entry, np.ndarray) else (len(entry),) for entry in entries
    }
    if len(lengths) > 1:
        raise DataError(f"{name} holds sequences of different lengths.{RAGGED}")
    return np.stack([as_array(entry, name) for entry in entries])


def kind_of(value: Any) -> str:
    """Name the type of a value."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
