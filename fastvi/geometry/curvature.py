"""Leading eigenpairs of a symmetric operator known by its products."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Int, Key

# Tangents that share one pass over the data. Half of them take twice the passes; twice as many
# find the spectrum's end later and take twice the memory.
BLOCK = 8


class Spectrum(NamedTuple):
    """Ritz pairs in descending order, padded with zero vectors; `size` of them were computed."""

    values: Float[Array, " krylov"]
    vectors: Float[Array, "krylov dim"]
    size: Int[Array, ""]


def block_krylov(
    apply: Callable[[Float[Array, "block dim"]], Float[Array, "block dim"]],
    key: Key,
    probes: Float[Array, "block dim"],
    max_size: int,
    exhausted: Callable[
        [Float[Array, " krylov"], Int[Array, ""], Float[Array, "block dim"]], Array
    ],
) -> tuple[Spectrum, Float[Array, "block dim"]]:
    """Compute Ritz pairs from a randomised block Krylov space with full reorthogonalisation.

    The operator is first applied to probes, in the same loop, so that a program holds it once.

    Args:
        apply: The operator on a block of `BLOCK` row vectors.
        key: Random key of the first block.
        probes: `BLOCK` vectors that stay outside of the space.
        max_size: Largest dimension of the space, a multiple of `BLOCK`.
        exhausted: Told the Ritz values (descending, padded with -inf), their number and the images
            of the probes, whether to stop.

    Returns:
        The Ritz pairs, and the images of the probes.

    Cost:
        At most `max_size + BLOCK` operator products and O(max_size^2 dim) operations.

    References:
        Musco & Musco, Randomized Block Krylov Methods (2015).
    """
    first = _orthonormal_rows(jax.random.normal(key, probes.shape, probes.dtype))
    empty = jnp.zeros((max_size, probes.shape[1]), probes.dtype)

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
        size, block, basis, images, of_probes, _ = carry
        image, is_probing = apply(block), size < 0
        row = jnp.maximum(size, 0)  # the first block overwrites what the probes leave there
        basis = jax.lax.dynamic_update_slice_in_dim(basis, block, row, 0)
        images = jax.lax.dynamic_update_slice_in_dim(images, image, row, 0)
        following = image
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            following = _orthonormal_rows(following - (following @ basis.T) @ basis)
        following = jnp.where(is_probing, first, following)
        of_probes = jnp.where(is_probing, image, of_probes)
        size = size + BLOCK
        done = ~is_probing & exhausted(project(basis, images, size)[0], size, of_probes)
        return size, following, basis, images, of_probes, done

    start = (jnp.asarray(-BLOCK), probes, empty, empty, probes, jnp.asarray(False))
    size, _, basis, images, of_probes, _ = jax.lax.while_loop(
        lambda carry: (carry[0] < max_size) & ~carry[-1], extend, start
    )
    values, rotation = project(basis, images, size)
    used, vectors = jnp.arange(max_size) < size, jnp.asarray(rotation.T @ basis)
    return Spectrum(values, jnp.where(used[:, None], vectors, 0.0), size), of_probes


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
