"""The local posterior: the only place where the target's formula is written."""

import equinox as eqx

from fastvi._typing import Array, Float, Scalar, Vector
from fastvi._vectors import sum_entries


class LocalPosterior(eqx.Module):
    r"""Tempered posterior localized at a trained parameter.

    `log p(w) = - nbeta * L_n(w) - gamma/2 * |w - center|^2`, unnormalised, in model coordinates,
    with `L_n` the mean loss per example in nats. A batch mean in place of `L_n` is unbiased as it
    stands.

    References:
        Lau et al., The Local Learning Coefficient (2024), eq. 14.
    """

    center: Vector
    nbeta: Scalar
    gamma: Scalar

    def log_density(self, displacement: Vector, loss: Scalar) -> Scalar:
        """Evaluate log p at `center + displacement`, where the mean loss is `loss`."""
        # a sum, not a dot: that of jax 0.7 on CPUs loses a few 1e-4 of a million squares
        return -self.nbeta * loss - 0.5 * self.gamma * sum_entries(displacement**2)

    def log_density_grad(self, displacement: Vector, loss_grad: Vector) -> Vector:
        """Differentiate `log_density` given the gradient of the mean loss there."""
        return -self.nbeta * loss_grad - self.gamma * displacement

    def learning_coefficient(self, excess_loss: Float[Array, "*draws"]) -> Float[Array, "*draws"]:
        """Turn `E[L_n(w)] - L_n(center)` into the local learning coefficient."""
        return self.nbeta * excess_loss
