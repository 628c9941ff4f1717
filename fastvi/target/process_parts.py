"""Batches of several processes, each of which reads a part of the data."""

import pickle
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from fastvi._errors import DataError
from fastvi._processes import exchange, is_several
from fastvi._typing import Batch
from fastvi.target.leaves import as_array


def from_all_processes(batches: Iterable[Any]) -> Iterable[Any]:
    """Return batches of all processes, where there are several: the same ones in each of them.

    Each process reads its own part. One that has no more takes part until all have none.
    """
    if not is_several():
        return batches
    return _joined(batches) if isinstance(batches, Iterator) else _AllParts(batches)


class _AllParts:
    """Batches that can be read again."""

    def __init__(self, batches: Iterable[Any]):
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return _joined(self._batches)


def _joined(batches: Iterable[Any]) -> Iterator[Batch]:
    """Yield what all processes read, batch by batch, in their order."""
    own, is_begun = iter(batches), False
    while True:
        contents = _contents(own)
        if not any(contents):
            return
        if not is_begun and len(set(contents)) == 1:
            raise DataError(
                f"all {len(contents)} processes give the same first batch. Give each process a "
                "part of its own (every process_index-th file or batch), or pass arrays, which "
                "every process holds whole."
            )
        is_begun = True
        yield from (pickle.loads(content) for content in contents if content)


def _contents(own: Iterator[Any]) -> list[bytes]:
    """Return the next batch of every process, empty where it has none.

    Raises:
        DataError: If another process has failed to read; what this one raised comes first.
    """
    try:
        batch = next(own, None)
        content = b"" if batch is None else pickle.dumps(_on_host(batch))
    except BaseException:
        exchange(None)  # else the others would wait for this one
        raise
    found = exchange(content)
    failed = [number for number, one in enumerate(found) if one is None]
    if failed:
        raise DataError(f"process {failed[0]} could not read its part of the data; see its error.")
    return [one or b"" for one in found]


def _on_host(batch: Any) -> Any:
    return jax.tree_util.tree_map(lambda leaf: np.asarray(as_array(leaf, "data")), batch)
