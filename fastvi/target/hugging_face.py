"""Data sets of Hugging Face as batches of columns, in the dtypes that they store."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastvi._typing import Batch
from fastvi.target.examples import by_index
from fastvi.target.tables import without_text

# Rows at a time of a table of Hugging Face, as large as its own chunks.
TABLE_ROWS = 1000


class Rows:
    """Batches of a table of Hugging Face, as numpy arrays by column."""

    def __init__(self, table: Any):
        self._table = table

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rows, some at a time."""
        for columns in self._batches():
            yield without_text(columns, self._table)

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        # The format "numpy" rounds to float32 and wraps large unsigned integers around, but it
        # alone decodes images.
        images = [name for name, of in (self._table.features or {}).items() if _is_decoded(of)]
        if not images:
            yield from _by_arrow(self._table)
            return
        rest = [name for name in self._table.features if name not in images]
        decoded = _formatted(self._table.select_columns(images), "numpy")
        if not rest:
            yield from map(dict, decoded)
            return
        stored = _by_arrow(self._table.select_columns(rest))
        for first, second in zip(decoded, stored, strict=True):
            yield {**first, **second}


def _formatted(table: Any, kind: str) -> Iterator[Any]:
    return table.with_format(kind).iter(batch_size=TABLE_ROWS)


def _by_arrow(table: Any) -> Iterator[dict[str, np.ndarray]]:
    for batch in _formatted(table, "arrow"):
        yield {name: batch[name].to_numpy() for name in batch.column_names}


def _is_decoded(feature: Any) -> bool:
    """Say whether a column, or what its lists hold, is stored otherwise than it is given."""
    inner = getattr(feature, "feature", None)
    return hasattr(feature, "decode_example") or (inner is not None and _is_decoded(inner))


def by_columns(data: Any) -> Any:
    """Read a `datasets.Dataset` of any format."""
    # A transform of the person's own makes the examples; any other format only their type, and
    # the choice of columns.
    if data.format["type"] == "custom":
        return by_index(data)
    return Rows(data.select_columns(data.format["columns"]))
