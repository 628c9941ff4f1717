"""Draws and log densities of any implementation of the woodbury kernel, and a comparison."""

import functools

import jax
import numpy as np
from conftest import quick_jit

from fastvi.kernels.woodbury import xla


def assert_close(actual, expected, tolerance):
    for got, want in zip(*map(jax.tree_util.tree_leaves, (actual, expected)), strict=True):
        scale = np.max(np.abs(want), initial=0.0)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(scale, 1e-30))


def with_nan(array, place):
    spoiled = np.array(array)
    spoiled[place] = np.nan
    return spoiled


def assert_nan_gives_nan(implementation, mixture, stacked):
    """NaN in the noise of the first of two draws, then in each parameter."""
    for field in ("eps", "zeta", "z"):
        spoiled = stacked._replace(**{field: with_nan(getattr(stacked, field), (0, 0))})
        drawn, _ = jax.device_get(draws(implementation, mixture, spoiled))
        assert np.isnan(drawn.log_prob[0]), field
        assert np.isnan(drawn.score[0]).any(), field
        assert np.isfinite(drawn.log_prob[1]), field
    for field in ("log_weights", "log_scale", "core", "factors"):
        spoiled = mixture._replace(**{field: with_nan(getattr(mixture, field), -1)})
        drawn, elsewhere = draws(implementation, spoiled, stacked)
        assert np.isnan(drawn.score).any(axis=-1).all(), field
        assert np.isnan(elsewhere), field


@functools.partial(quick_jit, static_argnums=0)
def draws(implementation, mixture, stacked):
    """Small matrices by one definition, so that what differs is the kernel's."""
    small = xla.grams(mixture)
    drawn = jax.vmap(functools.partial(implementation.draw, mixture, small))(stacked)
    return drawn, implementation.log_prob(mixture, small, stacked.eps[0] + 0.3)
