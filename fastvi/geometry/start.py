"""The start of a fit.

Coordinates, core and scale from the curvature at w*, then a check of the scale by virial.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Int, Key, Scalar
from fastvi.geometry.curvature import BLOCK, Spectrum, block_krylov, dense_spectrum
from fastvi.geometry.whitening import whitening_scale
from fastvi.kernels import hutchinson
from fastvi.target.data import AbstractData
from fastvi.target.hessian import data_hvp
from fastvi.target.objective import FlatObjective
from fastvi.target.posterior import LocalPosterior

# Rows of the core where the spectrum decides. Each takes a Hessian product and d numbers; half of
# them leave more steep directions to the factors, which learn more slowly.
MAX_RANK = 64
# Bytes of the core: it bounds the rank beyond d = 5e5. Half of it halves the rank there.
CORE_BYTES = 128 * 2**20
# Dimension up to which all columns of the Hessian are as cheap as a Krylov space of MAX_RANK.
DENSE_DIM = 64
# Ritz values beyond those used, whose own errors would show: two blocks (Musco & Musco, 2015).
OVERSAMPLING = 2 * BLOCK
# Probes of the trace: their error is sqrt(2 / 8) of the root mean square of what the core leaves.
# They share a pass, as the blocks of the Krylov space do.
TRACE_PROBES = BLOCK
# Smallest precision relative to the mean one, where gamma is zero or nearly so: single precision
# resolves no less.
RELATIVE_FLOOR = 1e-6


class StartSettings(NamedTuple):
    """What a start is made for.

    Attributes:
        rank: Rows of the precision core; None: as many as the spectrum asks for.
        examples: Most examples that the Hessian at w* is averaged over.
        whitening: "none", "rmsprop", "adam" or "hvp_diag".
        whitening_decay: Decay of the moving averages of "rmsprop" and "adam".
    """

    rank: int | None = None
    examples: int = 4096
    whitening: str = "none"
    whitening_decay: float = 0.99


class Start(eqx.Module):
    """Where a fit begins.

    `scale` is S^{-1} with the overall scale of q in it, `core` the precision core in those
    coordinates, so that log_scale starts at zero. `spectrum` holds the leading eigenvalues of the
    precision `nbeta H + gamma`, the first `num_values` of them computed and the others zero, and
    `rest` the mean of what the core leaves out, both in the whitened coordinates before rescaling.
    `lowest` is the least curvature that was met there, `lowest_direction` the displacement of unit
    length in whitened coordinates that has it.
    """

    scale: Float[Array, " dim"]
    core: Float[Array, "core dim"]
    spectrum: Float[Array, " krylov"]
    rest: Scalar
    rank: Int[Array, ""]
    wanted_rank: Int[Array, ""]
    trace: Scalar
    explained: Scalar
    num_values: Int[Array, ""]
    num_hvp: Int[Array, ""]
    lowest: Scalar
    lowest_direction: Float[Array, " dim"]


def rank_limit(settings: StartSettings, dim: int, itemsize: int) -> int:
    """Return how many rows the core may have."""
    if settings.rank is not None:
        return settings.rank
    return max(0, min(MAX_RANK, dim - 1, CORE_BYTES // (itemsize * dim)))


def most_products(settings: StartSettings, dim: int, itemsize: int) -> int:
    """Return the Hessian-vector products that a start takes at most, the whitening's left out."""
    limit = rank_limit(settings, dim, itemsize)
    if limit == 0:
        return TRACE_PROBES
    return TRACE_PROBES + (dim if dim <= DENSE_DIM else _krylov_size(limit, dim))


