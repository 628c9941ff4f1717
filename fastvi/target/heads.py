"""Attention heads as parts of the weights, in fused and in separate projections."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Given, PyTree
from fastvi.target.parts import Match, mask_of, match, named_arrays

HEADS = "h"  # the letter of a layout that stands for the heads


def attention_heads(
    params: PyTree, layouts: Given[Mapping[str, str]], num_heads: Given[int]
) -> dict[str, PyTree]:
    """Return each attention head as a part: its slices of the projections.

    A layout names the axes of an array, as einops does: `h` stands for the heads, another letter
    for any other axis, and parentheses for an axis that runs over several, the last one fastest:

    - `"d (h c)"`: queries, keys or values [width, heads x channels]; `"(h c) d"` in torch.
    - `"d (3 h c)"`: a fused projection to queries, keys and values; `"(3 h c) d"` in torch,
      `"d (h 3 c)"` where the three of a head lie side by side.
    - `"(h c) d"`: the output projection; `"d (h c)"` in torch.
    - `"d h c"` and `"h c d"`: flax, whose heads have an axis of their own.
    - `"(3 h c)"`: biases of a fused projection.

    Args:
        params: The parameters.
        layouts: By pattern, as `select_part` takes them without slices, the layout of the arrays
            that it matches. What its wildcards stand for, as a layer's number, tells heads apart.
        num_heads: Heads of a layer.

    Returns:
        Masks by name: "head 0.3" is head 3 where the wildcard stands for 0.

    Raises:
        ConfigError: If a pattern matches nothing, a layout cannot be read, or does not fit the
            shape of an array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fastvi import attention_heads
        >>> params = {"blocks": [{"qkv": jnp.zeros((4, 12)), "out": jnp.zeros((4, 4))}]}
        >>> layouts = {"blocks/*/qkv": "d (3 h c)", "blocks/*/out": "(h c) d"}
        >>> heads = attention_heads(params, layouts, 2)
        >>> heads["head 0.1"]["blocks"][0]["qkv"][0].astype(int).tolist()
        [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    """
    if isinstance(num_heads, bool) or not isinstance(num_heads, (int, np.integer)) or num_heads < 1:
        raise ConfigError(f"num_heads must be an integer >= 1; got {num_heads!r}.")
    if not layouts:
        raise ConfigError("layouts must name at least one array; got none.")
    arrays, chosen = named_arrays(params), {}
    for pattern, layout in layouts.items():
        for found in match(arrays, pattern):
            axis, head_of = _heads_along(found, layout, int(num_heads))
            for head in range(num_heads):
                name = ".".join([*filter(None, _texts(found)), str(head)])
                chosen.setdefault(f"head {name}", {})[found.named.number] = _along(
                    head_of == head, axis, found.named.shape
                )
    return {name: mask_of(params, masks) for name, masks in chosen.items()}


def _texts(found: Match) -> list[str]:
    return [text.strip("/") for text in found.captured]


def _along(which: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask of an array that depends on one axis alone."""
    rows = which.reshape([-1 if number == axis else 1 for number in range(len(shape))])
    return np.broadcast_to(rows, shape)


def _heads_along(found: Match, layout: str, num_heads: int) -> tuple[int, np.ndarray]:
    """Return the axis that runs over the heads, and the head of each place on it."""
    name, shape = found.named.name, found.named.shape
    axes = _read_layout(layout)
    if len(axes) != len(shape):
        raise ConfigError(
            f"layout {layout!r} has {len(axes)} axes, and {name!r} has shape {shape}."
        )
    (axis,) = (number for number, names in enumerate(axes) if HEADS in names)
    sizes = _sizes(axes[axis], shape[axis], num_heads)
    if sizes is None:
        raise ConfigError(
            f"layout {layout!r} with {num_heads} heads does not fit {name!r}, of shape {shape}: "
            f"axis {axis} has {shape[axis]} places."
        )
    return axis, np.unravel_index(np.arange(shape[axis]), sizes)[axes[axis].index(HEADS)]


def _read_layout(layout: Any) -> list[list[str]]:
    """Return the names of each axis of a layout."""
    is_read = isinstance(layout, str) and re.fullmatch(r"(\s*(\w+|\((\s*\w+)+\s*\)))+\s*", layout)
    found = re.findall(r"\(([^)]*)\)|(\w+)", layout) if is_read else []
    axes = [(group or one).split() for group, one in found]
    if sum(names.count(HEADS) for names in axes) != 1:
        raise ConfigError(
            "a layout names the axes of an array, one of them or a part of one h for the heads, "
            f"such as 'd (3 h c)'; got {layout!r}."
        )
    return axes


def _sizes(names: list[str], size: int, num_heads: int) -> list[int] | None:
    """Return the sizes that an axis is made of; None where they do not multiply to its own."""
    known = [num_heads if one == HEADS else int(one) if one.isdigit() else 0 for one in names]
    product = math.prod(one for one in known if one)
    # one of them may be left to what is over
    if known.count(0) > 1 or product == 0 or size % product:
        return None
    sizes = [one or size // product for one in known]
    return sizes if math.prod(sizes) == size else None
