"""What a person's data are: arrays in memory, or batches that are read again and again or once."""

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from fastvi._errors import DataError, ErrorNote
from fastvi._typing import Batch, Given
from fastvi.target import stream
from fastvi.target.batches import (
    OTHER_EXAMPLES,
    Streamed,
    checksums,
    in_dtypes,
    of_one_dtype,
    one_kind,
)
from fastvi.target.examples import Examples
from fastvi.target.feed import concatenate
from fastvi.target.inputs import check_data, common_length, is_array, is_stream
from fastvi.target.leaves import as_array, kind_of
from fastvi.target.libraries import by_library
from fastvi.target.losses import num_examples, take_examples
from fastvi.target.process_parts import from_all_processes
from fastvi.target.tables import is_a, warned_of

# Windows of a stream that data in memory may have: 1 GiB. While batches are joined they take twice
# that, and once more on the device. Half of it streams CIFAR-100 in single precision, double needs
# 6 GiB at the peak.
HELD_WINDOWS = 8
# Examples of a second pass that are compared with the first. Half of it overlooks examples that
# change rarely twice as often; double reads twice as many.
LOOKED_AT_AGAIN = 1024
# Bytes of a batch of arrays that lie on disk. Half of it reads twice as often; double holds more.
SLICE_BYTES = 2**24

ORDER_CHANGES = (
    "the order of the examples changes from pass to pass, so that results by example cannot be "
    "told apart. Pass a loader that does not shuffle (shuffle=False), or its data set."
)

Report = Callable[[int], None]


def hold_data(
    data: Given[Batch], n_data: int | None = None, dtype: Any = None, *, in_order: bool = False
) -> tuple[Batch, int]:
    """Read data into memory, whatever holds them, check them and put them on the device.

    Args:
        data: What `open_data` takes, of at most 1 GiB where it gives batches.
        n_data: Expected number of examples, if known.
        dtype: What floating-point arrays are cast to; their own as jax takes it when left out.
        in_order: Whether to refuse data whose order changes from pass to pass.

    Returns:
        The data as jax arrays and the number of examples.

    Raises:
        DataError: If they do not fit, or as for `check_data`.
    """
    opened = open_data(data, dtype, in_order=in_order)
    if is_stream(opened):
        why = "is read once" if isinstance(opened, Iterator) else f"has more than {_limit_text()}"
        raise DataError(
            f"here data are held in memory as arrays; got {kind_of(data)}, which {why}. Pass "
            "arrays, or a sample of the data. estimate_llc alone takes streams."
        )
    return check_data(opened, n_data, dtype)


def open_data(
    data: Given[Any], dtype: Any = None, report: Report | None = None, *, in_order: bool = False
) -> Any:
    """Return data as a pytree of arrays, or as batches where they do not fit into memory.

    Args:
        data: A pytree of arrays, a table, a data set of examples, a loader, or an iterator.
        dtype: What floating-point arrays of batches are cast to.
        report: Told the number of examples read so far.
        in_order: Whether to refuse data whose order changes from pass to pass.

    Returns:
        Arrays, in an order of their own where a loader shuffles them; or a `Streamed` of batches;
        or the iterator, of which nothing was read.

    Raises:
        DataError: If they are of no such kind, hold text, or change from pass to pass.

    Cost:
        One pass over what gives batches and the first 1,024 examples of another, or `HELD_WINDOWS`
        windows where they do not fit.
    """
    found = by_library(data)
    if isinstance(found, Streamed):
        return found
    if not is_stream(found):
        return _slices(found) if _is_large_on_disk(found) else found
    batches = from_all_processes(found)
    if isinstance(batches, Iterator):
        return batches
    # A number of an example may be written as an integer in some, and as a float in others.
    one_by_one = isinstance(found, Examples)
    with ErrorNote(f"fastvi: while {kind_of(data)} was read into memory."):
        whole = _read_whole(batches, dtype, report, in_order, one_by_one)
    return Streamed(batches) if whole is None else whole


