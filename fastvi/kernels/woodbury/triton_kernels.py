"""Two sweeps over core and factors: draw and project, then density's score. Program axes: blocks of dim, chains.

Sums over dim leave one partial sum a program, added up outside in a fixed order.
"""

from typing import no_type_check

import triton
import triton.language as tl


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
    row = tl.arange(0, tile)
    value = tl.load(eps + chain.to(tl.int64) * dim + entry, mask=inside, other=0.0)
    for start in range(0, num_core, tile):
        used = start + row < num_core
        weight = tl.load(correction + chain * num_core + start + row, mask=used, other=0.0)
        at = (chain * num_core + start + row).to(tl.int64)[:, None] * dim + entry[None, :]
        rows = tl.load(core + at, mask=used[:, None] & inside[None, :], other=0.0)
        value -= tl.sum(weight[:, None] * rows, axis=0)
    tl.store(x_core + chain.to(tl.int64) * dim + entry, value, mask=inside)
    first = chain * num_rows + tl.load(label + chain) * rank
    for start in range(0, rank, tile):
        used = start + row < rank
        weight = tl.load(z + chain * rank + start + row, mask=used, other=0.0)
        at = (first + start + row).to(tl.int64)[:, None] * dim + entry[None, :]
        rows = tl.load(factors + at, mask=used[:, None] & inside[None, :], other=0.0)
        value += tl.sum(weight[:, None] * rows, axis=0)
    tl.store(x + chain.to(tl.int64) * dim + entry, value, mask=inside)
    sums = partial + (chain * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (num_rows + 1)
    for start in range(0, num_rows, tile):
        used = start + row < num_rows
        at = (chain * num_rows + start + row).to(tl.int64)[:, None] * dim + entry[None, :]
        rows = tl.load(factors + at, mask=used[:, None] & inside[None, :], other=0.0)
        tl.store(sums + start + row, tl.sum(rows * value[None, :], axis=1), mask=used)
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
    inside = entry < dim
    row = tl.arange(0, tile)
    value = -tl.load(x + chain.to(tl.int64) * dim + entry, mask=inside, other=0.0)
    for start in range(0, num_rows, tile):
        used = start + row < num_rows
        weight = tl.load(factor_weight + chain * num_rows + start + row, mask=used, other=0.0)
        at = (chain * num_rows + start + row).to(tl.int64)[:, None] * dim + entry[None, :]
        rows = tl.load(factors + at, mask=used[:, None] & inside[None, :], other=0.0)
        value += tl.sum(weight[:, None] * rows, axis=0)
    for start in range(0, num_core, tile):
        used = start + row < num_core
        weight = tl.load(core_weight + chain * num_core + start + row, mask=used, other=0.0)
        at = (chain * num_core + start + row).to(tl.int64)[:, None] * dim + entry[None, :]
        rows = tl.load(core + at, mask=used[:, None] & inside[None, :], other=0.0)
        value -= tl.sum(weight[:, None] * rows, axis=0)
    tl.store(score + chain.to(tl.int64) * dim + entry, value, mask=inside)
