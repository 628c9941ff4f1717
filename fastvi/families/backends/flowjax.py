"""Flows of FlowJAX (Ward, 2023)."""

import dataclasses
import functools
import re
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._optional import import_optional
from fastvi.families.backends.base import SPLINE_BOUND, AbstractBackend
from fastvi.flows.distributions import standard_log_prob

# The number of a conditioner's layer in the path of its parameters.
LAYER = re.compile(r"\.(?:conditioner|masked_autoregressive_mlp)\.layers\[(\d+)\]")


@dataclasses.dataclass(frozen=True)
class FlowJAXBackend(AbstractBackend):
    """Bijection of `flowjax.flows`, the quick direction that of the draws.

    Its Equinox modules are taken apart here: arrays that are trained are the parameters, the rest
    (permutations, masks, functions) is built once, from a fixed key.
    """

    def __post_init__(self):
        self.require_one_width()
        if self.dim < 2:
            raise ConfigError(
                f"d_latent must be at least 2 for backend 'flowjax'; got {self.dim}: use "
                "backend='native'."
            )

    def init(self, key):
        """Return FlowJAX's parameters, last layers times `init_scale`."""

        def scaled(path, leaf):
            found = LAYER.search(jax.tree_util.keystr(path))
            is_last = found is not None and int(found[1]) == len(self.settings.hidden)
            return leaf * self.settings.init_scale if is_last else leaf

        return jax.tree_util.tree_map_with_path(scaled, _partition(self._build(key))[0])

    def sample_and_log_prob(self, params, noise):
        """Map the noise forward."""
        z, log_det = jax.vmap(self._bijection(params).transform_and_log_det)(noise)
        return z, standard_log_prob(noise) - log_det

    def log_prob(self, params, z):
        """Map z back."""
        noise, log_det = jax.vmap(self._bijection(params).inverse_and_log_det)(z)
        return standard_log_prob(noise) + log_det

    def _bijection(self, params) -> Any:
        return _import("paramax").unwrap(eqx.combine(params, self._static))

    @functools.cached_property
    def _static(self):
        # A trace may be in progress, and what is kept for other traces must be concrete. Under
        # `jax.ensure_compile_time_eval` both branches of FlowJAX's runtime checks would run.
        with jax.core.eval_context():
            static = _partition(self._build(jax.random.key(0)))[1]
        return jax.tree_util.tree_map(
            lambda leaf: np.asarray(leaf) if eqx.is_array(leaf) else leaf, static
        )

    def _build(self, key) -> Any:
        flows, bijections = _import("flowjax.flows"), _import("flowjax.bijections")
        normal = _import("flowjax.distributions").Normal(jnp.zeros(self.dim))
        template = self.settings.template
        spline = bijections.RationalQuadraticSpline(
            knots=self.settings.bins - 1, interval=SPLINE_BOUND
        )
        build = (
            flows.coupling_flow
            if template in ("realnvp", "spline_coupling")
            else flows.masked_autoregressive_flow
        )
        return build(
            key,
            base_dist=normal,
            transformer=spline if template in ("spline_coupling", "nsf_ar") else None,
            flow_layers=self.settings.depth,
            nn_width=self.width,
            nn_depth=len(self.settings.hidden),
            nn_activation=jnp.tanh,
            invert=False,
        ).bijection


def _partition(bijection):
    nontrainable = _import("paramax").NonTrainable
    return eqx.partition(
        bijection, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, nontrainable)
    )


def _import(module: str) -> Any:
    return import_optional(
        module, extra="flow", distribution="flowjax", purpose="backend='flowjax'"
    )
