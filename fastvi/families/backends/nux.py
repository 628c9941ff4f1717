"""Flows of NuX 2.0.0, by calls `flow(x, params=, inverse=, rng_key=) -> (z, log-likelihood)`."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from fastvi._errors import ConfigError
from fastvi._optional import MissingExtraError
from fastvi.families.backends.base import AbstractBackend
from fastvi.flows.distributions import standard_log_prob

INIT_EXAMPLES = 256  # NuX initialises by data: its layers see standard normals
HOW_TO_GET = (
    "backend='nux' needs NuX 2.0.0, which is not on PyPI (the 1.0.3 there imports on no supported "
    "jax): pip install git+https://github.com/Information-Fusion-Lab-Umass/NuX.git, or use "
    "backend='native'"
)


@dataclasses.dataclass(frozen=True)
class NuxBackend(AbstractBackend):
    """`RealNVP` or `NonlinearCoupling` of NuX.

    NuX writes what it is called with into its objects, so each call makes its own. The
    log-likelihood of a layer is log |dz/dx| with z the latent side, in both directions.
    """

    def __post_init__(self):
        self.require_one_width()
        if self.settings.template not in ("realnvp", "spline_coupling"):
            known = "'realnvp' and 'spline_coupling'"
            raise ConfigError(
                f"NuX 2.0.0 has the templates {known}; got {self.settings.template!r}: use "
                "backend='native'."
            )
        if self.dim % 2:
            raise ConfigError(
                f"d_latent must be even for backend 'nux'; got {self.dim}: use backend='native'."
            )

    def init(self, key):
        """Return NuX's parameters with the couplings' scales times `init_scale`."""
        flow = self._build()
        flow(jax.random.normal(key, (INIT_EXAMPLES, self.dim)), rng_key=key, is_training=False)

        def scaled(path, leaf):
            if not jax.tree_util.keystr(path).endswith("['scale']"):
                return leaf
            return leaf / 0.01 * self.settings.init_scale  # NuX draws it at 0.01

        return jax.tree_util.tree_map_with_path(scaled, flow.get_params())

    def sample_and_log_prob(self, params, noise):
        """Map the noise from the latent side."""
        z, log_likelihood = self._call(params, noise, inverse=True)
        return z, standard_log_prob(noise) + log_likelihood

    def log_prob(self, params, z):
        """Map z to the latent side."""
        noise, log_likelihood = self._call(params, z, inverse=False)
        return standard_log_prob(noise) + log_likelihood

    def _call(self, params, x, *, inverse: bool):
        return self._build()(
            x, params=params, inverse=inverse, rng_key=jax.random.key(0), is_training=False
        )

    def _build(self) -> Any:
        nux, settings = _import_nux(), self.settings
        widths = {"working_dim": self.width, "hidden_dim": self.width}
        layers = {
            "n_layers": settings.depth,
            "n_resnet_layers": len(settings.hidden),
            "nonlinearity": jnp.tanh,
        }
        if settings.template == "realnvp":
            return nux.RealNVP(**layers, **widths, dropout_prob=0.0)
        return nux.NonlinearCoupling(
            **layers, **widths, dropout_prob=0.0, K=self.settings.bins, kind="spline"
        )


def _import_nux() -> Any:
    """Import NuX 2.

    Raises:
        MissingExtraError: If it is missing, older, or cannot be imported.
    """
    try:
        nux = importlib.import_module("nux")
    except (ImportError, AttributeError) as error:  # 1.0.3 reads names that jax has removed
        raise MissingExtraError(f"{HOW_TO_GET} ({error})") from error
    if not hasattr(nux, "NonlinearCoupling"):
        raise MissingExtraError(HOW_TO_GET)
    return nux
