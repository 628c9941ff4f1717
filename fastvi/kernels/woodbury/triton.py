"""The density by two Triton sweeps, the small algebra between them by XLA. For NVIDIA GPUs.

Components with means of their own are not implemented here.
"""

import jax
import jax.numpy as jnp

from fastvi._errors import ConfigError
from fastvi.kernels import _triton
from fastvi.kernels.woodbury import triton_kernels, xla
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise

grams, factor_grams = xla.grams, xla.factor_grams


def draw(mixture: Mixture, small: Grams, noise: Noise) -> Draw:
    """Draw and evaluate; see `api.draw`."""
    _check(mixture)
    correction = xla.solve(small.core_half, mixture.core @ noise.eps - noise.zeta)
    x_core, x, projected, square = _project(noise.eps, mixture, correction, noise.z, noise.label)
    core_x = noise.zeta + correction
    density = _density(mixture, small, x, core_x + small.cross[noise.label] @ noise.z, projected, square)
    scale = jnp.exp(mixture.log_scale)
    return Draw(
        x=x,
        x_core=x_core,
        core_x=core_x,
        displacement=mixture.offsets.sum(0) + scale * x,
        log_prob=density.log_prob,
        responsibilities=density.responsibilities,
        score=density.score / scale,
    )


def log_prob(mixture: Mixture, small: Grams, displacement):
    """Evaluate the log density; its derivative is that of the XLA implementation."""
    _check(mixture)
    return _log_prob(mixture, small, displacement)


@jax.custom_vjp
def _log_prob(mixture: Mixture, small: Grams, displacement):
    x = (displacement - mixture.offsets.sum(0)) / jnp.exp(mixture.log_scale)
    num_core, rank = mixture.core.shape[0], mixture.factors.shape[1]
    still = jnp.zeros(num_core, x.dtype), jnp.zeros(rank, x.dtype), jnp.asarray(0)
    _, _, projected, square = _project(x, mixture, *still)
    return xla.shared_log_prob(mixture, small, mixture.core @ x, projected, square)[0]


def _log_prob_forward(mixture, small, displacement):
    return _log_prob(mixture, small, displacement), (mixture, small, displacement)


def _log_prob_backward(saved, cotangent):
    return jax.vjp(xla.log_prob, *saved)[1](cotangent)


_log_prob.defvjp(_log_prob_forward, _log_prob_backward)


def _density(mixture: Mixture, small: Grams, x, core_x, projected, square) -> xla.Density:
    log_prob, weights, solved = xla.shared_log_prob(mixture, small, core_x, projected, square)
    weighted = weights[:, None] * solved
    core_residual = core_x - jnp.einsum("mkr,mr->k", small.cross, weighted)
    return xla.Density(log_prob, weights, _residual(x, mixture.core, mixture.factors, core_residual, weighted))


def _project(eps, mixture: Mixture, correction, z, label):
    """Return x_core, x, A x and x . x."""
    num_components, rank, _ = mixture.factors.shape

    def stacked(eps, core, factors, correction, z, label):
        chains, dim = eps.shape
        programs, rows = _triton.blocks(dim), num_components * rank
        like = jax.ShapeDtypeStruct((chains, dim), eps.dtype)
        x_core, x, partial = _triton.call(
            (triton_kernels.project, triton_kernels.project),
            *(eps, core, factors, correction, z, label),
            outputs=(like, like, jax.ShapeDtypeStruct((chains, programs, rows + 1), eps.dtype)),
            grid=(programs, chains),
            aliases={},
            dim=dim,
            num_core=core.shape[1],
            num_rows=rows,
            rank=rank,
            block=_triton.BLOCK,
            tile=_triton.TILE,
        )
        return x_core, x, jnp.sum(partial, axis=1)

    x_core, x, sums = _triton.over_chains(stacked)(eps, mixture.core, mixture.factors, correction, z, label)
    return x_core, x, sums[:-1].reshape(num_components, rank), sums[-1]


def _residual(x, core, factors, core_weight, factor_weight):
    def stacked(x, core, factors, core_weight, factor_weight):
        chains, dim = x.shape
        (score,) = _triton.call(
            (triton_kernels.residual, triton_kernels.residual),
            *(x, core, factors, core_weight, factor_weight),
            outputs=(jax.ShapeDtypeStruct((chains, dim), x.dtype),),
            grid=(_triton.blocks(dim), chains),
            aliases={},
            dim=dim,
            num_core=core.shape[1],
            num_rows=factors.shape[1] * factors.shape[2],
            block=_triton.BLOCK,
            tile=_triton.TILE,
        )
        return score

    return _triton.over_chains(stacked)(x, core, factors, core_weight, factor_weight)


def _check(mixture: Mixture) -> None:
    if mixture.offsets.shape[0] > 1:
        raise ConfigError(
            "implementation 'triton' of kernel 'woodbury' has no means by component; use implementation='xla', or "
            "means='shared'."
        )
