"""Checks of what callers pass to the entry points: the rule, what came, the likely fix."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._typing import Array, Float, Vector
from fastvi.api.plan import DEFAULT_BATCH_SIZE
from fastvi.config import VIConfig
from fastvi.geometry.whitening import normalized_scale
from fastvi.target.data import AbstractData, Problem
from fastvi.target.keys import described
from fastvi.target.posterior import LocalPosterior


def choose_localization(given: Any, config: VIConfig, default: float | None = None) -> Any:
    """Return the strength of the localizer.

    As given, else `gamma` of the configuration, else the default.

    Raises:
        ConfigError: If both are given and differ; where the argument is traced, it is NaN then.
    """
    if given is None:
        return default if config.gamma is None else config.gamma
    if config.gamma is None:
        return given
    if isinstance(given, jax.core.Tracer):
        return jnp.where(given == config.gamma, given, jnp.nan)
    if np.shape(given) == () and config.gamma != nonnegative_scalar("localization", given):
        raise ConfigError(
            f"gamma is given twice and differs: {config.gamma} in the config, {float(given)} as "
            "argument. Drop it from the config."
        )
    return given


def check_dtype(config: VIConfig) -> Any:
    """Refuse a dtype that this process does not have; return that of the fit."""
    if config.dtype == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ConfigError(
            'dtype "float64" needs jax.config.update("jax_enable_x64", True) before any array is '
            "made."
        )
    return jnp.dtype(config.dtype)


def make_problem(
    center: Vector,
    data: AbstractData,
    nbeta: Any,
    localization: Any,
    config: VIConfig,
    name: str,
) -> Problem:
    """Assemble target and data, whose floats are in the dtype of the fit."""
    config.check_against(center.size, data.num_data)
    nbeta, gamma = positive_scalar(name, nbeta), nonnegative_scalar("localization", localization)
    posterior = LocalPosterior(
        center, jnp.asarray(nbeta, center.dtype), jnp.asarray(gamma, center.dtype)
    )
    return Problem(posterior, data, config.batch_size or min(DEFAULT_BATCH_SIZE, data.num_data))


def check_count(name: str, value: Any) -> int:
    """Return an integer of at least 1."""
    # To Python a bool is an int.
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ConfigError(
            f"{name} must be an integer >= 1; got {value!r} ({type(value).__name__})."
        )
    return int(value)


def _scalar(name: str, value: Any, rule: str, holds: Callable[[Any], Any]) -> Any:
    """Check a number; a traced one is NaN where it turns out to be out of range."""
    if isinstance(value, jax.core.Tracer) and value.shape == ():
        # Integers have no NaN.
        value = value.astype(jnp.result_type(value, jnp.float32))
        return jnp.where(jnp.isfinite(value) & holds(value), value, jnp.nan)
    # Texts and booleans convert to float, but are mistakes.
    if isinstance(value, (bool, str)) or value is None or np.shape(value) != ():
        raise ConfigError(f"{name} must be a number {rule}; got {described(value)}.")
    number = float(value)
    if not (math.isfinite(number) and holds(number)):
        raise ConfigError(f"{name} must be a number {rule}; got {number}.")
    return number


def positive_scalar(name: str, value: Any) -> Any:
    """Return a positive number, or NaN for a traced one that is not."""
    return _scalar(
        name, value, "> 0 (for example 1/log(n) for beta, n/log(n) for nbeta)", lambda x: x > 0
    )


def nonnegative_scalar(name: str, value: Any) -> Any:
    """Return a number of at least 0, or NaN for a traced one that is not."""
    return _scalar(name, value, ">= 0", lambda x: x >= 0)


def flat_vector(wstar: Any, dtype: Any) -> Float[Array, " dim"]:
    """Return w* in the dtype of the fit."""
    if (
        np.ndim(wstar) != 1
        or not np.size(wstar)
        or not jnp.issubdtype(jnp.result_type(wstar), jnp.floating)
    ):
        raise DataError(
            f"wstar_flat must be a floating-point vector of shape (dim,); got {described(wstar)}."
        )
    if not isinstance(wstar, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(wstar))):
        raise DataError(
            "wstar_flat holds NaN or infinity; the centre must be finite. Did training diverge?"
        )
    return jnp.asarray(wstar).astype(dtype)


def whitener_scale(whitener: Any, center: Float[Array, " dim"]) -> Float[Array, " dim"] | None:
    """Read S^{-1} off a whitener; a scalar A_sqrt is the identity."""
    if whitener is None:
        return None
    root = getattr(whitener, "A_sqrt", None)
    if root is None or np.shape(root) not in ((), center.shape):
        raise ConfigError(
            f"whitener.A_sqrt must have shape () or {center.shape}; got "
            f"{'no such attribute' if root is None else np.shape(root)}."
        )
    if np.shape(root) == ():
        return None
    # The overall scale of q is found by the start.
    return normalized_scale(jnp.asarray(root, center.dtype) ** 2)
