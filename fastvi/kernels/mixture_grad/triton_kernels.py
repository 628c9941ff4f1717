"""The update of the factors that moved.

One read, one write, and the products that the next step needs.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check  # Triton reads the source of the bare function
def update(
    labels,
    left,
    right,
    factors,
    partial,
    dim: tl.constexpr,
    num_components: tl.constexpr,
    num_blocks: tl.constexpr,
    num_terms: tl.constexpr,
    rank: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
):
    """A[label] += left^T right for every block in turn, in place; partial sums of the new A A^T."""
    chain = tl.program_id(1)
    entry = tl.program_id(0) * block + tl.arange(0, block)
    row = tl.arange(0, padded)
    used = row < rank
    # Offsets have 64 bits, since arrays may have more than 2^31 entries.
    sums = (
        partial
        + (chain * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * num_blocks * rank * rank
    )
    for index in range(num_blocks):
        label = tl.load(labels + chain * num_blocks + index)
        at = ((chain * num_components + label) * rank + row).to(tl.int64)[:, None] * dim + entry[
            None, :
        ]
        mask = used[:, None] & (entry < dim)[None, :]
        moved = tl.load(factors + at, mask=mask, other=0.0)
        for term in range(num_terms):
            pair = (chain * num_blocks + index) * num_terms + term
            short = tl.load(left + pair * rank + row, mask=used, other=0.0)
            long = tl.load(right + pair.to(tl.int64) * dim + entry, mask=entry < dim, other=0.0)
            moved += short[:, None] * long[None, :]
        tl.store(factors + at, moved, mask=mask)
        # Sums of products by element instead of `tl.dot` keep TF32 out.
        for other in range(rank):
            single = tl.sum(tl.where((row == other)[:, None], moved, 0.0), axis=0)
            inner = tl.sum(moved * single[None, :], axis=1)
            tl.store(sums + (index * rank + other) * rank + row, inner, mask=used)


@triton.jit
@no_type_check  # Triton reads the source of the bare function
def update_with_output(
    labels,
    left,
    right,
    factors,
    partial,
    factors_out,
    dim: tl.constexpr,
    num_components: tl.constexpr,
    num_blocks: tl.constexpr,
    num_terms: tl.constexpr,
    rank: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
):
    """Do the same with a pointer too many, the alias of `factors`."""
    update(
        labels,
        left,
        right,
        factors,
        partial,
        dim,
        num_components,
        num_blocks,
        num_terms,
        rank,
        padded,
        block,
    )
