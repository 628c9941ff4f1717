"""Data as people pass them: what is taken, in which dtype, and what is refused with the fix."""

from collections.abc import Iterable, Mapping, Set, ValuesView
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._devices import on_host
from fastvi._errors import DataError, UnavailableError
from fastvi._typing import Array, Batch, Given
from fastvi.target.leaves import RAGGED, as_array, kind_of
from fastvi.target.tables import MOST_SHOWN, by_name, is_a, is_table, refuse_text, warned_of

# Bytes of an array that is gathered from several processes, as much as is read into memory. Half
# refuses arrays that fit; double holds as much more beside the array itself.
MOST_GATHERED = 2**30

# alike in shape, that data may be a list or tuple of: more are taken for examples, not stacked
FEW_ARRAYS = 8
# What to pass in place of something that iterates, but over no batches.
_FIXES_OF_ITERABLES = (
    ((str, bytes), "Load the file first, and pass its arrays."),
    (Mapping, "Pass a dict of arrays, such as {name: np.asarray(data[name]) for name in data}."),
    ((Set, ValuesView), "Pass a tuple or a dict of arrays."),
    (range, "Pass an array, such as np.arange(n)."),
)


def is_stream(data: Any) -> bool:
    """Say whether data are an iterable of batches rather than a pytree of arrays.

    Raises:
        DataError: If they iterate over something else than batches.
    """
    if not isinstance(data, Iterable) or has_dtype(data) or is_table(data):
        return False
    # A container of arrays iterates too: only what jax takes for one leaf can give batches.
    structure = jax.tree_util.tree_structure(data, is_leaf=warned_of)
    if not jax.tree_util.treedef_is_leaf(structure):
        return False
    fix = next((fix for kinds, fix in _FIXES_OF_ITERABLES if isinstance(data, kinds)), None)
    if fix is not None:
        raise DataError(
            f"data must be a pytree of arrays or give batches; got {kind_of(data)}. {fix}"
        )
    return True


def has_dtype(value: Any) -> bool:
    """Say whether a value acts as an array."""
    # h5py does not tell the dtype of an array whose file is closed, but its class has the name
    return hasattr(type(value), "dtype") or hasattr(value, "dtype")


def check_data(
    data: Given[Batch], n_data: int | None = None, dtype: Any = None
) -> tuple[Batch, int]:
    """Check a data set and put it on the device.

    Args:
        data: Pytree of numeric arrays with a common, non-empty leading axis, or a table, which
            becomes a dict of its columns.
        n_data: Expected number of examples, if known.
        dtype: What floating-point arrays are cast to; their own as jax takes it when left out.

    Returns:
        The data as jax arrays and the number of examples.

    Raises:
        DataError: If a leaf is not numeric, holds NaN or numbers that do not fit, is a scalar, or
            the lengths differ.
    """
    data = by_name(data)
    refuse_text(data, "data")
    refuse_sparse(data)
    paths, treedef = jax.tree_util.tree_flatten_with_path(data, is_leaf=warned_of)
    if not paths:
        raise DataError(
            "data is empty: pass a pytree of arrays with a common leading axis, such as (X, Y)."
        )
    named = {"data" + jax.tree_util.keystr(path): leaf for path, leaf in paths}
    leaves = [on_device(leaf, name, dtype) for name, leaf in named.items()]
    length = common_length({name: leaf.shape for name, leaf in zip(named, leaves, strict=True)})
    if length == 0:
        raise DataError("data has no examples: its leading axis has length 0.")
    refuse_examples_in_a_list(data)
    if n_data is not None and n_data != length:
        raise DataError(
            f"n_data must be the number of examples in data; got n_data={n_data} for {length} "
            "examples."
        )
    return jax.tree_util.tree_unflatten(treedef, leaves), length


def common_length(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the number of examples of arrays by name, which all must have."""
    lengths = {shape[0] for shape in shapes.values()}
    if len(lengths) > 1:
        few = list(shapes.items())[:MOST_SHOWN]
        listed = ", ".join(f"{name}: {shape[0]}" for name, shape in few)
        # so many arrays are sequences rather than columns
        rest = f" and more.{RAGGED}" if len(shapes) > MOST_SHOWN else "."
        raise DataError(
            f"all data arrays need the same leading axis (examples); got {listed}{rest}"
        )
    return lengths.pop()


def on_device(leaf: Any, name: str, dtype: Any = None) -> Array:
    """Check one array of data and return it as jax holds it."""
    if isinstance(leaf, jax.core.Tracer):
        return leaf
    array = numeric(leaf, name)
    if array.ndim == 0:
        raise DataError(
            f"{name} is a scalar; every data array needs a leading axis of examples. Make lists of "
            "numbers arrays (np.asarray; those of different lengths by fastvi.pad_sequences), and "
            "close over settings in loss_fn."
        )
    return jax.device_put(as_held(array, name, dtype))


def numeric(leaf: Any, name: str) -> Any:
    """Return a leaf as an array of numbers or booleans, a device's one as it is."""
    array = _whole(leaf, name) if isinstance(leaf, jax.Array) else as_array(leaf, name)
    is_time = jnp.issubdtype(array.dtype, np.timedelta64)  # which numpy counts among the integers
    if is_time or not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.number, jnp.bool_)):
        origin = "" if is_array(leaf) else f" as numpy reads {kind_of(leaf)}"
        fix = "Encode strings and objects first, and stack sequences of arrays."
        # numpy holds what it cannot look into as one object
        if array.ndim == 0 and isinstance(leaf, Iterable):
            fix = "What gives batches or examples is passed alone, not beside arrays."
        raise DataError(
            f"{name} has dtype {array.dtype}{origin}; data must be numeric arrays. {fix}"
        )
    return array


