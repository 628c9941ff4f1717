"""Calls of Triton kernels through jax-triton, with a leading axis of chains that vmap fills."""

from collections.abc import Callable, Mapping
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
    aliases: Mapping[int, int],
    **constants: Any,
) -> tuple[Array, ...]:
    """Launch a kernel; `aliases` maps inputs to the outputs that take their place.

    The kernel sees the inputs, then the outputs that are not aliased: jax-triton before 0.4 passes
    aliased outputs too, so `kernel` is a pair, with and without pointers for them at the end.
    """
    import jax_triton  # pyright: ignore[reportMissingImports]

    plain, with_aliased = kernel
    passes_aliased = tuple(map(int, jax_triton.__version__.split(".")[:2])) < (0, 4)
    results = jax_triton.triton_call(
        *arrays,
        kernel=with_aliased if aliases and passes_aliased else plain,
        out_shape=list(outputs),
        grid=grid,
        num_warps=WARPS,
        input_output_aliases=dict(aliases),
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
