"""Definition of the kernel by dense linear algebra and autodiff: O(dim^3), for tests."""

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise


def precision(mixture: Mixture):
    """Build P = I + B^T B."""
    return (
        jnp.eye(mixture.log_scale.size, dtype=mixture.log_scale.dtype)
        + mixture.core.T @ mixture.core
    )


def covariances(mixture: Mixture):
    """Build Sigma_m as dense matrices of shape (comp, dim, dim)."""
    scale = jnp.exp(mixture.log_scale)
    inner = jnp.linalg.inv(precision(mixture)) + jnp.einsum(
        "mri,mrj->mij", mixture.factors, mixture.factors
    )
    return scale[:, None] * inner * scale


def means(mixture: Mixture):
    """Expand the offsets to one mean for each component."""
    num_components, dim = mixture.log_weights.size, mixture.log_scale.size
    if mixture.offsets.shape[0] == 0:
        return jnp.zeros((num_components, dim), mixture.log_scale.dtype)
    return jnp.broadcast_to(mixture.offsets, (num_components, dim))


def component_log_probs(mixture: Mixture, displacement):
    """Evaluate log pi_m + log N(displacement; mean_m, Sigma_m)."""
    dim = mixture.log_scale.size

    def one(mean, covariance):
        residual = displacement - mean
        quadratic = residual @ jnp.linalg.solve(covariance, residual)
        return -0.5 * (quadratic + jnp.linalg.slogdet(covariance)[1] + dim * jnp.log(2 * jnp.pi))

    return mixture.log_weights + jax.vmap(one)(means(mixture), covariances(mixture))


def factor_grams(factors):
    """Compute A_m A_m^T."""
    return jnp.einsum("mrd,msd->mrs", factors, factors)


def grams(mixture: Mixture, factor_products=None) -> Grams:
    """Compute the small matrices by their definitions."""
    cross = jnp.einsum("kd,mrd->mkr", mixture.core, mixture.factors)
    factor = factor_grams(mixture.factors) + jnp.einsum("mkr,mks->mrs", cross, cross)
    identity = jnp.eye(mixture.factors.shape[1], dtype=mixture.log_scale.dtype)
    core = (
        jnp.eye(mixture.core.shape[0], dtype=mixture.log_scale.dtype)
        + mixture.core @ mixture.core.T
    )
    return Grams(
        core_half=jnp.linalg.inv(jnp.linalg.cholesky(core)),
        cross=cross,
        factor_half=jnp.linalg.inv(jnp.linalg.cholesky(identity + factor)),
        log_det=jnp.linalg.slogdet(covariances(mixture))[1],
        # The definition raises no diagonal: a matrix that is indefinite is NaN here.
        ridged=jnp.zeros((), mixture.log_scale.dtype),
    )


def log_prob(mixture: Mixture, grams: Grams, displacement):
    """Evaluate the log density by dense solves."""
    return logsumexp(component_log_probs(mixture, displacement))


def draw(mixture: Mixture, grams: Grams, noise: Noise) -> Draw:
    """Draw by a dense solve; the score is the autodiff gradient of `log_prob`."""
    y = noise.eps + mixture.core.T @ noise.zeta
    x_core = jnp.linalg.solve(precision(mixture), y)
    x = x_core + mixture.factors[noise.label].T @ noise.z
    displacement = means(mixture)[noise.label] + jnp.exp(mixture.log_scale) * x
    logits = component_log_probs(mixture, displacement)
    return Draw(
        x=x,
        x_core=x_core,
        core_x=mixture.core @ x_core,
        displacement=displacement,
        log_prob=logsumexp(logits),
        responsibilities=jax.nn.softmax(logits),
        score=jax.grad(lambda point: log_prob(mixture, grams, point))(displacement),
    )