def _whole(array: Array, name: str) -> Any:
    """Return an array of several processes, of which each has a part, as one that each has whole.

    Raises:
        DataError: If it is larger than what is read into memory.
    """
    if array.is_fully_addressable:
        return array
    if array.nbytes > MOST_GATHERED:
        raise DataError(
            f"{name} has {array.nbytes / 2**30:.1f} GiB over several processes, and each holds "
            f"arrays whole, up to {MOST_GATHERED / 2**30:.0f} GiB. Pass each process the batches "
            "of its part, as an object that can be iterated over."
        )
    return on_host(array)


def as_held(array: Any, name: str, dtype: Any = None) -> Any:
    """Cast an array to what jax holds it in, and floats to `dtype`.

    Refuse numbers that this changes to others.
    """
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    kept = dtype if floating and dtype is not None else jax.dtypes.canonicalize_dtype(array.dtype)
    if jnp.issubdtype(array.dtype, jnp.integer):
        _check_range(array, name, kept)
    with np.errstate(over="ignore"):  # which is looked at next
        held = array.astype(kept) if array.dtype != kept else array
    if jnp.issubdtype(held.dtype, jnp.inexact) and not is_finite(held):
        if is_finite(array):
            raise DataError(
                f"{name} holds numbers too large for {np.dtype(kept)}. Standardise the data first."
            )
        raise DataError(
            f"{name} holds NaN or infinity; clean the data first (rows with missing values?)."
        )
    return held


def _check_range(array: Any, name: str, kept: Any) -> None:
    """Refuse integers that would wrap around."""
    # A type as wide as the array's own holds all of its values.
    if array.size == 0 or np.dtype(kept).itemsize >= array.dtype.itemsize:
        return
    least, most, bounds = int(array.min()), int(array.max()), jnp.iinfo(kept)
    if least < bounds.min or most > bounds.max:
        raise DataError(
            f"{name} has dtype {array.dtype} and values from {least} to {most}, which do not fit "
            f"{np.dtype(kept)}. "
            'Number them anew, or set jax.config.update("jax_enable_x64", True).'
        )


def is_finite(array: Any) -> bool:
    """Say whether all of an array is finite, where it lies.

    Memory that the host can read is not copied.
    """
    if isinstance(array, jax.Array) and not _on_host(array):
        return bool(jax.device_get(jnp.all(jnp.isfinite(array))))
    return bool(np.all(np.isfinite(np.asarray(array))))


def _on_host(array: jax.Array) -> bool:
    return array.is_fully_addressable and all(
        device.platform == "cpu" for device in array.devices()
    )


def refuse_sparse(data: Any) -> None:
    """Refuse sparse matrices, of jax, scipy and torch.

    Those of jax are pytrees, whose leaves have an axis of entries where examples are expected.
    """
    for leaf in jax.tree_util.tree_leaves(
        data, is_leaf=lambda node: _is_sparse(node) or warned_of(node)
    ):
        if _is_sparse(leaf):
            raise DataError(
                f"data holds a sparse matrix ({kind_of(leaf)}); pass it dense, by "
                f".{'to_dense' if hasattr(leaf, 'to_dense') else 'todense'}()."
            )


def _is_sparse(leaf: Any) -> bool:
    if is_a(leaf, "torch", "Tensor"):
        return str(leaf.layout) != "torch.strided"
    return any(
        kind.__module__.startswith(("jax.experimental.sparse", "scipy.sparse"))
        for kind in type(leaf).__mro__
    )


def refuse_examples_in_a_list(data: Any, is_batch: bool = False) -> None:
    """Refuse a list of examples, or of batches.

    As a pytree it is as many arrays, and n their length. A batch may have fewer examples than
    arrays, as the last one of a pass, so only the number of arrays tells there.
    """

    def look(node: Any) -> bool:
        # The fields of a named tuple have names, so they are meant as columns.
        if isinstance(node, (list, tuple)) and not hasattr(node, "_fields"):
            kinds = {str(jax.tree_util.tree_map(np.shape, entry)) for entry in node}
            length = max((np.shape(leaf)[0] for leaf in jax.tree_util.tree_leaves(node)), default=0)
            # Two arrays, such as inputs and targets, may be all of a data set of one example.
            most = FEW_ARRAYS if is_batch else max(2, min(FEW_ARRAYS, length))
            if len(kinds) == 1 and len(node) > most:
                raise DataError(
                    f"data holds a {type(node).__name__} of {len(node)} entries of one shape, "
                    f"which would count as {len(node)} arrays of {length} examples. Stack examples "
                    "(jnp.stack), concatenate batches, or pass columns as a dict."
                )
        return False

    jax.tree_util.tree_leaves(data, is_leaf=look)


def refuse_a_trace(*arguments: Any) -> None:
    """Refuse to estimate inside a transformation of jax, which has no numbers to look at."""
    # Inside a trace of jit a constant is traced too, which shows a trace that no argument is of.
    leaves = [*jax.tree_util.tree_leaves(arguments, is_leaf=warned_of), jnp.zeros(())]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise UnavailableError(
            "an estimate looks at numbers between its stages, so it cannot run inside jax.jit, "
            "vmap or grad. Call it outside, or use fastvi.fit, which can be traced."
        )


def is_array(value: Any) -> bool:
    """Say whether a value is an array, or a number that numpy holds as one."""
    return isinstance(value, (jax.Array, np.ndarray, np.generic))
