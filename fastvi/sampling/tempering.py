"""Walkers of one posterior taken over to that of another temperature and localization."""

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Int, Keys
from fastvi.families.moments import LinearMap
from fastvi.kernels.noise import streams
from fastvi.sampling.tuning import fresh_step_size
from fastvi.sampling.walkers import Walkers
from fastvi.target.posterior import LocalPosterior


def temper_walkers(
    walkers: Walkers, before: LocalPosterior, after: LocalPosterior, number: int
) -> Walkers:
    """Take walkers over to another temperature and localization about the same w*.

    They keep their round coordinates, and the map from these is made anew: walkers of a Gaussian
    posterior are then draws of the new one. Others have yet to burn in.

    Args:
        walkers: The walkers.
        before: Their posterior.
        after: The new one.
        number: Distinguishes their keys from those of other posteriors.
    """
    linear_map = temper_map(walkers.linear_map, before, after)
    ratio = before.nbeta / after.nbeta
    return walkers._replace(
        linear_map=linear_map,
        keys=_fresh_keys(walkers.keys, jnp.int32(number)),
        # n beta times it, the llc, is taken over until steps tell it anew
        excess=walkers.excess * ratio.astype(walkers.excess.dtype),
        step_size=fresh_step_size(walkers.step_size.step),
        owed=jnp.zeros_like(walkers.owed),
    )


def temper_map(linear_map: LinearMap, before: LocalPosterior, after: LocalPosterior) -> LinearMap:
    """Return the coordinates that are round at another temperature and localization.

    The precision P of the old coordinates is n beta H + gamma, which gives H and so the new one,
    c (P - gamma) + gamma' with c = n beta' / n beta. With P = S^-1 (1 - F^T M F) S^-1, S the scales
    and F the basis, it is E^1/2 (1 - Q^T N Q) E^1/2: a diagonal and as many directions as before.

    On the host in double precision, as nothing is compiled for it: some terms^2 dim operations.
    """
    scale, basis, stretch = (
        np.asarray(part, float) for part in (linear_map.scale, linear_map.basis, linear_map.stretch)
    )
    change = float(after.nbeta) / float(before.nbeta)
    held = np.maximum(scale**-2 - float(before.gamma), 0.0)
    diagonal = change * held + float(after.gamma)
    identity = np.eye(len(stretch))
    inner = identity - np.linalg.matrix_power(np.linalg.inv(identity + stretch), 2)
    directions, triangle = np.linalg.qr((basis / (scale * np.sqrt(diagonal))).T)
    values, vectors = np.linalg.eigh(identity - change * triangle @ inner @ triangle.T)
    turned = vectors.T @ directions.T
    # no direction is wider than the localizer alone would have it
    least = float(after.gamma) * np.sum(turned**2 / diagonal, axis=1)
    roots = np.diag(np.maximum(values, least) ** -0.5) - identity
    dtype = linear_map.scale.dtype
    return LinearMap(
        linear_map.center,
        *(jax.device_put(part.astype(dtype)) for part in (diagonal**-0.5, turned, roots)),
    )


@jax.jit
def _fresh_keys(keys: Keys, number: Int[Array, ""]) -> Keys:
    """Return keys without which the noise of the earlier run would be used twice."""

    def fresh(key):
        return jax.random.fold_in(streams.derive(key, streams.Purpose.WALKERS), number)

    return jax.vmap(fresh)(keys)
