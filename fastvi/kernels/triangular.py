"""Inverse of small lower-triangular matrices in a few batched products.

A batched triangular solve expands into hundreds of operations when XLA compiles it for CPU; this does not.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from fastvi._typing import Array, Float


@jax.custom_jvp
def inverse_root(gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Return the lower triangular X with `X^T X = (I + gram)^{-1}`.

    Cost:
        O(n^3) operations.
    """
    return _inverse_root(gram)


@inverse_root.defjvp
def _inverse_root_jvp(primals, tangents):
    root = inverse_root(*primals)
    inner = jnp.tril(root @ tangents[0] @ root.T)
    return root, -(inner - 0.5 * jnp.diag(jnp.diagonal(inner))) @ root


@sequential_vmap  # chain after chain: LAPACK solves one matrix, while a batch would expand
def _inverse_root(gram):
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    root = cholesky(identity + gram)
    return jax.lax.linalg.triangular_solve(root, identity, left_side=True, lower=True)


def cholesky(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Factorise symmetric matrices without symmetrising them first; NaN where one is not positive definite."""
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


def cholesky_inverse(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Invert the Cholesky factor of symmetric matrices; up to two rows in closed form, which fuses."""
    if matrix.shape[-1] == 1:
        return 1 / jnp.sqrt(matrix)
    if matrix.shape[-1] != 2:
        return lower_inverse(cholesky(matrix))
    first = 1 / jnp.sqrt(matrix[..., 0, 0])
    corner = matrix[..., 1, 0] * first
    second = 1 / jnp.sqrt(matrix[..., 1, 1] - corner**2)
    rows = [[first, jnp.zeros_like(first)], [-corner * first * second, second]]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def lower_inverse(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Invert lower-triangular matrices by doubling blocks along the diagonal.

    `[[A, 0], [B, C]]^{-1} = [[A^{-1}, 0], [-C^{-1} B A^{-1}, C^{-1}]]`, from blocks of one entry up. As accurate as
    forward substitution for the well-scaled factors of `I + G`.

    Cost:
        O(n^3) operations in 2 log2(n) batched products.
    """
    *batch, size, _ = matrix.shape
    if size == 0:
        return matrix
    padded = 1 << (size - 1).bit_length()
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
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        width *= 2
    return inverse.reshape(*batch, padded, padded)[..., :size, :size]
