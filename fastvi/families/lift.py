"""The linear map from latent coordinates and noise to displacements, docs/vi_flow.md "The map"."""

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
    """Draws in whitened coordinates, with the noise that made them and its part on the frame."""

    u: Float[Array, "draws dim"]
    noise: Float[Array, "draws dim"]
    frame_noise: Float[Array, "draws frame"]
    log_prob: Float[Array, " draws"]


class Lift(eqx.Module):
    """`u = offset + E^T L a + sigma (xi - E^T E xi)` with E the frame, L lower triangular.

    The rows of E are orthonormal. The latent coordinates a come with a density of their own. What
    the noise xi adds lies in the complement of the frame, which is never written out: one pass over
    E projects it.

    Attributes:
        frame: E.
    """

    frame: Float[Array, "frame dim"]

    @property
    def complement_dim(self) -> int:
        """Count the dimensions of the complement."""
        return self.frame.shape[1] - self.frame.shape[0]

    def push(
        self,
        params: LiftParams,
        xi: Float[Array, "draws dim"],
        frame_noise: Float[Array, "draws frame"],
        latent: Float[Array, "draws frame"],
        latent_log_prob: Float[Array, " draws"],
    ) -> Lifted:
        """Map latent draws and noise, whose part on the frame is `frame_noise`, to u."""
        sigma = jnp.exp(params.log_sigma)
        on_frame, noise = latent @ params.root.T, 0.0
        if self.complement_dim:
            # sigma E^T E xi is taken off on the frame, so that xi is read once
            noise, on_frame = sigma * xi, on_frame - sigma * frame_noise
        u = params.offsets.sum(0) + noise + on_frame @ self.frame
        # The frame is orthonormal, so what lies off it has the rest of the squared length.
        square = jnp.sum(xi**2, -1) - jnp.sum(frame_noise**2, -1)
        log_prob = latent_log_prob + self._complement_log_prob(square) - self.log_det(params)
        return Lifted(u, xi, frame_noise, log_prob)

    def log_det(self, params: LiftParams) -> Scalar:
        """Return log |det| of the map from (a, noise of the complement) to u."""
        return jnp.sum(jnp.log(jnp.diagonal(params.root))) + self.complement_dim * params.log_sigma

    def _complement_log_prob(self, square):
        if not self.complement_dim:
            return jnp.zeros_like(square)
        return -0.5 * square - 0.5 * self.complement_dim * jnp.log(2 * jnp.pi).astype(square.dtype)

    def pull(
        self, params: LiftParams, u: Float[Array, " dim"]
    ) -> tuple[Float[Array, " frame"], Scalar]:
        """Invert: return a, and the log density of u less that of a."""
        x = u - params.offsets.sum(0)
        on_frame = self.frame @ x
        # off the frame u is noise alone: what is left there is sigma times the noise
        latent = jax.scipy.linalg.solve_triangular(params.root, on_frame, lower=True)
        residual = x - on_frame @ self.frame
        square = jnp.sum(residual**2) * jnp.exp(-2 * params.log_sigma)
        return latent, self._complement_log_prob(square) - self.log_det(params)

    def score(self, params: LiftParams, lifted: Lifted, latent_score) -> Float[Array, "draws dim"]:
        """Return the gradient of the log density in u, given that of the latent density in a."""
        on_frame = latent_score @ lower_inverse(params.root)
        if not self.complement_dim:
            return on_frame @ self.frame
        inverse = jnp.exp(-params.log_sigma)
        return (on_frame + inverse * lifted.frame_noise) @ self.frame - inverse * lifted.noise

    def gradient(
        self, params: LiftParams, lifted: Lifted, latent, cotangent: Float[Array, "draws dim"]
    ) -> tuple[LiftParams, Float[Array, "draws frame"]]:
        """Pull cotangents of u back.

        Return the gradient averaged over draws, and the cotangents of a.
        """
        on_frame = cotangent @ self.frame.T
        log_sigma, num = jnp.zeros((), on_frame.dtype), cotangent.shape[0]
        if self.complement_dim:
            by_noise = jnp.sum(cotangent * lifted.noise, -1)
            by_noise -= jnp.sum(on_frame * lifted.frame_noise, -1)
            log_sigma = jnp.exp(params.log_sigma) * jnp.mean(by_noise)
        offsets = jnp.mean(cotangent, 0)[None] if params.offsets.shape[0] else params.offsets
        root = jnp.tril(on_frame.T @ latent) / num
        return LiftParams(offsets, log_sigma, root), on_frame @ params.root

    def natural(self, params: LiftParams, gradient: LiftParams) -> LiftParams:
        """Multiply a gradient by the inverse Fisher matrix that the map has under a normal latent.

        Offsets come in units of sigma, the root relative to itself: it moves to `root (I +
        update)`.
        """
        sigma = jnp.exp(params.log_sigma)
        offsets = gradient.offsets
        if offsets.shape[0]:
            on_frame = offsets @ self.frame.T
            on_frame = on_frame @ params.root @ params.root.T / sigma - sigma * on_frame
            offsets = sigma * offsets + on_frame @ self.frame
        log_sigma = gradient.log_sigma / max(self.complement_dim, 1)
        return LiftParams(offsets, log_sigma, jnp.tril(params.root.T @ gradient.root))

    def moved(self, params: LiftParams, updates: LiftParams) -> LiftParams:
        """Add updates in the coordinates of `natural`; the diagonal of the root stays positive."""
        # the diagonal moves by factors exp(update), which keeps it positive
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
    """Return `size` orthonormal rows that begin with the span of `leading`.

    They hold the span of `core` if it fits, and random directions after it.
    """
    dim = core.shape[1]
    # The random rows come last, and QR keeps of them what the rows before leave out.
    fill = jax.random.normal(key, (size, dim), core.dtype)
    rows = jnp.concatenate([leading, core, fill])[: max(size, 1)]
    lengths: Array = jnp.linalg.norm(rows, axis=1, keepdims=True)
    # rows of one length: QR would lose a short row's digits to a long one
    return jnp.linalg.qr((rows / jnp.where(lengths > 0, lengths, 1.0)).T)[0].T


def core_root(
    frame: Float[Array, "frame dim"], core: Float[Array, "core dim"]
) -> Float[Array, "frame frame"]:
    """Return the lower-triangular root of `E (I + B^T B)^{-1} E^T`.

    It is the covariance along a frame E that holds the rows of B.
    """
    on_frame = core @ frame.T
    # the inverse of a Cholesky factor is a root from the other side: flip before and after
    flipped = jnp.eye(frame.shape[0], dtype=frame.dtype) + (on_frame.T @ on_frame)[::-1, ::-1]
    return lower_inverse(cholesky(flipped)).T[::-1, ::-1]
