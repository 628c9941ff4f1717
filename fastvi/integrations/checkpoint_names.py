"""Names of arrays in checkpoints, and pytrees of the same names."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import PyTree
from fastvi.integrations.names import few


def nest(flat: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Make nested dicts of names such as "a/b"; the inverse of joining their keys.

    Raises:
        DataError: If a name is also the beginning of another one.
    """
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *folders, last = name.split(separator)
        place: Any = nested
        for folder in folders:
            place = place.setdefault(folder, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last in place:
            raise DataError(
                f"the names of a checkpoint clash at {name!r} when {separator!r} nests."
            )
        place[last] = leaf
    return nested


def part_of(tree: PyTree, part: str, source: str) -> PyTree:
    """Return what lies at a path of keys such as "state/params".

    Raises:
        DataError: If there is nothing there.
    """
    for key in part.split("/"):
        if not isinstance(tree, Mapping) or key not in tree:
            held = sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
            raise DataError(f"{source} has no part {part!r}: no {key!r} in {held}.")
        tree = tree[key]
    return tree


def fit_to(like: PyTree, tree: PyTree, source: str) -> PyTree:
    """Put the arrays of a checkpoint into the structure of other parameters, by their names.

    Args:
        like: Parameters of the same model; their arrays say names and shapes alone.
        tree: What a checkpoint holds.
        source: What it was read from, for errors.

    Returns:
        The structure of `like` with the checkpoint's arrays, in the dtypes that they have.

    Raises:
        DataError: If names are missing, unexpected, or of other shapes.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(like)
    wanted = _by_name([(path, leaf) for path, leaf in flat if _is_array(leaf)], "params")
    found = _by_name(jax.tree_util.tree_flatten_with_path(tree)[0], source)
    _compare(wanted, found, source)
    leaves = [found[_name(path)] if _is_array(leaf) else leaf for path, leaf in flat]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _compare(wanted: dict[str, Any], found: dict[str, Any], source: str) -> None:
    both = [name for name in wanted if name in found]
    troubles = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of other shapes": [
            f"{name} {np.shape(found[name])} for {tuple(wanted[name].shape)}"
            for name in both
            if np.shape(found[name]) != tuple(wanted[name].shape)
        ],
        "not floating-point": [
            name for name in both if not jnp.issubdtype(_dtype(found[name]), jnp.floating)
        ],
    }
    told = [f"{trouble}: {few(names)}" for trouble, names in troubles.items() if names]
    if told:
        raise DataError(
            f"{source} does not fit the parameters; {'; '.join(told)}. Where the parameters are a "
            'part of it, name the part, such as part="params".'
        )


def _by_name(leaves: list[tuple[Any, Any]], source: str) -> dict[str, Any]:
    named = {_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise DataError(f"two arrays of {source} have one name where '.' and '/' are the same.")
    return named


def _name(path: tuple[Any, ...]) -> str:
    """Return one name for all the ways to write it: "a.b", "a/b", "['a']['b']" and levels."""
    words = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path
    ]
    # brackets and quotes are those of jax.tree_util.keystr
    name = re.sub(r"[./\[\]'\"]+", "/", "/".join(words)).strip("/")
    # flax nnx wraps each array into a variable that has it as its value
    return name.removesuffix("/value")


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if _is_array(leaf) else np.asarray(leaf).dtype