def _read_whole(
    batches: Iterable[Any], dtype: Any, report: Report | None, in_order: bool, one_by_one: bool
) -> Batch | None:
    """Read all batches into memory, or return None where they do not fit."""
    parts, size, count = [], 0, 0
    for batch in one_kind(batches, dtype, any_dtype=one_by_one):
        # a reader may fill the same memory with the next batch
        parts.append(jax.tree_util.tree_map(np.array, batch))
        size += sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(batch))
        count += num_examples(batch)
        if size > _most_bytes():
            return None
        if report is not None:
            report(count)
    if not count:
        raise DataError("data has no examples: the iterable of batches was empty.")
    again = one_kind(batches, dtype, any_dtype=one_by_one)
    if one_by_one:
        parts = of_one_dtype(parts, dtype)
        kept = jax.tree_util.tree_map(lambda leaf: leaf.dtype, parts[0])
        again = (in_dtypes(batch, kept) for batch in again)
    sums = _sums(parts, zlib.crc32)
    if _look_again(again, sums):
        return concatenate(parts)
    if in_order:
        raise DataError(ORDER_CHANGES)
    # A loader that shuffles would give other bits, and refuse to go on with an earlier fit, in each
    # process. Two checksums tell all but a few in 2^64 examples apart.
    order = np.lexsort([_sums(parts, zlib.adler32), sums])
    return take_examples(concatenate(parts), order)


def _sums(parts: list[Batch], checksum: Callable[[Any], int]) -> np.ndarray:
    found = itertools.chain.from_iterable(checksums(part, checksum) for part in parts)
    return np.fromiter(found, np.uint32)


def _look_again(batches: Iterator[Batch], sums: np.ndarray) -> bool:
    """Refuse data that are others in a second pass, as far as its first examples tell.

    Returns:
        Whether they come in the order of the first pass, whose checksums are given.
    """
    count, seen, keeps_order, known = sums.size, 0, True, np.sort(sums)
    for batch in batches:
        again = _sums([batch], zlib.crc32)
        places = np.searchsorted(known, again).clip(max=count - 1)
        if not np.array_equal(known[places], again):
            raise DataError(OTHER_EXAMPLES)
        keeps_order = keeps_order and np.array_equal(again, sums[seen : seen + again.size])
        seen += again.size
        if seen > count or seen >= LOOKED_AT_AGAIN:
            break
    if seen > count or seen < min(count, LOOKED_AT_AGAIN):
        raise DataError(f"the iterable of batches gave {count} examples first and {seen} later.")
    return keeps_order


def _most_bytes() -> int:
    return HELD_WINDOWS * stream.WINDOW_BYTES


def _limit_text() -> str:
    return f"{_most_bytes() / 2**20:,.0f} MiB"


def _is_large_on_disk(data: Any) -> bool:
    """Say whether arrays that lie on disk are too large to be read whole."""
    leaves = jax.tree_util.tree_leaves(data, is_leaf=warned_of)
    if not any(isinstance(leaf, np.memmap) or _is_stored(leaf) for leaf in leaves):
        return False
    return sum(leaf.nbytes for leaf in leaves if hasattr(leaf, "nbytes")) > _most_bytes()


def _is_stored(leaf: Any) -> bool:
    # one of a file that is closed is false, and has no shape
    return (is_a(leaf, "h5py", "Dataset") and bool(leaf)) or is_a(leaf, "zarr", "Array")


class _Slices:
    """Batches of arrays that lie on disk, in their order."""

    def __init__(self, arrays: Any, length: int, size: int):
        self._arrays, self._length, self._size = arrays, length, size

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self._length, self._size):
            rows = slice(start, start + self._size)
            yield jax.tree_util.tree_map(
                lambda leaf, rows=rows: np.asarray(leaf[rows]), self._arrays
            )


def _slices(data: Any) -> Streamed:
    arrays = jax.tree_util.tree_map(
        lambda leaf: leaf if is_array(leaf) or _is_stored(leaf) else as_array(leaf, "data"), data
    )
    paths = jax.tree_util.tree_flatten_with_path(arrays)[0]
    leaves = [leaf for _, leaf in paths]
    for path, leaf in paths:
        if not leaf.shape:
            raise DataError(
                f"data{jax.tree_util.keystr(path)} is a scalar beside arrays on disk; every data "
                "array needs a leading axis of examples. Make lists of numbers arrays, by "
                "np.asarray, and close over settings in loss_fn."
            )
    length = common_length(
        {f"data{jax.tree_util.keystr(path)}": leaf.shape for path, leaf in paths}
    )
    of_example = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in leaves)
    return Streamed(_Slices(arrays, length, max(1, SLICE_BYTES // max(of_example, 1))))
