"""Flows of `fastvi.flows`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Key
from fastvi.families.backends.base import SPLINE_BOUND, AbstractBackend
from fastvi.flows import Flow, build_maf, build_realnvp, build_spline_maf, build_spline_realnvp
from fastvi.kernels.noise import normal

BUILDERS = {
    "realnvp": (build_realnvp, {}),
    "maf": (build_maf, {"fast": "forward"}),
    "spline_coupling": (build_spline_realnvp, {}),
    "nsf_ar": (build_spline_maf, {"fast": "forward"}),
}
# Splines steeper or flatter than these run away: float32 cannot undo four of them, and the score is
# wrong.
SPLINE_OPTIONS = {"tail_bound": SPLINE_BOUND, "min_derivative": 0.05, "max_derivative": 5.0}
FIXED_SHARE = 0.4  # of a spline's interval that its bins divide equally


@dataclasses.dataclass(frozen=True)
class NativeBackend(AbstractBackend):
    """Flow of this package; autoregressive ones draw in one pass."""

    def __post_init__(self):
        self.require_one_width()

    def init(self, key):
        """Return the identity with kernels drawn anew, last layers at `init_scale`."""
        return _with_kernels(self._build(jax.random.key(0))[1], key, self.settings.init_scale)

    def sample_and_log_prob(self, params, noise):
        """Map the noise forward."""
        return self._flow.transform_noise(params, noise)

    def log_prob(self, params, z):
        """Map z back."""
        return self._flow.log_prob(params, z)

    def _build(self, key: Key):
        build, options = BUILDERS[self.settings.template]
        if self.settings.has_splines:
            bins = self.settings.bins
            least = dict.fromkeys(("min_bin_width", "min_bin_height"), FIXED_SHARE / bins)
            options = options | SPLINE_OPTIONS | least | {"num_bins": bins}
        return build(
            key,
            self.dim,
            self.settings.depth,
            self.width,
            len(self.settings.hidden),
            use_loft=False,
            res_scale=1.0,
            **options,
        )

    @functools.cached_property
    def _flow(self) -> Flow:
        built = []
        # The structure alone is wanted: nothing of the parameters is computed.
        jax.eval_shape(lambda key: built.append(self._build(key)[0]), jax.random.key(0))
        return built[0]


def _with_kernels(params, key, last_scale):
    """Draw every kernel with variance 1 / fan-in, last layers times `last_scale`, from one stream.

    Inner biases are 0.

    A stream for each, as a builder draws them, takes XLA longer to compile than all of the flow.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    kernels = {i: leaves[i][1].shape for i, name in enumerate(names) if "kernel" in name}
    ends = np.cumsum([int(np.prod(shape)) for shape in kernels.values()])
    whole = jax.lax.optimization_barrier(normal(key, (int(ends[-1]),), leaves[0][1].dtype))
    drawn = jnp.split(whole, ends[:-1])
    inner = ["bias" in name and "dense_out" not in name for name in names]
    filled = [
        jnp.zeros_like(leaf) if zero else leaf
        for (_, leaf), zero in zip(leaves, inner, strict=True)
    ]
    for part, (index, shape) in zip(drawn, kernels.items(), strict=True):
        scale = last_scale if "dense_out" in names[index] else 1.0
        filled[index] = part.reshape(shape) * (scale / np.sqrt(max(shape[0], 1)))
    return jax.tree_util.tree_unflatten(structure, filled)
