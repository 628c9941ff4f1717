"""Leading eigenpairs of a symmetric operator known by its products."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Int, Key

BLOCK = 8  # tangents that share one pass over the data


class Spectrum(NamedTuple):
    """Ritz pairs in descending order, padded with zero vectors; `size` of them were computed."""

    values: Float[Array, " krylov"]
    vectors: Float[Array, "krylov dim"]
    size: Int[Array, ""]


def block_krylov(
    apply: Callable[[Float[Array, "block dim"]], Float[Array, "block dim"]],
    key: Key,
    dim: int,
    max_size: int,
    exhausted: Callable[[Float[Array, " krylov"], Int[Array, ""]], Array],
    dtype=jnp.float32,
) -> Spectrum:
    """Compute Ritz pairs from a randomised block Krylov space with full reorthogonalisation.

    Args:
        apply: The operator on a block of `BLOCK` row vectors.
        key: Random key of the first block.
        dim: Dimension of the operator.
        max_size: Largest dimension of the space, a multiple of `BLOCK`.
        exhausted: Told the Ritz values (descending, padded with -inf) and their number, whether to
            stop.
        dtype: Floating dtype.

    Returns:
        The Ritz pairs.

    Cost:
        At most `max_size` operator products and O(max_size^2 dim) operations.

    References:
        Musco & Musco, Randomized Block Krylov Methods (2015).
    """
    first = _orthonormal_rows(jax.random.normal(key, (BLOCK, dim), dtype))
    empty = jnp.zeros((max_size, dim), dtype)

    def project(basis, images, size):
        small = basis @ images.T
        used = jnp.arange(max_size) < size
        # unused rows get a value below any Ritz value, so that they sort last
        bottom = -2 * jnp.max(jnp.abs(small), initial=0.0) - 1
        small = jnp.where(
            used[:, None] & used, 0.5 * (small + small.T), jnp.diag(jnp.where(used, 0.0, bottom))
        )
        values, rotation = jnp.linalg.eigh(small)
        return jnp.where(used, values[::-1], -jnp.inf), rotation[:, ::-1]

    def extend(carry):
        size, block, basis, images, _ = carry
        image = apply(block)
        basis = jax.lax.dynamic_update_slice_in_dim(basis, block, size, 0)
        images = jax.lax.dynamic_update_slice_in_dim(images, image, size, 0)
        following = image
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            following = _orthonormal_rows(following - (following @ basis.T) @ basis)
        size = size + BLOCK
        return size, following, basis, images, exhausted(project(basis, images, size)[0], size)

    def unfinished(carry):
        size, _, _, _, done = carry
        return (size < max_size) & ~done

    start = (jnp.asarray(0), first, empty, empty, jnp.asarray(False))
    size, _, basis, images, _ = jax.lax.while_loop(unfinished, extend, start)
    values, rotation = project(basis, images, size)
    used = jnp.arange(max_size) < size
    return Spectrum(values, jnp.where(used[:, None], rotation.T @ basis, 0.0), size)


def _orthonormal_rows(block):
    return jnp.linalg.qr(block.T)[0].T


def dense_spectrum(
    apply: Callable[[Float[Array, "block dim"]], Float[Array, "block dim"]],
    dim: int,
    dtype=jnp.float32,
) -> Spectrum:
    """Compute all eigenpairs from `dim` products."""
    matrix = apply(jnp.eye(dim, dtype=dtype))
    values, vectors = jnp.linalg.eigh(0.5 * (matrix + matrix.T))
    return Spectrum(values[::-1], vectors[:, ::-1].T, jnp.asarray(dim))
