"""The two sweeps as Triton kernels. For NVIDIA GPUs."""

import functools

import jax
import jax.numpy as jnp

from fastvi.experimental import triton_calls, triton_kernels
from fastvi.kernels.woodbury import sweeps, xla
from fastvi.kernels.woodbury.types import Mixture

grams, factor_grams = xla.grams, xla.factor_grams


def _project(eps, mixture: Mixture, correction, z, label):
    """Return x_core, x, A x and x . x."""
    num_components, rank, _ = mixture.factors.shape

    def stacked(eps, core, factors, correction, z, label):
        chains, dim = eps.shape
        programs, rows = triton_calls.blocks(dim), num_components * rank
        like = jax.ShapeDtypeStruct((chains, dim), eps.dtype)
        x_core, x, partial = triton_calls.call(
            triton_kernels.project,
            *(eps, core, factors, correction, z, label),
            outputs=(like, like, jax.ShapeDtypeStruct((chains, programs, rows + 1), eps.dtype)),
            grid=(programs, chains),
            dim=dim,
            num_core=core.shape[1],
            num_rows=rows,
            rank=rank,
            block=triton_calls.BLOCK,
            tile=triton_calls.TILE,
        )
        return x_core, x, jnp.sum(partial, axis=1)

    x_core, x, sums = triton_calls.over_chains(stacked)(
        eps, mixture.core, mixture.factors, correction, z, label
    )
    return x_core, x, sums[:-1].reshape(num_components, rank), sums[-1]


def _residual(x, core, factors, core_weight, factor_weight):
    def stacked(x, core, factors, core_weight, factor_weight):
        chains, dim = x.shape
        (score,) = triton_calls.call(
            triton_kernels.residual,
            *(x, core, factors, core_weight, factor_weight),
            outputs=(jax.ShapeDtypeStruct((chains, dim), x.dtype),),
            grid=(triton_calls.blocks(dim), chains),
            dim=dim,
            num_core=core.shape[1],
            num_rows=factors.shape[1] * factors.shape[2],
            block=triton_calls.BLOCK,
            tile=triton_calls.TILE,
        )
        return score

    return triton_calls.over_chains(stacked)(x, core, factors, core_weight, factor_weight)


_SWEEPS = sweeps.Sweeps("triton", _project, _residual)
draw = functools.partial(sweeps.draw, _SWEEPS)
log_prob = functools.partial(sweeps.log_prob, _SWEEPS)
