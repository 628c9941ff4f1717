"""Parts of the weights by name: patterns of paths, with slices, to masks of the parameters."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Given, PyTree
from fastvi.target.inputs import is_array

MOST_NAMES = 8  # that an error lists; half may leave out the one that was meant, double is a page
# Likeness of names, from 0 to 1, from which on an error calls one near. Half calls nearly all of
# them near, double none.
NEAR = 0.4


class Named(NamedTuple):
    """An array of parameters, its name, and its number among the leaves."""

    name: str
    number: int
    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        return tuple(self.array.shape)


class Match(NamedTuple):
    """An array that a pattern matches, and the texts that its wildcards stand for."""

    named: Named
    captured: tuple[str, ...]


def named_arrays(params: PyTree) -> list[Named]:
    """Return the floating-point arrays of parameters, each by its keys, joined with "/"."""
    found = []
    for number, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
            found.append(Named(path_name(path), number, leaf))
    return found


def path_name(path: Iterable[Any]) -> str:
    """Join the keys of a leaf's path in a pytree with "/"."""
    return "/".join(map(_key_name, path))


def _key_name(key: Any) -> str:
    # keys of a dict or a registered node, numbers of a list, names of attributes
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key).strip(".[]'\"")


def select_part(params: PyTree, patterns: Given[str | Sequence[str]]) -> PyTree:
    """Return the mask of a part of the parameters, named by patterns of paths.

    A path is the keys of an array joined with "/": dict keys, attributes and positions in lists, as
    in "blocks/0/attn/w_qkv". A "." in a key is a separator too, so that names of torch's state
    dicts are paths. A pattern selects the arrays whose path it matches, and all below a path that
    it matches. "*" and "?" stay within one key, "**" is any number of keys. Brackets behind the
    path hold a slice as numpy writes it, of each array: "blocks/*/attn/w_qkv[:, 0:16]".

    Args:
        params: The parameters, any pytree.
        patterns: One pattern, or several whose union is the part.

    Returns:
        A pytree in the structure of `params`, of bools and boolean arrays: what `param_mask` takes.

    Raises:
        ConfigError: If a pattern matches nothing, or a slice does not fit an array that it matches.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fastvi import select_part
        >>> params = {"linear": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}}
        >>> select_part(params, "linear/w[:, 0]")["linear"]["w"].tolist()
        [[True, False, False], [True, False, False]]
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ConfigError("a part needs at least one pattern; got none.")
    arrays, chosen = named_arrays(params), {}
    for pattern in patterns:
        path, slices = _split_slice(pattern)
        for named, _ in match(arrays, path):
            before = chosen.get(named.number, False)
            chosen[named.number] = before | _sliced(named, slices, pattern)
    return mask_of(params, chosen)


def mask_of(params: PyTree, chosen: Mapping[int, Any]) -> PyTree:
    """Return the mask of the parameters that is this of some leaves, and False of the others."""
    leaves, treedef = jax.tree_util.tree_flatten(params)
    masks = [chosen.get(number, False) for number in range(len(leaves))]
    # a bool where all vary: then the array is not cut
    whole = [True if np.all(mask) else mask for mask in masks]
    return treedef.unflatten(whole)


def match(arrays: Sequence[Named], path: str) -> list[Match]:
    """Return the arrays that a pattern of a path matches.

    Raises:
        ConfigError: If there are none; it lists the nearest names.
    """
    compiled, found = _as_regex(path), []
    for named in arrays:
        matched = compiled.fullmatch(_separated(named.name))
        if matched is not None:
            found.append(Match(named, tuple(text or "" for text in matched.groups())))
    if not found:
        raise ConfigError(
            f"pattern {path!r} matches no array of the parameters. {_near(arrays, path)}"
        )
    return found


def _near(arrays: Sequence[Named], path: str) -> str:
    names = [named.name for named in arrays]
    near = difflib.get_close_matches(path, names, MOST_NAMES, NEAR)
    listed = ", ".join(map(repr, near or names[:MOST_NAMES]))
    more = "" if near or len(names) <= MOST_NAMES else f" and {len(names) - MOST_NAMES} others"
    return f"{'Near names' if near else 'Names'} are {listed}{more}."


def _separated(path: str) -> str:
    return path.replace(".", "/")


def _as_regex(path: str) -> re.Pattern[str]:
    """Translate a pattern; what wildcards stand for becomes groups, and anything may follow."""
    pieces = re.split(r"(\*\*/?|\*|\?)", _separated(path).strip("/"))
    wild = {"**/": r"((?:[^/]+/)*)", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}
    return re.compile("".join(wild.get(one) or re.escape(one) for one in pieces) + "(?:/.*)?")


def _split_slice(pattern: Given[str]) -> tuple[str, str | None]:
    """Return the path of a pattern and the text in its brackets, None where there are none."""
    if not isinstance(pattern, str):
        raise ConfigError(
            f"a pattern must be a text such as 'blocks/*/attn/**'; got {type(pattern).__name__}."
        )
    found = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", pattern.strip())
    if found is None:
        raise ConfigError(
            f"pattern {pattern!r} must be a path, with one slice in brackets at its end if any, "
            "such as 'blocks/0/w_qkv[:, 0:16]'."
        )
    return found[1], found[2]


def _sliced(named: Named, text: str | None, pattern: str) -> np.ndarray:
    """Return which entries of an array a slice selects."""
    chosen = np.zeros(named.shape, bool)
    if text is None:
        return ~chosen
    index = [_read_axis(one.strip(), pattern) for one in text.split(",")]
    if index.count(Ellipsis) > 1 or len(index) - index.count(Ellipsis) > chosen.ndim:
        raise ConfigError(
            f"the slice of pattern {pattern!r} has more axes than {named.name!r}, of shape "
            f"{named.shape}."
        )
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    behind = index[at + 1 :]
    for axis, one in [*enumerate(index[:at]), *enumerate(behind, chosen.ndim - len(behind))]:
        _check_range(one, chosen.shape[axis], axis, named, pattern)
    chosen[tuple(index)] = True
    if not chosen.any():
        raise ConfigError(
            f"the slice of pattern {pattern!r} is empty in {named.name!r}, of shape {named.shape}."
        )
    return chosen


def _read_axis(text: str, pattern: str) -> Any:
    """Read the index of one axis: a number, a slice or "..."."""
    if text == "...":
        return Ellipsis
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    found = re.fullmatch(r"\s*:\s*".join([r"([+-]?\d+)?"] * 2) + r"(?:\s*:\s*([+-]?\d+)?)?", text)
    if found is None or (found[3] and int(found[3]) == 0):
        raise ConfigError(
            f"the slice of pattern {pattern!r} must have numbers, slices such as 0:16 or '...' "
            f"between its commas; got {text!r}."
        )
    return slice(*(int(one) if one else None for one in found.groups()))


def _check_range(one: Any, size: int, axis: int, named: Named, pattern: str) -> None:
    """Refuse what numpy would cut off or wrap around."""
    ends = (one.start, one.stop) if isinstance(one, slice) else (one,)
    most = size if isinstance(one, slice) else size - 1
    outside = [end for end in ends if end is not None and not -size <= end <= most]
    if outside:
        raise ConfigError(
            f"the slice of pattern {pattern!r} is out of range: {outside[0]} on axis {axis} of "
            f"{named.name!r}, which has shape {named.shape}."
        )
