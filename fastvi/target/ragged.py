"""Sequences of different lengths as arrays of one length, with weights."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._typing import Float, Given
from fastvi.target.inputs import numeric


def pad_sequences(
    sequences: Given[Iterable[Any]],
    *,
    length: Given[int | None] = None,
    pad_value: Given[float] = 0,
    truncate: Given[bool] = False,
) -> tuple[np.ndarray, Float[np.ndarray, "examples length"]]:
    """Pad sequences of different lengths to one length, with weights that leave the padding out.

    A loss that returns `(losses, weights)`, with one loss for each token, is averaged as
    `sum(weights * losses) / sum(weights)` over all data: the plain mean over the tokens that are no
    padding, whatever the batches.

    Args:
        sequences: Arrays or lists of numbers, a sequence for each example: of shape (tokens,), or
            (tokens, ...) with the same further axes for all.
        length: Tokens of each row; those of the longest sequence when left out.
        pad_value: What follows the end of a sequence: a number that the loss takes, such as the id
            of a token, since a loss that is not finite stays so with weight 0.
        truncate: Whether to cut sequences longer than `length`; otherwise they are refused.

    Returns:
        The tokens, shape (examples, length, ...), in the dtype that holds all sequences; and the
        weights in float32, shape (examples, length): 1 for a token, 0 for padding.

    Raises:
        ConfigError: If `length` is below 1, or the dtype of the sequences does not hold
            `pad_value`.
        DataError: If there is no token at all, a sequence is no array of numbers, further axes
            differ, or a sequence is longer than `length` without `truncate`.

    Cost:
        One copy of the tokens. Sequences of very different lengths are mostly padding: sort them
        into data sets of similar length, or cut them.

    Examples:
        >>> tokens, weights = pad_sequences([[5, 6, 7], [8]])
        >>> tokens.tolist(), weights.tolist()
        ([[5, 6, 7], [8, 0, 0]], [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    """
    rows = [_sequence(row, f"sequences[{number}]") for number, row in enumerate(sequences)]
    longest = max(map(len, rows), default=0)
    if longest == 0:
        raise DataError("sequences hold no tokens; pass at least one array of numbers.")
    length = _row_length(length, longest, truncate)
    axes, dtype = _common(rows)
    _check_padding(pad_value, dtype)
    tokens = np.full((len(rows), length, *axes), pad_value, dtype)
    weights = np.zeros((len(rows), length), np.float32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row[:length]
        weights[number, : len(row)] = 1
    return tokens, weights


def _sequence(row: Any, name: str) -> np.ndarray:
    array = np.asarray(numeric(row, name))
    if array.ndim == 0:
        raise DataError(f"{name} is a number; each sequence must be an array or a list of them.")
    return array


def _row_length(length: Any, longest: int, truncate: bool) -> int:
    if length is None:
        return longest
    # To Python a bool is an int.
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
        raise ConfigError(f"length must be an integer >= 1; got {length!r}.")
    if longest > length and not truncate:
        raise DataError(
            f"a sequence of {longest} tokens is longer than length={length}. Leave length out, or "
            "pass truncate=True to drop what is beyond it."
        )
    return int(length)


def _common(rows: list[np.ndarray]) -> tuple[tuple[int, ...], np.dtype]:
    """Return the axes of a token, and the dtype that holds all sequences."""
    full = [row for row in rows if len(row)]  # numpy reads an empty list as floats
    shapes = {row.shape[1:] for row in full}
    if len(shapes) > 1:
        raise DataError(
            f"sequences may differ in their first axis alone; further axes are {sorted(shapes)}."
        )
    return shapes.pop(), np.result_type(*{row.dtype for row in full})


def _check_padding(pad_value: Any, dtype: np.dtype) -> None:
    is_number = isinstance(pad_value, (int, float, np.number, np.bool_)) and np.isfinite(pad_value)
    # floats round the number, integers and booleans must hold it
    rounds = np.issubdtype(dtype, np.inexact)
    if not is_number or not (rounds or np.array([pad_value]).astype(dtype)[0] == pad_value):
        raise ConfigError(f"pad_value must be a number that {dtype} holds; got {pad_value!r}.")
