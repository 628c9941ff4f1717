"""Virial columns: functions of a walker that have mean zero under the posterior.

For any fixed matrix G, `tr G - (G v) . grad(-log p)` has mean zero, with v = w - w*. Averaged
beside llc, such functions are its control variates.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float
from fastvi.families.moments import LinearMap


def virial_columns(blocks: tuple[int, ...]) -> Callable[..., Float[Array, "walkers columns"]]:
    """Return the columns as a function of `(linear_map, position, displacement, gradient)`.

    G is the identity on each parameter block, and the projection on the span of q's low-rank
    directions in round coordinates; one more column is the slope along q's mean. The gradient is
    that of -log p in model coordinates.

    Args:
        blocks: Lengths of the parameter blocks, in order.
    """

    def columns(linear_map: LinearMap, position, displacement, gradient):
        each = block_virials(displacement * gradient, blocks)
        # products that the map itself computes, so that the compiled step reads the basis no more
        inside = linear_map.project(position)
        pulled = linear_map.project(linear_map.scale * gradient)
        pulled += pulled @ linear_map.stretch  # since the rows of the basis are orthonormal
        # The trace of a projection is its rank, here the number of rows of the basis.
        core = linear_map.basis.shape[0] - jnp.sum(inside * pulled, axis=-1)
        # The gradient has mean zero, and so has its slope along any fixed direction.
        return jnp.stack([*each, core, gradient @ linear_map.center], axis=-1)

    return columns


def block_virials(work: Any, blocks: tuple[int, ...]) -> list[Any]:
    """Return `length - sum of v grad(-log p)` of each block.

    Args:
        work: The product `v grad(-log p)`, of shape (..., dim).
        blocks: Lengths of the blocks, in order.
    """
    ends = np.cumsum(blocks)
    return [
        length - work[..., end - length : end].sum(axis=-1)
        for length, end in zip(blocks, ends, strict=True)
    ]


def parameter_blocks(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Merge neighbouring leaves, the smallest pair first, until at most `most` are left."""
    merged = list(sizes)
    while len(merged) > most:
        pairs = [first + second for first, second in zip(merged, merged[1:], strict=False)]
        at = int(np.argmin(pairs))
        merged[at : at + 2] = [pairs[at]]
    return tuple(merged)
