"""Base distributions."""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._errors import ConfigError, DataError
from fastvi._typing import Any, Array, Float, Key
from fastvi.flows._columns import check_features
from fastvi.kernels import noise


class AbstractBase(eqx.Module):
    """A distribution of vectors that a map takes from standard normals.

    Laws: `sample(params, key, shape)` is `from_noise(params, draw_noise(key, shape))`, and
    `log_prob` is the normalised density of what `from_noise` returns.

    Attributes:
        dim: Features.
    """

    dim: eqx.AbstractVar[int]

    def __check_init__(self):
        if self.dim < 1:
            raise ConfigError(f"dim must be positive, not {self.dim}.")

    @abc.abstractmethod
    def init_params(self) -> Any:
        """Return the parameters of the standard normal."""

    @abc.abstractmethod
    def from_noise(
        self, params: Any, noise: Float[Array, "*batch dim"]
    ) -> Float[Array, "*batch dim"]:
        """Turn standard normals to a sample."""

    @abc.abstractmethod
    def log_prob(self, params: Any, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
        """Return the log density at x."""

    def sample(
        self, params: Any, key: Key, shape: tuple[int, ...], dtype: Any = None
    ) -> Float[Array, "..."]:
        """Draw samples of shape (*shape, dim).

        Args:
            params: Parameters.
            key: Random key, typed or not.
            shape: Batch axes.
            dtype: Floating type of the noise; None: JAX's default.
        """
        return self.from_noise(params, draw_noise(key, (*shape, self.dim), dtype))


class StandardNormal(AbstractBase):
    """N(0, I), without parameters.

    Attributes:
        dim: Features.
    """

    dim: int = eqx.field(static=True)

    def init_params(self) -> dict[str, Array]:
        """Return an empty dict."""
        return {}

    def from_noise(self, params, noise):
        """Return the noise."""
        check_features("noise", noise, self.dim)
        return noise

    def log_prob(self, params, x):
        """Return -|x|^2 / 2 - dim log(2 pi) / 2."""
        check_features("x", x, self.dim)
        return standard_log_prob(x)


class DiagNormal(AbstractBase):
    """N(loc, diag(exp(log_scale))^2) with parameters {"loc", "log_scale"}.

    Attributes:
        dim: Features.
    """

    dim: int = eqx.field(static=True)

    def init_params(self) -> dict[str, Array]:
        """Return zeros."""
        zeros = jnp.zeros(self.dim, jnp.result_type(float))
        return {"loc": zeros, "log_scale": zeros}

    def from_noise(self, params, noise):
        """Return loc + exp(log_scale) noise."""
        check_features("noise", noise, self.dim)
        loc, log_scale = self._read(params)
        return loc + jnp.exp(log_scale) * noise

    def log_prob(self, params, x):
        """Return the normalised log density."""
        check_features("x", x, self.dim)
        loc, log_scale = self._read(params)
        return standard_log_prob((x - loc) * jnp.exp(-log_scale)) - jnp.sum(log_scale)

    def _read(self, params):
        if not isinstance(params, dict) or not {"loc", "log_scale"} <= params.keys():
            raise DataError(f'DiagNormal needs parameters {{"loc", "log_scale"}}, not {params!r}.')
        for name in ("loc", "log_scale"):
            if jnp.shape(params[name]) != (self.dim,):
                raise DataError(
                    f"{name} must have shape ({self.dim},), not {jnp.shape(params[name])}."
                )
        return params["loc"], params["log_scale"]


def draw_noise(key: Key, shape: tuple[int, ...], dtype: Any = None) -> Float[Array, "..."]:
    """Draw what `jax.random.normal` draws, for typed and raw keys.

    The fused generator draws it where it applies.
    """
    # A raw key is of the generator that jax is set to.
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return noise.normal(key, shape, jnp.result_type(float) if dtype is None else dtype)


def standard_log_prob(z: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
    """Return the log density of N(0, I)."""
    # An axis of size zero is a distribution of nothing, with a density of one.
    return -0.5 * jnp.sum(z * z, axis=-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