def _krylov_size(limit: int, dim: int) -> int:
    """Return the largest dimension of the Krylov space, whole blocks."""
    return -(-min(limit + OVERSAMPLING, dim - dim % BLOCK) // BLOCK) * BLOCK


def make_start(
    objective: FlatObjective,
    posterior: LocalPosterior,
    subset: AbstractData,
    next_data: Callable[[Key], AbstractData],
    settings: StartSettings,
    key: Key,
    whitener_scale: Float[Array, " dim"] | None = None,
) -> Start:
    """Build the Laplace start from Hessian-vector products at w*.

    In whitened coordinates the precision is `M = S^{-1} (nbeta H + gamma) S^{-1}`; with eigenpairs
    (m_i, e_i) and `rest` the mean of the others, D = 1/rest and core rows `e_i sqrt(m_i / rest -
    1)`: exact on a quadratic whose other eigenvalues are equal.

    Cost:
        `num_hvp` Hessian-vector products on `subset`, and the whitening's own.
    """
    center, dtype, dim = posterior.center, posterior.center.dtype, posterior.center.size
    key_whiten, key_krylov, key_trace = jax.random.split(key, 3)
    hvp = data_hvp(objective, center, subset, copies=dim if dim <= DENSE_DIM else BLOCK)
    scale = (
        whitening_scale(
            settings.whitening,
            key_whiten,
            objective,
            posterior,
            next_data,
            hvp,
            settings.whitening_decay,
        )
        if whitener_scale is None
        else whitener_scale
    )

    def precision(block):
        return scale * (
            posterior.nbeta * jax.vmap(hvp)(scale * block) + posterior.gamma * scale * block
        )

    limit = rank_limit(settings, dim, dtype.itemsize)
    probes = hutchinson.rademacher(key_trace, TRACE_PROBES, dim, dtype)

    def floor_by(images):
        mean = jnp.mean(jnp.sum(probes * images, -1)) / dim
        floor = jnp.maximum(posterior.gamma * jnp.min(scale**2), RELATIVE_FLOOR * jnp.abs(mean))
        # where neither loss nor localizer says anything, any width will do
        return jnp.where(floor > 0, floor, 1.0)

    def exhausted(values, computed, images):
        return jnp.sum(values > 2 * floor_by(images)) <= computed - OVERSAMPLING

    if limit == 0:
        spectrum = Spectrum(jnp.zeros(0, dtype), jnp.zeros((0, dim), dtype), jnp.asarray(0))
        images = precision(probes)
    elif dim <= DENSE_DIM:
        spectrum = dense_spectrum(precision, dim, dtype)
        images = (probes @ spectrum.vectors.T * spectrum.values) @ spectrum.vectors
    else:
        size = _krylov_size(limit, dim)
        spectrum, images = block_krylov(precision, key_krylov, probes, size, exhausted)
    return _assemble(spectrum, probes, images, scale, floor_by(images), limit)


def _assemble(spectrum: Spectrum, probes, images, scale, floor, limit) -> Start:
    """Choose the rank and set scale and core."""
    dim, size = scale.size, spectrum.values.size
    values = jnp.where(jnp.isfinite(spectrum.values), spectrum.values, 0.0)
    is_ritz, vectors = jnp.arange(size) < spectrum.size, spectrum.vectors
    # trace of the complement of the Ritz space, by the probes with that space projected out
    beyond = probes - (probes @ vectors.T) @ vectors
    complement = jnp.maximum(dim - spectrum.size, 0)
    # the probes' own share of the complement in the denominator makes this exact for a constant
    # remainder
    share = jnp.maximum(jnp.sum(beyond**2), jnp.finfo(beyond.dtype).tiny)
    complement_trace = jnp.where(complement > 0, complement * jnp.sum(beyond * images) / share, 0.0)
    # cross terms between the space and its complement vanish for exact Ritz spaces
    mean_beyond = jnp.where(
        complement > 0, jnp.maximum(complement_trace / jnp.maximum(complement, 1), floor), floor
    )
    smallest = jnp.min(jnp.where(is_ritz, values, jnp.inf), initial=jnp.inf)
    # Where every eigenvalue is known, the rows are for those above the smallest.
    threshold = jnp.where(complement > 0, mean_beyond + floor, 1.05 * jnp.maximum(smallest, floor))
    wanted = values > threshold
    chosen = wanted & (jnp.arange(size) < limit)
    rank = jnp.sum(chosen)
    left = jnp.sum(jnp.where(~chosen & is_ritz, jnp.maximum(values, floor), 0.0))
    rest = jnp.maximum((left + complement * mean_beyond) / jnp.maximum(dim - rank, 1), floor)
    lengths = jnp.sqrt(jnp.where(chosen, jnp.maximum(values / rest - 1, 0.0), 0.0))
    keep = min(limit, size)
    core = jnp.zeros((limit, dim), scale.dtype).at[:keep].set((lengths[:, None] * vectors)[:keep])
    trace = jnp.sum(values) + complement_trace
    lowest, direction = _lowest(spectrum, beyond, images, complement)
    return Start(
        scale=scale / jnp.sqrt(rest),
        core=core,
        spectrum=values,
        rest=rest,
        rank=rank,
        wanted_rank=jnp.sum(wanted),
        trace=trace,
        explained=jnp.sum(jnp.where(chosen, values, 0.0)) / trace,
        num_values=spectrum.size,
        num_hvp=spectrum.size + TRACE_PROBES,
        lowest=lowest,
        lowest_direction=scale * direction,
    )


def _lowest(spectrum: Spectrum, beyond, images, complement):
    """Return the least curvature that was met, and its direction.

    It is that of a Ritz pair, or of a probe of what these leave out.
    """
    squares = jnp.sum(beyond**2, axis=-1)
    is_seen = (complement > 0) & (squares > 0)
    quotients = jnp.where(
        is_seen, jnp.sum(beyond * images, axis=-1) / jnp.where(is_seen, squares, 1.0), jnp.inf
    )
    is_ritz = jnp.arange(spectrum.values.size) < spectrum.size
    values = jnp.concatenate([jnp.where(is_ritz, spectrum.values, jnp.inf), quotients])
    candidates = jnp.concatenate(
        [spectrum.vectors, beyond / jnp.sqrt(jnp.where(is_seen, squares, 1.0))[:, None]]
    )
    place = jnp.argmin(values)
    return values[place], candidates[place]


class NewtonStep(NamedTuple):
    """The step from w* to where a quadratic with its slope and curvature is least.

    Attributes:
        displacement: The step.
        gain: Nats of the log density that it would gain: 0 at a minimum.
    """

    displacement: Float[np.ndarray, " dim"]
    gain: float


def newton_step(start: Start, posterior: LocalPosterior, slope: Array | np.ndarray) -> NewtonStep:
    """Return the Newton step from w*.

    It is computed in numpy, which compiles nothing.

    Args:
        start: The precision, as its core and scale have it.
        posterior: The target.
        slope: Gradient of L_n at w* on all data. On a part of them its sampling error alone would
            be `nbeta d / 2` times the difference of their inverse numbers, thousands of nats for a
            network.
    """
    core, scale = np.asarray(start.core), np.asarray(start.scale)
    pull = scale * float(posterior.nbeta) * np.asarray(slope)
    squares = np.sum(core**2, axis=-1)
    used = squares > 0
    along = np.where(used, core @ pull / np.where(used, squares, 1.0), 0.0)
    beside = pull - along @ core  # the core's rows are orthogonal
    gain = 0.5 * (beside @ beside + np.sum(along**2 * squares / (1 + squares)))
    return NewtonStep(-scale * (beside + (along / (1 + squares)) @ core), float(gain))
