"""Diagonal whitening: the length of one unit of u in each model coordinate."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Key
from fastvi.kernels import hutchinson
from fastvi.target.data import AbstractData
from fastvi.target.objective import FlatObjective
from fastvi.target.posterior import LocalPosterior

# Minibatch gradients at w* in the pre-pass of rmsprop and adam: a second moment is then known to
# sqrt(2 / 128), an eighth. Half of them are half as dear and know it to a sixth.
MOMENT_GRADIENTS = 128
# Rademacher probes of hvp_diag, a Hessian product each. Their error is the off-diagonal part over
# sqrt(16); twice as many take 0.7 of it.
DIAGONAL_PROBES = 16
# Smallest A_diag relative to its mean: keeps dead parameters at a finite length, a hundred times
# the typical one.
RELATIVE_FLOOR = 1e-4


def whitening_scale(
    mode: str,
    key: Key,
    objective: FlatObjective,
    posterior: LocalPosterior,
    next_data: Callable[[Key], AbstractData],
    hvp: Callable[[Float[Array, " dim"]], Float[Array, " dim"]],
    decay: float,
) -> Float[Array, " dim"]:
    """Return S^{-1} for a whitening mode.

    "rmsprop" and "adam" accumulate bias-corrected moments of minibatch gradients at w*; "adam"
    removes the mean gradient. They know shape only, so the result has geometric mean one.
    "hvp_diag" knows the scale: `1 / sqrt(nbeta |diag H| + gamma)`.

    Args:
        mode: "none", "rmsprop", "adam" or "hvp_diag".
        key: Random key.
        objective: The loss.
        posterior: The target; its center is where gradients are taken.
        next_data: Draws a minibatch from a key.
        hvp: Hessian-vector product of the mean loss at the center.
        decay: Decay of the moving averages.

    Cost:
        `MOMENT_GRADIENTS` minibatch gradients, or `DIAGONAL_PROBES` Hessian-vector products.
    """
    center = posterior.center
    if mode == "none":
        return jnp.ones_like(center)
    if mode == "hvp_diag":
        probes = hutchinson.rademacher(key, DIAGONAL_PROBES, center.size, center.dtype)
        precision = posterior.nbeta * jnp.abs(hutchinson.diagonal(hvp, probes)) + posterior.gamma
        return 1 / jnp.sqrt(jnp.maximum(precision, RELATIVE_FLOOR * jnp.mean(precision)))

    def accumulate(moments, key_batch):
        gradient = next_data(key_batch).mean(lambda batch: objective.grad(center, batch))
        first, second = moments
        return (
            decay * first + (1 - decay) * gradient,
            decay * second + (1 - decay) * gradient**2,
        ), None

    zero = jnp.zeros_like(center)
    (first, second), _ = jax.lax.scan(
        accumulate, (zero, zero), jax.random.split(key, MOMENT_GRADIENTS)
    )
    correction = 1 - decay**MOMENT_GRADIENTS
    second = second / correction
    if mode == "adam":
        second = second - (first / correction) ** 2
    return normalized_scale(jnp.sqrt(jnp.maximum(second, 0.0)))


def normalized_scale(diagonal: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """Turn A_diag, known up to a factor, into S^{-1} = A_diag^{-1/2} with geometric mean one."""
    mean = jnp.mean(diagonal)
    safe = jnp.where(mean > 0, jnp.maximum(diagonal, RELATIVE_FLOOR * mean), 1.0)
    log_scale = -0.5 * jnp.log(safe)
    return jnp.exp(log_scale - jnp.mean(log_scale))
