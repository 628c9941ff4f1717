"""The density by two sweeps over core and factors, the small algebra between them by XLA.

What accelerators share: each gives the two sweeps, this module the rest. Components with means of
their own are not implemented here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._errors import ConfigError
from fastvi.kernels.woodbury import xla
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise


class Sweeps(NamedTuple):
    """An implementation: its name and its sweeps.

    Attributes:
        name: Name in `OP.implementations`.
        project: `(eps, mixture, correction, z, label)` -> x_core = eps - correction B, x = x_core +
            z A_label, A x and x . x.
        residual: `(x, core, factors, core_weight, factor_weight)` -> factor_weight A - core_weight
            B - x.
    """

    name: str
    project: Callable
    residual: Callable


def draw(sweeps: Sweeps, mixture: Mixture, small: Grams, noise: Noise) -> Draw:
    """Draw and evaluate; see `api.draw`."""
    _check(sweeps, mixture)
    correction = xla.solve(small.core_half, mixture.core @ noise.eps - noise.zeta)
    x_core, x, projected, square = sweeps.project(
        noise.eps, mixture, correction, noise.z, noise.label
    )
    core_x = noise.zeta + correction
    core_full = core_x + small.cross[noise.label] @ noise.z
    log_prob, weights, weighted, core_t = xla.shared_density(
        mixture, small, core_full, projected, square
    )
    scale = jnp.exp(mixture.log_scale)
    # The offsets have no row or one: their sum is zero, or the mean that all share.
    return Draw(
        x=x,
        x_core=x_core,
        core_x=core_x,
        displacement=mixture.offsets.sum(0) + scale * x,
        log_prob=log_prob,
        responsibilities=weights,
        score=sweeps.residual(x, mixture.core, mixture.factors, core_t, weighted) / scale,
    )


# A custom kernel has no derivative of its own.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def log_prob(sweeps: Sweeps, mixture: Mixture, small: Grams, displacement):
    """Evaluate the log density; its derivative is that of the XLA implementation."""
    _check(sweeps, mixture)
    x = (displacement - mixture.offsets.sum(0)) / jnp.exp(mixture.log_scale)
    num_core, rank = mixture.core.shape[0], mixture.factors.shape[1]
    # Without noise and correction the sweep leaves x as it is.
    still = jnp.zeros(num_core, x.dtype), jnp.zeros(rank, x.dtype), jnp.asarray(0)
    _, _, projected, square = sweeps.project(x, mixture, *still)
    return xla.shared_density(mixture, small, mixture.core @ x, projected, square)[0]


def _log_prob_forward(sweeps, *given):
    return log_prob(sweeps, *given), given


def _log_prob_backward(_, saved, cotangent):
    return jax.vjp(xla.log_prob, *saved)[1](cotangent)


log_prob.defvjp(_log_prob_forward, _log_prob_backward)


def _check(sweeps: Sweeps, mixture: Mixture) -> None:
    if mixture.offsets.shape[0] > 1:
        raise ConfigError(
            f"implementation {sweeps.name!r} of kernel 'woodbury' has no means by component; use "
            "implementation='xla', or means='shared'."
        )
