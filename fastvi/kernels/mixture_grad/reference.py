"""Definition of the pull-back.

Autodiff through the dense sampling map, metrics as dense products.
"""

import jax
import jax.numpy as jnp

from fastvi.kernels.mixture_grad.types import Gradient
from fastvi.kernels.woodbury import reference
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise


def pullback(
    mixture: Mixture, grams: Grams, noise: Noise, drawn: Draw, cotangent, metric: str
) -> Gradient:
    """Differentiate by autodiff; the factor's side of the product is the derivative by x."""
    grad = dense(mixture, grams, noise, cotangent, metric)
    factor = jnp.exp(mixture.log_scale) * cotangent
    if metric == "natural":
        factor = jnp.linalg.solve(reference.precision(mixture), factor)
    return Gradient(grad.offsets, grad.log_scale, grad.core, factor)


def dense(mixture: Mixture, grams: Grams, noise: Noise, cotangent, metric: str) -> Mixture:
    """Differentiate `cotangent . displacement` by autodiff, factors included."""

    def paired(parameters: Mixture):
        return cotangent @ reference.draw(parameters, grams, noise).displacement

    grad = jax.grad(paired)(mixture)
    return grad if metric == "euclidean" else natural(mixture, grad)


def natural(mixture: Mixture, grad: Mixture) -> Mixture:
    """Multiply a Euclidean gradient by the metric of `api.pullback`."""
    precision = reference.precision(mixture)
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
