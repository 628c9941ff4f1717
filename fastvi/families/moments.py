"""What a family knows of its second moments, as values."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float


class SecondMoment(NamedTuple):
    """E_q[v v^T] = diag(diagonal) + factors^T (diag(weights) + E[c c^T]) factors.

    The displacement v is in model coordinates. The diagonal is positive, or zero throughout.
    `coefficients` are draws of c in mirrored halves; there are none where the weights say all.
    """

    diagonal: Float[Array, " dim"]
    factors: Float[Array, "terms dim"]
    weights: Float[Array, " terms"]
    coefficients: Float[Array, "samples terms"]

    def marginal(self) -> Float[Array, " dim"]:
        """Return the diagonal of E_q[v v^T]."""
        # Without coefficients the sum of their products is zero, whatever it is divided by.
        count = max(self.coefficients.shape[0], 1)
        inner = jnp.diag(self.weights) + self.coefficients.T @ self.coefficients / count
        return self.diagonal + jnp.sum((inner @ self.factors) * self.factors, axis=0)


class LinearMap(eqx.Module):
    """`v = center + scale * (x + basis^T stretch basis x)`, from round coordinates x.

    `basis` has orthonormal rows and `stretch` is symmetric. So `I + basis^T stretch basis` is the
    symmetric root of a covariance, and x is standard normal under q as far as the map knows q.
    """

    center: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    basis: Float[Array, "terms dim"]
    stretch: Float[Array, "terms terms"]

    def displacement(self, x: Float[Array, "*points dim"]) -> Float[Array, "*points dim"]:
        """Map round coordinates to a displacement from the centre of the problem."""
        return self.center + self.scale * self._root(x)

    def pull_back(self, gradient: Float[Array, "*points dim"]) -> Float[Array, "*points dim"]:
        """Map a gradient with respect to the displacement to one in round coordinates."""
        return self._root(self.scale * gradient)

    def round(self, displacement: Float[Array, "*points dim"]) -> Float[Array, "*points dim"]:
        """Invert `displacement`."""
        x = (displacement - self.center) / self.scale
        identity = jnp.eye(self.stretch.shape[0], dtype=self.stretch.dtype)
        # (I + F^T E F)^-1 = I + F^T ((I + E)^-1 - I) F, with F the basis and E the stretch.
        inverse = jnp.linalg.inv(identity + self.stretch) - identity
        return x + self.project(x) @ inverse @ self.basis

    def project(self, x: Float[Array, "*points dim"]) -> Float[Array, "*points terms"]:
        """Return the coordinates along the basis.

        The basis is the left factor: with 80 terms and 8 points in 95,701 dimensions, XLA's product
        takes 2.7 ms on one CPU core, and 6.5 ms as the right factor. The barrier keeps XLA from
        turning the one into the other.
        """
        return jax.lax.optimization_barrier(self.basis @ x.T).T

    def _root(self, x):
        return x + self.project(x) @ self.stretch @ self.basis  # stretch is symmetric


def symmetric_root(covariance: Float[Array, "terms terms"]) -> Float[Array, "terms terms"]:
    """Return the symmetric root of a covariance matrix, whose rounding errors may be negative."""
    values, vectors = jnp.linalg.eigh(covariance)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T
