"""Batches as people's iterables give them: checked, compared, and divided anew."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Batch
from fastvi.target.feed import concatenate
from fastvi.target.inputs import as_held, numeric, refuse_examples_in_a_list, refuse_sparse
from fastvi.target.leaves import kind_of
from fastvi.target.losses import describe_arrays, num_examples, take_examples
from fastvi.target.tables import by_name, plain, refuse_text

OTHER_EXAMPLES = (
    "the iterable of batches gave other examples in a later pass than in the first, so that there "
    "is no one loss on all data. Switch augmentation, noise, drop_last and draws with replacement "
    "off; the order may change."
)


class Streamed:
    """Batches of an object that can be iterated over again, and whose data are not held."""

    def __init__(self, source: Iterable[Any]):
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        """Begin another pass."""
        return iter(self.source)


def one_kind(
    batches: Iterable[Any], dtype: Any = None, *, any_dtype: bool = False
) -> Iterator[Batch]:
    """Yield batches cast to the dtype; refuse what differs from the first, or is no batch.

    With `any_dtype` batches may differ in dtype alone.
    """
    source = batches.source if isinstance(batches, Streamed) else batches
    count, first = 0, None
    for given in batches:
        batch = _checked(given, dtype)
        lengths = {leaf.shape[:1] for leaf in jax.tree_util.tree_leaves(batch)}
        if len(lengths) != 1 or lengths == {()}:
            raise DataError(
                f"all arrays of a batch need the same leading axis (examples); after {count} "
                f"examples {kind_of(source)} gave {describe_arrays(batch)}. "
                "Make it give batches of arrays."
            )
        refuse_examples_in_a_list(batch, is_batch=True)
        first = batch if first is None else first
        # Batches may differ in their number of examples, so the first axis is left out.
        wanted, found = describe_arrays(first, 1), describe_arrays(batch, 1)
        if found != wanted and not (any_dtype and _shapes(first) == _shapes(batch)):
            raise DataError(f"batches differ: {wanted} first, {found} after {count} examples.")
        count += num_examples(batch)
        yield batch


def _shapes(batch: Batch) -> Any:
    return jax.tree_util.tree_map(lambda leaf: str(leaf.shape[1:]), batch)


def of_one_dtype(parts: list[Batch], dtype: Any) -> list[Batch]:
    """Return batches of one structure in the dtypes that hold all of them, floats in `dtype`."""

    def common(*leaves: np.ndarray) -> Any:
        kept = jax.dtypes.canonicalize_dtype(np.result_type(*{leaf.dtype for leaf in leaves}))
        return dtype if dtype is not None and np.issubdtype(kept, np.floating) else kept

    dtypes = jax.tree_util.tree_map(common, *parts)
    return [in_dtypes(part, dtypes) for part in parts]


def in_dtypes(batch: Batch, dtypes: Any) -> Batch:
    """Return a batch cast to a dtype for each of its arrays."""
    return jax.tree_util.tree_map(lambda leaf, kept: leaf.astype(kept, copy=False), batch, dtypes)


def _checked(given: Any, dtype: Any) -> Batch:
    """Return a batch, or a table of one, as numpy arrays in the dtype."""

    def cast(path: Any, leaf: Any) -> np.ndarray:
        name = "batch" + jax.tree_util.keystr(path)
        return np.asarray(as_held(numeric(leaf, name), name, dtype))

    given = by_name(plain(given))
    refuse_text(given, "batch")
    refuse_sparse(given)
    return jax.tree_util.tree_map_with_path(cast, given)


def checksums(batch: Batch, checksum: Callable[[Any], int] = zlib.crc32) -> Iterator[int]:
    """Yield a checksum of each example of a batch."""
    # The arrays of an example are joined first, so that mixed-up pairs change it.
    rows = [
        np.ascontiguousarray(leaf).reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
        for leaf in jax.tree_util.tree_leaves(batch)
    ]
    return map(checksum, np.concatenate([part.view(np.uint8) for part in rows], axis=1))


def regrouped(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Yield the same examples in batches of one size and a rest."""
    waiting, missing = [], size
    for batch in batches:
        start, length = 0, num_examples(batch)
        # A batch may fill several of the asked size, or only a part of one.
        while length - start >= missing:
            waiting.append(take_examples(batch, slice(start, start + missing)))
            yield concatenate(waiting)
            start, waiting, missing = start + missing, [], size
        if start < length:
            waiting.append(take_examples(batch, slice(start, None)))
            missing -= length - start
    if waiting:
        yield concatenate(waiting)
