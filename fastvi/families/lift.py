"""The linear map from latent coordinates and noise to displacements, docs/math.md "Flow family"."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Key, Scalar
from fastvi.kernels.triangular import cholesky, lower_inverse


class LiftParams(NamedTuple):
    """Parameters of the map, or what belongs to each.

    Offsets (0 or 1, dim), log_sigma (), root (frame, frame).
    """

    offsets: Any
    log_sigma: Any
    root: Any


class Lifted(NamedTuple):
    """Draws in whitened coordinates.

    `own` is the noise along the frame, `coordinates` the draw there.
    """

    u: Float[Array, "draws dim"]
    noise: Float[Array, "draws dim"]
    own: Float[Array, "draws frame"]
    log_prob: Float[Array, " draws"]


class Lift(eqx.Module):
    """`u = offset + E^T L a + sigma (xi - E^T E xi)` with E the frame, L lower triangular.

    The rows of E are orthonormal. a are latent coordinates whose density somebody else knows; what
    xi adds lies in the complement of the frame, which is never written out: one pass over E
    projects it.

    Attributes:
        frame: E.
    """

    frame: Float[Array, "frame dim"]

    @property
    def num_beyond(self) -> int:
        """Count the dimensions of the complement."""
        return self.frame.shape[1] - self.frame.shape[0]

    def push(
        self, params: LiftParams, xi: Float[Array, "draws dim"], own, latent, latent_log_prob
    ) -> Lifted:
        """Map latent draws and noise, whose part along the frame is `own`, to u with its log density."""
        sigma = jnp.exp(params.log_sigma)
        along = latent @ params.root.T
        beyond = 0.0
        if self.num_beyond:
            beyond, along = sigma * xi, along - sigma * own
        u = params.offsets.sum(0) + beyond + along @ self.frame
        square = jnp.sum(xi**2, -1) - jnp.sum(own**2, -1)
        return Lifted(
            u, xi, own, latent_log_prob + self._beyond_log_prob(square) - self.log_det(params)
        )

    def log_det(self, params: LiftParams) -> Scalar:
        """Return log |det| of the map from (a, noise of the complement) to u."""
        return jnp.sum(jnp.log(jnp.diagonal(params.root))) + self.num_beyond * params.log_sigma

    def _beyond_log_prob(self, square):
        if not self.num_beyond:
            return jnp.zeros_like(square)
        return -0.5 * square - 0.5 * self.num_beyond * jnp.log(2 * jnp.pi).astype(square.dtype)

    def pull(
        self, params: LiftParams, u: Float[Array, " dim"]
    ) -> tuple[Float[Array, " frame"], Scalar]:
        """Invert: return a, and the log density of u less that of a."""
        x = u - params.offsets.sum(0)
        along = self.frame @ x
        latent = jax.scipy.linalg.solve_triangular(params.root, along, lower=True)
        residual = x - along @ self.frame
        square = jnp.sum(residual**2) * jnp.exp(-2 * params.log_sigma)
        return latent, self._beyond_log_prob(square) - self.log_det(params)

    def score(self, params: LiftParams, lifted: Lifted, latent_score) -> Float[Array, "draws dim"]:
        """Return the gradient of the log density in u, given that of the latent density in a."""
        along = latent_score @ lower_inverse(params.root)
        if not self.num_beyond:
            return along @ self.frame
        inverse = jnp.exp(-params.log_sigma)
        return (along + inverse * lifted.own) @ self.frame - inverse * lifted.noise

    def gradient(
        self, params: LiftParams, lifted: Lifted, latent, cotangent: Float[Array, "draws dim"]
    ) -> tuple[LiftParams, Float[Array, "draws frame"]]:
        """Pull cotangents of u back.

        Return the gradient averaged over draws, and the cotangents of a.
        """
        along = cotangent @ self.frame.T
        beyond = jnp.sum(cotangent * lifted.noise, -1) - jnp.sum(along * lifted.own, -1)
        log_sigma = (
            jnp.exp(params.log_sigma) * jnp.mean(beyond)
            if self.num_beyond
            else jnp.zeros((), along.dtype)
        )
        num = cotangent.shape[0]
        offsets = jnp.mean(cotangent, 0)[None] if params.offsets.shape[0] else params.offsets
        return LiftParams(offsets, log_sigma, jnp.tril(along.T @ latent) / num), along @ params.root

    def natural(self, params: LiftParams, gradient: LiftParams) -> LiftParams:
        """Multiply a gradient by the inverse Fisher matrix that the map has under a normal latent.

        Offsets come in units of sigma, the root relative to itself: it moves to `root (I +
        update)`.
        """
        sigma = jnp.exp(params.log_sigma)
        offsets = gradient.offsets
        if offsets.shape[0]:
            along = offsets @ self.frame.T
            along = along @ params.root @ params.root.T / sigma - sigma * along
            offsets = sigma * offsets + along @ self.frame
        log_sigma = gradient.log_sigma / max(self.num_beyond, 1)
        return LiftParams(offsets, log_sigma, jnp.tril(params.root.T @ gradient.root))

    def moved(self, params: LiftParams, updates: LiftParams) -> LiftParams:
        """Add updates in the coordinates of `natural`; the diagonal of the root stays positive."""
        diagonal = jnp.diagonal(updates.root)
        step = jnp.tril(updates.root, -1) + jnp.diag(jnp.exp(diagonal))
        return LiftParams(
            params.offsets + jnp.exp(params.log_sigma) * updates.offsets,
            params.log_sigma + updates.log_sigma,
            params.root @ step,
        )


def make_frame(
    leading: Float[Array, "latent dim"], core: Float[Array, "core dim"], size: int, key: Key
):
    """Return `size` orthonormal rows that begin with the span of `leading` and hold that of `core` if it fits."""
    dim = core.shape[1]
    fill = jax.random.normal(key, (size, dim), core.dtype)
    rows = jnp.concatenate([leading, core, fill])[: max(size, 1)]
    lengths = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return jnp.linalg.qr((rows / jnp.where(lengths > 0, lengths, 1.0)).T)[0].T


def core_root(
    frame: Float[Array, "frame dim"], core: Float[Array, "core dim"]
) -> Float[Array, "frame frame"]:
    """Return the lower-triangular root of `E (I + B^T B)^{-1} E^T`, the covariance along a frame that holds B."""
    along = core @ frame.T
    flipped = jnp.eye(frame.shape[0], dtype=frame.dtype) + (along.T @ along)[::-1, ::-1]
    return lower_inverse(cholesky(flipped)).T[::-1, ::-1]
