"""Two sweeps over core and factors.

Draw and project, then density's score. Program axes: blocks of dim, chains.

Sums over dim leave one partial sum a program, added up outside in a fixed order.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check  # Triton reads the source of the bare function
def rows_at(matrix, first, end, dim: tl.constexpr, block: tl.constexpr, tile: tl.constexpr):
    """Return `tile` rows of a matrix from `first` on, in the columns of this program.

    Zeros from row `end` on.
    """
    entry = tl.program_id(0) * block + tl.arange(0, block)
    row = first + tl.arange(0, tile)
    mask = (row < end)[:, None] & (entry < dim)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * dim + entry[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check  # Triton reads the source of the bare function
def combine(
    value,
    weights,
    matrix,
    first,
    sign: tl.constexpr,
    count: tl.constexpr,
    dim: tl.constexpr,
    block: tl.constexpr,
    tile: tl.constexpr,
):
    """Add `sign * weights M` to value, for `count` rows of a matrix from `first` on."""
    for start in range(0, count, tile):
        index = start + tl.arange(0, tile)
        weight = tl.load(weights + index, mask=index < count, other=0.0)
        rows = rows_at(matrix, first + start, first + count, dim, block, tile)
        # A sum of products by element instead of `tl.dot` keeps TF32 out.
        value += sign * tl.sum(weight[:, None] * rows, axis=0)
    return value


@triton.jit
@no_type_check  # Triton reads the source of the bare function
def project(
    eps,
    core,
    factors,
    correction,
    z,
    label,
    x_core,
    x,
    partial,
    dim: tl.constexpr,
    num_core: tl.constexpr,
    num_rows: tl.constexpr,
    rank: tl.constexpr,
    block: tl.constexpr,
    tile: tl.constexpr,
):
    """x_core = eps - correction B, x = x_core + z A_label; partial sums of A x and x . x."""
    chain = tl.program_id(1)
    entry = tl.program_id(0) * block + tl.arange(0, block)
    inside = entry < dim
    # Offsets have 64 bits, since arrays may have more than 2^31 entries.
    own = chain.to(tl.int64) * dim + entry
    value = tl.load(eps + own, mask=inside, other=0.0)
    value = combine(
        value, correction + chain * num_core, core, chain * num_core, -1, num_core, dim, block, tile
    )
    tl.store(x_core + own, value, mask=inside)
    first = chain * num_rows + tl.load(label + chain) * rank
    value = combine(value, z + chain * rank, factors, first, 1, rank, dim, block, tile)
    tl.store(x + own, value, mask=inside)
    sums = partial + (chain * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (num_rows + 1)
    first, end = chain * num_rows, (chain + 1) * num_rows
    for start in range(0, num_rows, tile):
        row = start + tl.arange(0, tile)
        rows = rows_at(factors, first + start, end, dim, block, tile)
        tl.store(sums + row, tl.sum(rows * value[None, :], axis=1), mask=row < num_rows)
    tl.store(sums + num_rows, tl.sum(value * value, axis=0))


@triton.jit
@no_type_check  # Triton reads the source of the bare function
def residual(
    x,
    core,
    factors,
    core_weight,
    factor_weight,
    score,
    dim: tl.constexpr,
    num_core: tl.constexpr,
    num_rows: tl.constexpr,
    block: tl.constexpr,
    tile: tl.constexpr,
):
    """Score = factor_weight A - core_weight B - x, in units of D^{1/2}."""
    chain = tl.program_id(1)
    entry = tl.program_id(0) * block + tl.arange(0, block)
    own = chain.to(tl.int64) * dim + entry
    value = -tl.load(x + own, mask=entry < dim, other=0.0)
    value = combine(
        value,
        factor_weight + chain * num_rows,
        factors,
        chain * num_rows,
        1,
        num_rows,
        dim,
        block,
        tile,
    )
    value = combine(
        value,
        core_weight + chain * num_core,
        core,
        chain * num_core,
        -1,
        num_core,
        dim,
        block,
        tile,
    )
    tl.store(score + own, value, mask=entry < dim)
