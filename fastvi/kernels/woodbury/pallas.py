"""The two sweeps as Pallas kernels, which Pallas lowers by way of Triton. For NVIDIA GPUs.

A program takes `BLOCK` entries of the dimension and reads one row after another. Sums over the
dimension leave one partial sum a program, added up outside in a fixed order. vmap over chains or
draws is Pallas's own: one more grid axis.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from fastvi.kernels.woodbury import sweeps, xla
from fastvi.kernels.woodbury.types import Mixture

BLOCK = 1024  # entries of dim to a program
WARPS = 4  # of a program: 128 threads, eight entries each

grams, factor_grams = xla.grams, xla.factor_grams


def _project_kernel(
    eps, core, factors, correction, z, label, x_core, x, partial, *, dim, num_core, rank
):
    at, inside = _block(dim)
    value = plt.load(eps.at[at], mask=inside, other=0.0)
    value -= _combine(correction, core, jnp.int32(0), num_core, at, inside)
    plt.store(x_core.at[at], value, mask=inside)
    value += _combine(z, factors, label[0] * jnp.int32(rank), rank, at, inside)
    plt.store(x.at[at], value, mask=inside)
    # the last column holds the square of x
    program, num_rows = pl.program_id(0), partial.shape[1] - 1

    def project(row, _):
        partial[program, row] = jnp.sum(value * _row(factors, row, at, inside))
        return _

    _each(num_rows, project, jnp.int32(0))
    # The sum of squares is one by element too: TF32 never enters.
    partial[program, num_rows] = jnp.sum(value * value)


def _residual_kernel(
    x, core, factors, core_weight, factor_weight, score, *, dim, num_core, num_rows
):
    at, inside = _block(dim)
    value = _combine(factor_weight, factors, jnp.int32(0), num_rows, at, inside)
    value -= _combine(core_weight, core, jnp.int32(0), num_core, at, inside)
    plt.store(score.at[at], value - plt.load(x.at[at], mask=inside, other=0.0), mask=inside)


def _block(dim):
    """Return the entries of this program and which of them exist."""
    start = pl.program_id(0) * jnp.int32(BLOCK)
    return pl.ds(start, BLOCK), start + jax.lax.iota(jnp.int32, BLOCK) < dim


def _row(matrix, index, at, inside):
    return plt.load(matrix.at[index, at], mask=inside, other=0.0)


def _combine(weights, matrix, first, count, at, inside):
    """Sum `count` rows of a matrix from `first` on."""

    def add(index, total):
        return total + weights[index] * _row(matrix, first + index, at, inside)

    return _each(count, add, jnp.zeros(BLOCK, weights.dtype))


def _each(count, body, start):
    # Under x64 a loop of Python's integers would count in 64 bits, unlike the program's index.
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, start)


def _call(kernel, outputs, dim, *arrays):
    """Launch one program for each block of entries; an array without entries has no address."""
    given = [array if array.size else jnp.zeros((1,) * array.ndim, array.dtype) for array in arrays]
    return pl.pallas_call(
        functools.partial(kernel, dim=dim),
        out_shape=outputs,
        grid=(pl.cdiv(dim, BLOCK),),
        compiler_params=plt.CompilerParams(num_warps=WARPS),
    )(*given)


def _project(eps, mixture: Mixture, correction, z, label):
    num_components, rank, dim = mixture.factors.shape
    num_rows, like = num_components * rank, jax.ShapeDtypeStruct((dim,), eps.dtype)
    partial = jax.ShapeDtypeStruct((pl.cdiv(dim, BLOCK), num_rows + 1), eps.dtype)
    x_core, x, partial = _call(
        functools.partial(_project_kernel, num_core=mixture.core.shape[0], rank=rank),
        (like, like, partial),
        dim,
        *(eps, mixture.core, mixture.factors.reshape(num_rows, dim), correction, z),
        label.astype(jnp.int32)[None],
    )
    sums = jnp.sum(partial, axis=0)
    return x_core, x, sums[:-1].reshape(num_components, rank), sums[-1]


def _residual(x, core, factors, core_weight, factor_weight):
    flat = factors.reshape(-1, x.size)
    kernel = functools.partial(_residual_kernel, num_core=core.shape[0], num_rows=flat.shape[0])
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _call(kernel, like, x.size, x, core, flat, core_weight, factor_weight.reshape(-1))


_SWEEPS = sweeps.Sweeps("pallas", _project, _residual)
draw = functools.partial(sweeps.draw, _SWEEPS)
log_prob = functools.partial(sweeps.log_prob, _SWEEPS)
