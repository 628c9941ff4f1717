"""Names of arrays in checkpoints, and pytrees of the same names."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import PyTree
from fastvi.integrations.names import MOST_NAMES, few
from fastvi.target.parts import path_name


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


def fit_to(like: PyTree, tree: PyTree, source: str, ignore: Sequence[str] = ()) -> PyTree:
    """Put the arrays of a checkpoint into the structure of other parameters, by their names.

    Args:
        like: Parameters of the same model; their arrays say names and shapes alone.
        tree: What a checkpoint holds.
        source: What it was read from, for errors.
        ignore: Patterns of names that the checkpoint may hold beside those of `like`.

    Returns:
        The structure of `like` with the checkpoint's arrays, in the dtypes that they have.

    Raises:
        DataError: If names are missing, unexpected, or of other shapes.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(like)
    wanted = _by_name([(path, leaf) for path, leaf in flat if _is_array(leaf)], "params")
    found = _by_name(jax.tree_util.tree_flatten_with_path(tree)[0], source)
    beside = [name for name in found if name not in wanted and not _is_ignored(name, ignore)]
    unexpected = [name for name in beside if not _is_tied(name, wanted, found)]
    _compare(wanted, found, unexpected, source, _words_of_part(wanted, found, tree))
    leaves = [found[_name(path)] if _is_array(leaf) else leaf for path, leaf in flat]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _is_ignored(name: str, ignore: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern.replace(".", "/")) for pattern in ignore)


def _is_tied(name: str, wanted: dict[str, Any], found: dict[str, Any]) -> bool:
    """Say whether a name is a second one of an array that is wanted."""
    return any(_is_same(found[name], found[other]) for other in wanted if other in found)


def _is_same(one: Any, other: Any) -> bool:
    if np.shape(one) != np.shape(other) or _dtype(one) != _dtype(other):
        return False
    if not np.array_equal(_bits(one), _bits(other)):
        return False
    # Biases at 0 and scales at 1 are equal by chance. A file of torch says that two are one.
    return bool(np.may_share_memory(one, other) or np.any(one != np.ravel(one)[0]))


def _bits(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _compare(
    wanted: dict[str, Any],
    found: dict[str, Any],
    unexpected: list[str],
    source: str,
    words_of_part: str | None,
) -> None:
    both = [name for name in wanted if name in found]
    troubles = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": unexpected,
        "of other shapes": [
            f"{name} {np.shape(found[name])} for {tuple(wanted[name].shape)}"
            for name in both
            if np.shape(found[name]) != tuple(wanted[name].shape)
        ],
        "not floating-point": [
            name for name in both if not jnp.issubdtype(_dtype(found[name]), jnp.floating)
        ],
    }
    told = {trouble: names for trouble, names in troubles.items() if names}
    if told:
        fix = words_of_part or (
            _words_of_buffers(unexpected)
            if [*told] == ["unexpected"]
            else "Pass a checkpoint of the same model."
        )
        lists = "; ".join(f"{trouble}: {few(names)}" for trouble, names in told.items())
        raise DataError(f"{source} does not fit the parameters; {lists}. {fix}")


def _words_of_part(wanted: dict[str, Any], found: dict[str, Any], tree: PyTree) -> str | None:
    """Name the part that has all the names, where there is one."""
    first = next(iter(wanted), "")
    for name in found:
        part = name.removesuffix(f"/{first}")
        if part == name or not all(f"{part}/{one}" in found for one in wanted):
            continue
        if isinstance(tree, Mapping) and part.split("/")[0] in tree:
            return f'They are a part of it: pass part="{part}", or PATH:{part} to --params.'
        return f'They are a part of it: pass separator="." and part="{part}".'
    return None


def _words_of_buffers(unexpected: list[str]) -> str:
    lasts = {f"*/{name.rpartition('/')[2]}" if "/" in name else name: None for name in unexpected}
    patterns = ", ".join(f'"{pattern}"' for pattern in [*lasts][:MOST_NAMES])
    more = ", ..." if len(lasts) > MOST_NAMES else ""
    return (
        "Buffers and frozen weights are no parameters: load them into the model, as by "
        "module.load_state_dict, before an adapter makes the loss, which keeps them. Where it has "
        f"the right ones, pass load_checkpoint(..., ignore=[{patterns}{more}])."
    )


def _by_name(leaves: list[tuple[Any, Any]], source: str) -> dict[str, Any]:
    named = {_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise DataError(f"two arrays of {source} have one name where '.' and '/' are the same.")
    return named


def _name(path: tuple[Any, ...]) -> str:
    """Return one name for all the ways to write it: "a.b", "a/b", "['a']['b']" and levels."""
    # brackets and quotes are those of jax.tree_util.keystr
    name = re.sub(r"[./\[\]'\"]+", "/", path_name(path)).strip("/")
    # flax nnx wraps each array into a variable that has it as its value
    return name.removesuffix("/value")


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if _is_array(leaf) else np.asarray(leaf).dtype
