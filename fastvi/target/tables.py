"""Tables by column: frames, xarray data sets, structured arrays; and text beside numbers."""

import sys
from collections.abc import Callable, Iterator, Mapping, ValuesView
from typing import Any

import jax
import numpy as np

from fastvi._errors import DataError

# Entries that an error lists. Half may hide the one that is looked for; double fills the screen.
MOST_SHOWN = 8
# What a person would write to leave columns out, by the package that a table is of.
_LEFT_OUT: dict[str, Callable[[list[Any]], str]] = {
    "pandas": lambda names: f"data.drop(columns={names})",
    "polars": lambda names: f"data.drop({names})",
    "pyarrow": lambda names: f"data.drop_columns({names})",
    "xarray": lambda names: f"data.drop_vars({names})",
    "datasets": lambda names: f"data.remove_columns({names})",
}


def is_a(value: Any, package: str, name: str) -> bool:
    """Say whether a value is of a class of a package, or of one derived from it.

    Told by names alone, so that no package is imported that the person has not imported.
    """
    return any(kind.__name__ == name and _is_from(kind, package) for kind in type(value).__mro__)


def _is_from(kind: type, package: str) -> bool:
    # A person's own module may have the name of a package, such as datasets.py. All packages whose
    # classes are told by name state their version.
    return kind.__module__.partition(".")[0] == package and hasattr(
        sys.modules.get(package), "__version__"
    )


def is_frame(data: Any) -> bool:
    """Say whether data are a table with named columns.

    Of pandas, polars, or any that acts as these do.
    """
    # a lazy frame of polars warns when it is asked for its columns
    return not is_a(data, "polars", "LazyFrame") and (
        (hasattr(data, "columns") and hasattr(data, "to_numpy")) or is_a(data, "pyarrow", "Table")
    )


def is_table(data: Any) -> bool:
    """Say whether data are read by name: a frame, an xarray data set, a structured array."""
    return is_frame(data) or is_a(data, "xarray", "Dataset") or _fields(data) is not None


def by_name(data: Any) -> Any:
    """Return a table as a dict of its columns, and anything else as it is.

    Raises:
        DataError: If columns hold text, their names are not of one type, or variables of an xarray
            data set do not share their first dimension.
    """
    if is_frame(data):
        names = list(data.column_names if is_a(data, "pyarrow", "Table") else data.columns)
        _check_names(names)
        return without_text({name: data[name].to_numpy() for name in names}, data)
    if is_a(data, "xarray", "Dataset"):
        _check_dimensions(data)
        return without_text({name: data[name].values for name in data.data_vars}, data)
    if (fields := _fields(data)) is not None:
        return without_text({name: data[name] for name in fields}, data)
    return data


def plain(tree: Any) -> Any:
    """Return a pytree in which mappings that jax takes for leaves are dicts.

    Tokenizers and their collators give such.
    """
    return jax.tree_util.tree_map(
        lambda leaf: plain(dict(leaf)) if isinstance(leaf, Mapping) else leaf,
        tree,
        is_leaf=warned_of,
    )


def _fields(data: Any) -> tuple[str, ...] | None:
    return data.dtype.names if isinstance(data, np.ndarray) else None


def _check_names(names: list[Any]) -> None:
    # The columns become a dict, whose keys jax sorts: names of two types cannot be.
    if len(set(names)) < len(names) or len({type(name) for name in names}) > 1:
        raise DataError(
            f"columns of data must have different names of one type; got {names}. Rename them."
        )


def _check_dimensions(data: Any) -> None:
    first = {name: data[name].dims[:1] for name in data.data_vars}
    if len(set(first.values())) > 1:
        listed = ", ".join(f"{name}: {data[name].dims}" for name in first)
        raise DataError(
            "the variables of an xarray Dataset must share their first dimension, that of the "
            f"examples; got {listed}. Transpose them, data.transpose('example', ...), or drop "
            "those without it, data.drop_vars([...])."
        )


def without_text(columns: dict[Any, Any], table: Any) -> dict[Any, Any]:
    """Return the columns of a table, all of which must hold numbers."""
    names = [name for name, column in columns.items() if _is_text(column)]
    fixes = (fix(names) for package, fix in _LEFT_OUT.items() if _is_of(table, package))
    refuse_text(columns, "data", next(fixes, None))
    return columns


def _is_of(value: Any, package: str) -> bool:
    return any(_is_from(kind, package) for kind in type(value).__mro__)


def refuse_text(tree: Any, name: str, left_out: str | None = None) -> None:
    """Refuse text among the arrays, and name all that hold some.

    Args:
        tree: Data, a batch or an example.
        name: What errors call it.
        left_out: Code that leaves the text out.
    """
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_ends_look)[0]
    texts = [
        f"{name}{jax.tree_util.keystr(path)} has dtype {_text_dtype(leaf)}"
        for path, leaf in found
        if _is_text(leaf)
    ]
    if texts:
        shown = ", ".join(texts[:MOST_SHOWN]) + (" and more" if len(texts) > MOST_SHOWN else "")
        fix = "." if left_out is None else f": {left_out}."
        raise DataError(
            f"{shown}, which is text; data must be numeric arrays. Encode strings as numbers, or "
            f"leave them out{fix}"
        )


def warned_of(node: Any) -> bool:
    """Say whether jax warns where it comes upon a node."""
    return isinstance(node, (Iterator, ValuesView))


def _ends_look(node: Any) -> bool:
    return warned_of(node) or _is_text(node)


def _is_text(value: Any) -> bool:
    """Say whether a column, or its first entry where it is of objects, is text."""
    if isinstance(value, (str, bytes)):
        return True
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "O":
            return value.dtype.kind in "UST"
        # a missing value may come before the first text
        entries = (entry for entry in value.flat if entry is not None)
        return isinstance(next(entries, None), (str, bytes))
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (str, bytes))


def _text_dtype(value: Any) -> str:
    """Return the dtype that numpy reads text with."""
    return str(np.asarray(value[:1] if isinstance(value, (list, tuple)) else value).dtype)
