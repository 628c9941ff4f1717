"""Named tuples as arrays and JSON, and back, bit by bit."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

# What stands in JSON for what it does not have: the first name of an object says its kind.
RECORD, RECORDS, TUPLE, DICT, HOST, DEVICE = "record", "records", "tuple", "dict", "host", "device"


def pack(value: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Return a value as JSON, and the arrays that it refers to by name.

    It may hold named tuples, tuples, mappings from text, arrays of numpy and jax, numbers, text and
    None. Named tuples in a row whose fields are arrays of numpy, all of the same shapes, are
    stacked: there may be thousands.
    """
    arrays: dict[str, np.ndarray] = {}

    def put(array: Any) -> str:
        name = f"array_{len(arrays)}"
        arrays[name] = np.asarray(array)
        return name

    def flat(found: Any) -> Any:
        if found is None or type(found) in (bool, int, float, str):
            return found
        if isinstance(found, np.float64):  # Python computes with it as with its own
            return float(found)
        if isinstance(found, np.ndarray):
            return {HOST: put(found)}
        if isinstance(found, jax.Array):
            return {DEVICE: put(found)}
        if isinstance(found, Mapping):
            return {DICT: {name: flat(one) for name, one in found.items()}}
        if _is_record(found):
            return {RECORD: type(found).__name__, "fields": [flat(one) for one in found]}
        if isinstance(found, tuple) and _are_alike(found):
            stacked = [put(np.stack(leaves)) for leaves in zip(*found, strict=True)]
            return {RECORDS: type(found[0]).__name__, "count": len(found), "fields": stacked}
        if isinstance(found, tuple):
            return {TUPLE: [flat(one) for one in found]}
        raise TypeError(f"{type(found).__name__} cannot be packed")

    return flat(value), arrays


def _is_record(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _are_alike(values: tuple[Any, ...]) -> bool:
    """Say whether these are named tuples that can be stacked, field by field."""

    def kind(one: Any) -> Any:
        if not _is_record(one) or any(type(leaf) is not np.ndarray for leaf in one):
            return None
        return type(one), *((leaf.shape, leaf.dtype) for leaf in one)

    kinds = set(map(kind, values))
    return len(kinds) == 1 and None not in kinds


def unpack(packed: Any, arrays: Mapping[str, np.ndarray], classes: Sequence[Any]) -> Any:
    """Return the value that was packed.

    Args:
        packed: Its JSON.
        arrays: Its arrays, by name.
        classes: The named tuples that it may hold.
    """
    by_name = {one.__name__: one for one in classes}

    def build(found: Any) -> Any:
        if not isinstance(found, dict):
            return found
        kind, content = next(iter(found.items()))
        if kind == HOST:
            return arrays[content]
        if kind == DEVICE:  # a copy: steps use up the arrays that walkers are in
            return jax.device_put(arrays[content], may_alias=False)
        if kind == DICT:
            return {name: build(one) for name, one in content.items()}
        if kind == TUPLE:
            return tuple(map(build, content))
        if kind == RECORD:
            return by_name[content](*map(build, found["fields"]))
        stacked = [arrays[name] for name in found["fields"]]
        return tuple(
            # a leaf without a dimension stays an array
            by_name[content](*(np.asarray(leaf[number]) for leaf in stacked))
            for number in range(found["count"])
        )

    return build(packed)
