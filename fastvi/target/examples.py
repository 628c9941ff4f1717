"""Examples that come one by one, as map-style data sets give them, stacked into batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from fastvi._errors import DataError, ErrorNote
from fastvi._typing import Batch
from fastvi.target.leaves import RAGGED, as_array, kind_of
from fastvi.target.tables import plain, refuse_text

# Examples that are stacked at a time. Half of it checks batches twice as often; double holds twice
# as many examples beside the data, 38 MB of 256 images of 150 kB.
STACKED = 256


class Examples:
    """Batches of what gives one example at a time, anew in each pass.

    Attributes:
        read: Begins a pass.
    """

    def __init__(self, source: Any, read: Callable[[], Iterable[Any]]):
        self._source, self.read = source, read

    def __iter__(self) -> Iterator[Batch]:
        """Yield the examples, stacked some at a time."""
        examples, first = iter(self.read()), 0
        while True:
            # What the person's data set raises passes through, and says where.
            with ErrorNote(f"fastvi: {kind_of(self._source)} was read from example {first} on."):
                chunk = list(itertools.islice(examples, STACKED))
            if not chunk:
                return
            yield stack(chunk, first)
            first += len(chunk)


def by_index(source: Any) -> Examples:
    """Read a data set that has a length, and an example for each index."""
    return Examples(source, lambda: (source[index] for index in range(len(source))))


def by_iteration(source: Any) -> Examples:
    """Read a data set that gives one example after another when it is iterated over."""
    return Examples(source, lambda: source)


def stack(examples: list[Any], first: int = 0) -> Batch:
    """Return examples of one structure as a batch: arrays with an axis more.

    Args:
        examples: Each a pytree of arrays and numbers. A list of numbers is an array.
        first: The number of the first one, for errors.

    Raises:
        DataError: If an example holds text, or differs from the first in structure or shape.
    """
    examples = [plain(example) for example in examples]
    refuse_text(examples[0], "an example")
    paths, structure = jax.tree_util.tree_flatten_with_path(examples[0], is_leaf=_is_numbers)
    rows = [jax.tree_util.tree_flatten(example, is_leaf=_is_numbers) for example in examples]
    for number, (_, found) in enumerate(rows, start=first):
        if found != structure:
            raise DataError(
                f"example {number} is {found}, and example {first} is {structure}. Make all "
                "examples of one structure."
            )
    columns = zip(*(leaves for leaves, _ in rows), strict=True)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    stacked = [
        _stack_arrays(column, name, first) for column, name in zip(columns, names, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, stacked)


def _stack_arrays(column: Iterable[Any], name: str, first: int) -> np.ndarray:
    arrays = [as_array(leaf, f"example{name}") for leaf in column]
    for number, array in enumerate(arrays, start=first):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"examples differ in shape: example {first}{name} has {arrays[0].shape}, example "
                f"{number}{name} has {array.shape}.{RAGGED}"
            )
    return np.stack(arrays)


def _is_numbers(node: Any) -> bool:
    """Say whether a list is one of numbers, or of such lists: an array, not a pytree of arrays."""
    return isinstance(node, list) and all(map(_is_number_or_list, node))


def _is_number_or_list(node: Any) -> bool:
    return isinstance(node, (int, float, np.number, np.bool_)) or _is_numbers(node)


def are_examples(data: Any) -> bool:
    """Say whether data are a list of examples: tuples or dicts, of which one holds a number.

    No pytree of arrays has a number among its leaves, so that these are no batches or columns.
    """
    if type(data) is not list or len(data) < 2:
        return False
    kind = type(data[0])
    if not issubclass(kind, (tuple, dict)) or any(type(entry) is not kind for entry in data):
        return False
    leaves = jax.tree_util.tree_leaves(data[0], is_leaf=_is_numbers)
    return any(isinstance(leaf, (int, float, str)) or np.ndim(leaf) == 0 for leaf in leaves)
