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


@functools.partial(quick_jit, static_argnums=0)
def draws(implementation, mixture, stacked):
    """Small matrices by one definition, so that what differs is the kernel's."""
    small = xla.grams(mixture)
    drawn = jax.vmap(functools.partial(implementation.draw, mixture, small))(stacked)
    return drawn, implementation.log_prob(mixture, small, stacked.eps[0] + 0.3)
