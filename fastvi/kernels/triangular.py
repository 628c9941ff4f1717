"""Inverse of small lower-triangular matrices in a few batched products.

A batched triangular solve expands into hundreds of operations when XLA compiles it for CPU; this
does not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap, sequential_vmap

from fastvi._typing import Array, Float

RIDGE = 5e-5  # relative, of the second attempt


class InverseRoot(NamedTuple):
    """Lower triangular X with `X^T X = (I + gram)^{-1}`.

    `ridged` is 1 where it took a ridge to find it, else 0.
    """

    root: Float[Array, "*batch n n"]
    ridged: Float[Array, "*batch"]


@jax.custom_jvp
def inverse_root(gram: Float[Array, "*batch n n"]) -> InverseRoot:
    """Factorise `(I + gram)^{-1}`.

    Where rounding left `I + gram` indefinite, its diagonal is raised by `RIDGE` of itself and the
    factorisation tried once more; NaN where that fails too.

    Cost:
        O(n^3) operations.
    """
    root, ridged = _inverse_root_of_one(gram) if gram.ndim == 2 else _inverse_root_of_many(gram)
    return InverseRoot(root, ridged)


@inverse_root.defjvp
def _inverse_root_jvp(primals, tangents):
    found = inverse_root(*primals)
    # With X = L^{-1}, dX = -Phi(X dG X^T) X: Phi keeps the lower triangle and halves its diagonal.
    inner = jnp.tril(found.root @ tangents[0] @ jnp.swapaxes(found.root, -1, -2))
    half = inner * (1 - 0.5 * jnp.eye(inner.shape[-1], dtype=inner.dtype))
    return found, InverseRoot(-half @ found.root, jnp.zeros_like(found.ridged))


@sequential_vmap  # chain after chain: LAPACK solves one matrix, while a batch would expand
def _inverse_root_of_one(gram):
    root, ridged = _factorise(gram)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jax.lax.linalg.triangular_solve(root, identity, left_side=True, lower=True), ridged


@custom_vmap
def _inverse_root_of_many(gram):
    root, ridged = _factorise(gram)
    return lower_inverse(root), ridged


# Under vmap, the second attempt stays behind one condition for all chains.
_inverse_root_of_many.def_vmap(
    lambda size, batched, gram: (_inverse_root_of_many(gram), (True, True))
)


def _factorise(gram):
    """Return the Cholesky factor of `I + gram` and whether it took a ridge."""
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    matrix = identity + gram
    root = cholesky(matrix)
    # A matrix that is not finite has another fault, which no ridge mends.
    failed = jnp.isnan(root).any(axis=(-2, -1)) & jnp.isfinite(matrix).all(axis=(-2, -1))

    def again():
        raised = matrix + RIDGE * (matrix * identity)
        return jnp.where(failed[..., None, None], cholesky(raised), root)

    return jax.lax.cond(failed.any(), again, lambda: root), failed.astype(gram.dtype)


def cholesky(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Factorise symmetric matrices without symmetrising them first.

    NaN where one is not positive definite.
    """
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


def lower_inverse(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Invert lower-triangular matrices by doubling blocks along the diagonal.

    `[[A, 0], [B, C]]^{-1} = [[A^{-1}, 0], [-C^{-1} B A^{-1}, C^{-1}]]`, from blocks of one entry
    up. As accurate as forward substitution for the well-scaled factors of `I + G`.

    Cost:
        O(n^3) operations in 2 log2(n) batched products.
    """
    *batch, size, _ = matrix.shape
    if size == 0:
        return matrix
    padded = 1 << (size - 1).bit_length()
    # Ones on the padded part of the diagonal keep the matrix invertible.
    widths = [(0, 0)] * len(batch) + [(0, padded - size)] * 2
    whole = jnp.pad(matrix, widths) + jnp.diag((jnp.arange(padded) >= size).astype(matrix.dtype))
    diagonal = jnp.diagonal(whole, axis1=-2, axis2=-1)
    inverse = (1 / diagonal)[..., None, None]  # (..., blocks, width, width)
    width = 1
    while width < padded:
        count = padded // (2 * width)
        blocks = whole.reshape(*batch, count, 2 * width, count, 2 * width)
        own = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        below = own[..., width:, :width]
        pairs = inverse.reshape(*batch, count, 2, width, width)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        corner = -second @ below @ first
        inverse = jnp.block([[first, jnp.zeros_like(first)], [corner, second]])
        width *= 2
    return inverse.reshape(*batch, padded, padded)[..., :size, :size]
