"""The update of the factors in place by a Triton kernel.

The vectors of the gradient are XLA's. For NVIDIA GPUs.
"""

import jax
import jax.numpy as jnp

from fastvi.kernels import _triton
from fastvi.kernels.mixture_grad import triton_kernels, xla

pullback = xla.pullback


def update_factors(factors, labels, left, right):
    """Move factors in place; see `api.update_factors`."""
    rank = factors.shape[1]
    if rank == 0:  # An array without entries has no address to give a kernel.
        return xla.update_factors(factors, labels, left, right)
    moved, grams = _triton.over_chains(_stacked)(labels, left, right, factors)
    # where a label comes twice, the earlier block saw it half way
    last = labels.size - 1 - jnp.argmax((labels[:, None] == labels[None, :])[:, ::-1], axis=1)
    return moved, grams[last]


def _stacked(labels, left, right, factors):
    chains, num_components, rank, dim = factors.shape
    num_blocks, programs = labels.shape[1], _triton.blocks(dim)
    partial, moved = _triton.call(
        (triton_kernels.update, triton_kernels.update_with_output),
        *(labels, left, right, factors),
        outputs=(
            jax.ShapeDtypeStruct((chains, programs, num_blocks, rank, rank), factors.dtype),
            jax.ShapeDtypeStruct(factors.shape, factors.dtype),
        ),
        grid=(programs, chains),
        aliases={3: 1},  # The factors that come in have the memory of those that come out.
        dim=dim,
        num_components=num_components,
        num_blocks=num_blocks,
        num_terms=left.shape[2],
        rank=rank,
        padded=1 << (rank - 1).bit_length(),  # Triton's ranges are powers of two.
        block=_triton.BLOCK,
    )
    return moved, jnp.sum(partial, axis=1)
