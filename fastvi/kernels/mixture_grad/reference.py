"""Definition of the pull-back.

Autodiff through the dense sampling map, metrics as dense products.
"""

import jax
import jax.numpy as jnp

from fastvi.kernels.woodbury import reference
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise


def directions(
    mixture: Mixture, small: Grams, noise: Noise, drawn: Draw, cotangent, metric: str
) -> Mixture:
    """Return the gradient with that of the factors in front of z.

    The derivative by a shift of x.
    """
    shifted = jnp.exp(mixture.log_scale) * cotangent
    if metric == "natural":
        precision = (
            jnp.eye(mixture.log_scale.size, dtype=cotangent.dtype) + mixture.core.T @ mixture.core
        )
        shifted = jnp.linalg.solve(precision, shifted)
    return pullback(mixture, small, noise, drawn, cotangent, metric)._replace(factors=shifted)


def pullback(
    mixture: Mixture, small: Grams, noise: Noise, drawn: Draw, cotangent, metric: str
) -> Mixture:
    """Differentiate `cotangent . displacement` by autodiff."""
    del drawn

    def paired(parameters: Mixture):
        return cotangent @ reference.draw(parameters, small, noise).displacement

    grad = jax.grad(paired)(mixture)
    return grad if metric == "euclidean" else natural(mixture, grad)


def natural(mixture: Mixture, grad: Mixture) -> Mixture:
    """Multiply a Euclidean gradient by the metric of `api.pullback`."""
    precision = (
        jnp.eye(mixture.log_scale.size, dtype=grad.log_scale.dtype) + mixture.core.T @ mixture.core
    )
    covariance = jnp.linalg.inv(precision)
    return grad._replace(
        offsets=grad.offsets * jnp.exp(mixture.log_scale) @ covariance,
        log_scale=grad.log_scale + jnp.sum(mixture.core * grad.core, axis=0),
        core=grad.core @ precision,
        factors=grad.factors @ covariance,
    )


def update_factors(factors, labels, left, right):
    """Sum dense products by one-hot labels."""
    chosen = jax.nn.one_hot(labels, factors.shape[0], dtype=factors.dtype)
    moved = factors + jnp.einsum("bm,btr,btd->mrd", chosen, left, right)
    return moved, jnp.einsum("brd,bsd->brs", moved[labels], moved[labels])
