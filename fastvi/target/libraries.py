"""Data sets and loaders of libraries, told by names: what arrays or batches they give."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from fastvi._errors import DataError
from fastvi.target import grain_sets, hugging_face, torch_loaders
from fastvi.target.examples import are_examples, by_index, by_iteration
from fastvi.target.inputs import has_dtype
from fastvi.target.leaves import kind_of
from fastvi.target.tables import is_a, is_table, warned_of


def by_library(data: Any) -> Any:
    """Return what a known container holds: arrays, or what gives batches of them."""
    if are_examples(data):
        return by_index(data)
    structure = jax.tree_util.tree_structure(data, is_leaf=warned_of)
    if not jax.tree_util.treedef_is_leaf(structure) or is_table(data):
        return data
    for (package, name), convert in _CONTAINERS.items():
        if is_a(data, package, name):
            return convert(data)
    return by_index(data) if _is_map_style(data) else data


def _is_map_style(data: Any) -> bool:
    # an array of Python's is a sequence of numbers
    if has_dtype(data) or isinstance(data, (str, bytes, range, array)):
        return False
    # What can be iterated over gives batches, as a loader does, unless it is declared a sequence.
    is_indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    return isinstance(data, Sequence) or (is_indexed and not isinstance(data, Iterable))


def _refuse(fix: str) -> Callable[[Any], Any]:
    def convert(data: Any) -> Any:
        raise DataError(f"data is {kind_of(data)}, of which no arrays are read. Pass {fix}.")

    return convert


def _torch_tensors(data: Any) -> Any:
    # A class derived from it may give other examples than the tensors hold.
    return data.tensors if type(data).__module__.startswith("torch.") else by_index(data)


# By package and class, the more special class first. Those that are not named are taken for what
# they can do: `by_library`.
_CONTAINERS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("polars", "LazyFrame"): _refuse("data.collect()"),
    ("pyarrow", "RecordBatch"): _refuse("data.to_pandas()"),
    ("datasets", "DatasetDict"): _refuse('one of its splits, such as data["train"]'),
    ("datasets", "IterableDatasetDict"): _refuse('one of its splits, such as data["train"]'),
    ("datasets", "Dataset"): hugging_face.by_columns,
    ("datasets", "IterableDataset"): hugging_face.Rows,
    ("zarr", "Group"): _refuse(
        "a dict of its arrays, such as {name: data[name] for name in names}"
    ),
    ("torch", "DataLoader"): torch_loaders.by_loader,
    ("torch", "TensorDataset"): _torch_tensors,
    ("torch", "IterableDataset"): by_iteration,
    ("torch", "Dataset"): by_index,
    ("grain", "MapDataset"): grain_sets.by_dataset,
    ("grain", "IterDataset"): grain_sets.by_dataset,
    ("grain", "DataLoader"): grain_sets.by_loader,
}
