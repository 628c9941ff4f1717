"""Calls of Triton kernels through jax-triton, with a leading axis of chains that vmap fills."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from fastvi._typing import Array

BLOCK = 256  # entries of dim to a program
TILE = 16  # rows of a matrix to a load: 32 registers a thread, and no spills on sm_90
WARPS = 4  # of a program: 128 threads, two entries of a block each


def call(
    kernel: Any,
    *arrays: Array,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    **constants: Any,
) -> tuple[Array, ...]:
    """Launch a kernel, which sees the inputs, then the outputs."""
    import jax_triton  # pyright: ignore[reportMissingImports]

    results = jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_shape=list(outputs),
        grid=grid,
        num_warps=WARPS,
        **constants,
    )
    return tuple(results)


def over_chains(stacked: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a function of arrays with an axis of chains in front into one of a single chain.

    vmap over chains, or over chains and draws, then makes one launch: a program axis instead of a
    loop.
    """
    launched = custom_vmap(stacked)

    @launched.def_vmap
    def _(axis_size, in_batched, *args):
        def merged(arg, is_batched):
            whole = arg if is_batched else jnp.broadcast_to(arg, (axis_size, *arg.shape))
            return whole.reshape(axis_size * whole.shape[1], *whole.shape[2:])

        results = launched(*map(merged, args, in_batched))
        split = jax.tree_util.tree_map(
            lambda leaf: leaf.reshape(axis_size, -1, *leaf.shape[1:]), results
        )
        return split, jax.tree_util.tree_map(lambda _: True, split)

    # A single chain is an axis of one, so that it takes the same kernel.
    def one(*args):
        return jax.tree_util.tree_map(lambda leaf: leaf[0], launched(*(arg[None] for arg in args)))

    return one


def blocks(dim: int) -> int:
    """Count the programs that cover `dim`."""
    return -(-dim // BLOCK)
