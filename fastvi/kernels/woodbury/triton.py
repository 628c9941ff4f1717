"""The two sweeps as Triton kernels. For NVIDIA GPUs."""

import functools

import jax
import jax.numpy as jnp

from fastvi.kernels import _triton
from fastvi.kernels.woodbury import sweeps, triton_kernels, xla
from fastvi.kernels.woodbury.types import Mixture

grams, factor_grams = xla.grams, xla.factor_grams


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

    x_core, x, sums = _triton.over_chains(stacked)(
        eps, mixture.core, mixture.factors, correction, z, label
    )
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


_SWEEPS = sweeps.Sweeps("triton", _project, _residual)
draw = functools.partial(sweeps.draw, _SWEEPS)
log_prob = functools.partial(sweeps.log_prob, _SWEEPS)
