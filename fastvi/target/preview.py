"""What parts of the weights cover, before anything is estimated."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastvi._errors import ConfigError, ErrorNote
from fastvi._typing import Given, PyTree
from fastvi.target.parts import Named, named_arrays, select_part
from fastvi.target.restrict import read_mask
from fastvi.target.restricted import Frozen

MOST_LISTED = 12  # overlaps and uncovered arrays that a preview lists; the others are counted


@dataclasses.dataclass(frozen=True)
class Covered:
    """What a part covers of one array.

    Attributes:
        array: Name of the array.
        shape: Its shape.
        slices: What varies of it as a slice, "0:8+32:40" being two stretches of an axis; empty
            where all of it does.
        numbers: How many numbers vary.
    """

    array: str
    shape: tuple[int, ...]
    slices: str
    numbers: int


@dataclasses.dataclass(frozen=True)
class PartsPreview:
    """What each part covers, where parts overlap, and what none covers; `print` it.

    Attributes:
        parts: By name of the part, what it covers of each array.
        total: Numbers that the parameters hold.
        overlaps: By two names of parts, the numbers that both cover.
        uncovered: By name of an array, the numbers of it that no part covers.
    """

    parts: dict[str, tuple[Covered, ...]]
    total: int
    overlaps: dict[tuple[str, str], int]
    uncovered: dict[str, int]

    @property
    def sizes(self) -> dict[str, int]:
        """How many numbers vary in each part."""
        return {name: sum(one.numbers for one in found) for name, found in self.parts.items()}

    def __str__(self) -> str:
        """Lay out a table."""
        width = max(len(one.array) for found in self.parts.values() for one in found)
        lines = []
        for name, found in self.parts.items():
            size = self.sizes[name]
            share = f"{100 * size / self.total:.3g} %"
            lines.append(f"{name}: {size:,} of {self.total:,} numbers, {share}")
            for one in found:
                cells = f"  {one.array:<{width}}  {one.shape!s:<14}  {one.numbers:>10,}"
                lines.append(f"{cells}  {one.slices}".rstrip())
        pairs = [f"{a} and {b}: {count:,}" for (a, b), count in self.overlaps.items()]
        left = [f"{name}: {count:,}" for name, count in self.uncovered.items()]
        return "\n".join([*lines, *_listed("in two parts", pairs), *_listed("in no part", left)])


def _listed(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return [f"{title}: nothing"]
    more = len(entries) - MOST_LISTED
    shown = [f"  {entry}" for entry in entries[:MOST_LISTED]]
    return [f"{title}", *shown, *([f"  and {more} others"] if more > 0 else [])]


def preview(params: PyTree, parts: Given[Mapping[str, Any]]) -> PartsPreview:
    """Say which numbers of the parameters vary in each part.

    Args:
        params: The parameters.
        parts: By name, patterns as `select_part` takes them, or masks as `restrict` takes them.

    Returns:
        The preview; `print(preview(params, parts))`.

    Raises:
        ConfigError: If there is no part, or one names nothing or does not fit the parameters.

    Cost:
        No loss. A boolean for each number of the arrays that a part covers.
    """
    arrays, covered, by_leaf = named_arrays(params), {}, {}
    for name, mask in masks_by_name(params, parts).items():
        varying, covered[name] = read_mask(params, mask), []
        for named in arrays:
            which = varying[named.number]
            if which is not False:
                entries = which.array if isinstance(which, Frozen) else np.ones(named.shape, bool)
                covered[name].append(_covered(named, entries))
                by_leaf.setdefault(named.number, {})[name] = entries
    overlaps: dict[tuple[str, str], int] = {}
    for found in by_leaf.values():
        for (first, a), (second, b) in itertools.combinations(found.items(), 2):
            if shared := int(np.sum(a & b)):
                overlaps[first, second] = overlaps.get((first, second), 0) + shared
    left = {one.name: _left(one, by_leaf.get(one.number, {})) for one in arrays}
    return PartsPreview(
        {name: tuple(found) for name, found in covered.items()},
        sum(one.array.size for one in arrays),
        overlaps,
        {name: count for name, count in left.items() if count},
    )


def masks_by_name(params: PyTree, parts: Given[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mask of each part, read from patterns where it is given by them.

    Raises:
        ConfigError: If parts are no mapping from names, there are none, or one names nothing or
            does not fit the parameters; a note names it.
    """
    is_named = isinstance(parts, Mapping) and all(isinstance(name, str) for name in parts)
    if not is_named or not parts:
        came = "an empty mapping" if is_named else f"{type(parts).__name__} {parts!r:.60}"
        raise ConfigError(
            "parts must be a mapping from names to patterns or masks, such as "
            f"{{'embeddings': 'embed/**'}}; got {came}."
        )
    masks = {}
    for name, part in parts.items():
        with ErrorNote(f"fastvi: of part {name!r}."):
            masks[name] = select_part(params, part) if _are_patterns(part) else part
            read_mask(params, masks[name])
    return masks


def _are_patterns(part: Any) -> bool:
    if isinstance(part, str):
        return True
    return isinstance(part, (list, tuple)) and all(isinstance(one, str) for one in part)


def _left(named: Named, covered: Mapping[str, np.ndarray]) -> int:
    """Count the numbers of an array that no part covers."""
    if not covered:
        return int(named.array.size)
    return int(np.sum(~np.any(np.stack(list(covered.values())), axis=0)))


def _covered(named: Named, entries: np.ndarray) -> Covered:
    count = int(entries.sum())
    return Covered(named.name, named.shape, _as_slices(entries), count)


def _as_slices(entries: np.ndarray) -> str:
    """Write a mask as a slice, where it is one on each axis; else say that it is not."""
    if entries.all():
        return ""
    axes = range(entries.ndim)
    along = [np.asarray(entries.any(axis=tuple(set(axes) - {axis}))) for axis in axes]
    if not np.array_equal(functools.reduce(np.logical_and.outer, along), entries):
        return "scattered entries"
    return f"[{', '.join(map(_stretches, along))}]"


def _stretches(which: np.ndarray) -> str:
    """Write the places of an axis as stretches."""
    if which.all():
        return ":"
    steps = np.diff(np.concatenate([[0], which.astype(np.int8), [0]]))
    pairs = zip(np.flatnonzero(steps == 1), np.flatnonzero(steps == -1), strict=True)
    return "+".join(f"{first}:{last}" for first, last in pairs)
