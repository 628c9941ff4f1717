"""Checks of what callers pass to the entry points: the rule, what came, the likely fix."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._typing import Array, Float
from fastvi.config import VIConfig
from fastvi.evaluation.control_variate import pairs_for
from fastvi.evaluation.stein import even_monomials
from fastvi.fitting.schedule import few_dimensions_factor
from fastvi.geometry.whitening import normalized_scale
from fastvi.target.data import AbstractData, Problem
from fastvi.target.keys import described
from fastvi.target.posterior import LocalPosterior

DEFAULT_BATCH_SIZE = 256
FLOW_STEP_DRAWS, FLOW_EVALUATION_DRAWS = (
    (8, 128),
    (64, 512),
)  # a flow on some, on all dimensions; at least
FAMILY_COLUMNS = 3  # control variates of each family's own, `AbstractFamily.control_variates`
MOST_STEP_GRADIENTS = 24  # full gradients of a step of one chain that draws beyond two may take
MAX_STEP_FACTOR, MAX_EVALUATION_FACTOR = 128, 32  # in few dimensions


def settle_localization(given: Any, config: VIConfig, default: float | None = None) -> Any:
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
            "argument. "
            "Drop it from the config."
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
    center: Float[Array, " dim"],
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
    batch_size = config.batch_size or min(DEFAULT_BATCH_SIZE, data.num_data)
    return Problem(posterior, data, batch_size)


def settle(config: VIConfig, dim: int, share: float) -> VIConfig:
    """Fill in the draws of a step and of the evaluation as `estimate_llc` takes them.

    More in few dimensions.

    The gradient of a flow that bends has noise even where it fits as well as it can, unlike that of
    a Gaussian. A minibatch of this share of the data bounds the draws, but for one or two
    dimensions, whose tails take them.
    """
    step, evaluation = config.samples_per_step, config.eval_samples
    draws = 2 * few_dimensions_factor(dim, MAX_STEP_FACTOR)
    if dim > 2:
        draws = max(2, min(draws, 2 * int(MOST_STEP_GRADIENTS / share / 2)))
    more = config.evaluation_draws * few_dimensions_factor(dim, MAX_EVALUATION_FACTOR)
    if config.family == "flow":
        whole = config.family_settings.latent_dim(dim) == dim
        draws, more = max(draws, FLOW_STEP_DRAWS[whole]), max(more, FLOW_EVALUATION_DRAWS[whole])
    return config.replace(
        samples_per_step=draws if step is None else step,
        eval_samples=more if evaluation is None else evaluation,
    )


def settle_evaluation(config: VIConfig, dim: int) -> VIConfig:
    """Leave the control variate out where the draws are too few to find its coefficients.

    Raises:
        ConfigError: If it was asked for.
    """
    wanted, pairs = config.control_variate or "auto", config.evaluation_draws // 2
    if wanted == "none":
        return config
    columns = 1 if wanted == "hvp" else even_monomials(dim, pairs).shape[0] or FAMILY_COLUMNS
    if pairs >= pairs_for(columns):
        return config.replace(control_variate=wanted)
    if config.control_variate is None:
        return config.replace(control_variate="none")
    raise ConfigError(
        f"control_variate={wanted!r} must have {2 * pairs_for(columns)} draws or more to find its "
        "coefficients from; "
        f'got eval_samples={config.eval_samples}: give more, or control_variate="none".'
    )


def check_count(name: str, value: Any) -> int:
    """Return an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ConfigError(
            f"{name} must be an integer >= 1; got {value!r} ({type(value).__name__})."
        )
    return int(value)


def _scalar(name: str, value: Any, rule: str, holds: Callable[[Any], Any]) -> Any:
    """Check a number; a traced one is NaN where it turns out to be out of range."""
    if isinstance(value, jax.core.Tracer) and value.shape == ():
        value = value.astype(jnp.result_type(value, jnp.float32))
        return jnp.where(jnp.isfinite(value) & holds(value), value, jnp.nan)
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
    return normalized_scale(jnp.asarray(root, center.dtype) ** 2)
