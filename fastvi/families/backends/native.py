"""Flows of `fastvi.flows`."""

import functools

import jax
import numpy as np

from fastvi._typing import Key
from fastvi.families.backends.base import AbstractBackend
from fastvi.flows import Flow, build_maf, build_realnvp, build_spline_maf, build_spline_realnvp

BUILDERS = {
    "realnvp": (build_realnvp, {}),
    "maf": (build_maf, {"fast": "forward"}),
    "spline_coupling": (build_spline_realnvp, {}),
    "nsf_ar": (build_spline_maf, {"fast": "forward"}),
}
SPLINE_OPTIONS = {"tail_bound": 6.0, "min_derivative": 1e-3}  # in standard deviations of the base


class NativeBackend(AbstractBackend):
    """Flow of this package; autoregressive ones draw in one pass."""

    def init(self, key):
        """Return the builder's parameters, of the identity, with last layers drawn at `init_scale`."""
        key_build, key_last = jax.random.split(key)
        return _perturb(self._build(key_build)[1], key_last, self.config.init_scale)

    def sample_and_log_prob(self, params, noise):
        """Map the noise forward."""
        return self._flow.transform_noise(params, noise)

    def log_prob(self, params, z):
        """Map z back."""
        return self._flow.log_prob(params, z)

    def _build(self, key: Key):
        build, options = BUILDERS[self.config.template]
        if "spline" in build.__name__:
            options = options | SPLINE_OPTIONS | {"num_bins": self.config.bins}
        return build(
            key,
            self.dim,
            self.config.depth,
            self.width,
            len(self.config.hidden),
            use_loft=False,
            res_scale=1.0,
            **options,
        )

    @functools.cached_property
    def _flow(self) -> Flow:
        built = []
        jax.eval_shape(lambda key: built.append(self._build(key)[0]), jax.random.key(0))
        return built[0]


def _perturb(params, key, scale):
    """Add noise of standard deviation scale / sqrt(fan-in) to the last kernels of networks, which start at zero."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    moved = []
    for index, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path)
        if "dense_out" in name and "kernel" in name:
            noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
            leaf = leaf + scale / np.sqrt(max(leaf.shape[0], 1)) * noise
        moved.append(leaf)
    return jax.tree_util.tree_unflatten(structure, moved)
