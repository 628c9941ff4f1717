"""The three entry points: `estimate_llc` for people, `fit` and `run_vi` for samplers' contracts."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._compile_clock import CLOCK
from fastvi._errors import ConfigError, DataError, NonFiniteError
from fastvi._typing import Array, Batch, Float, Key, PyTree
from fastvi.accounting import Work, count_work
from fastvi.config import VIConfig
from fastvi.diagnostics.health import Evidence, health_findings
from fastvi.geometry.start import rank_limit
from fastvi.geometry.whitening import normalized_scale
from fastvi.inference.driver import Fit, Progress, run_fit
from fastvi.inference.loop import Problem
from fastvi.inference.programs import programs_for
from fastvi.inference.schedule import elbo_trend
from fastvi.objective import FlatObjective, check_data, check_loss, make_flat_objective, ravel_loss
from fastvi.posterior import LocalPosterior
from fastvi.progress import StatusLine
from fastvi.result import LLCEstimate

DEFAULT_BATCH_SIZE = 256


def estimate_llc(
    loss_fn: Callable[[PyTree, Batch], Any],
    params: PyTree,
    data: Batch,
    *,
    key: Any = 0,
    nbeta: float | None = None,
    localization: float = 1.0,
    config: Any = None,
    num_chains: int = 4,
    progress: bool | Callable[[Progress], None] = True,
    throw: bool = True,
    **overrides: Any,
) -> LLCEstimate:
    """Estimate the local learning coefficient of a trained model.

    Fits q to `exp(-nbeta L_n(w) - localization/2 |w - w*|^2)` by variational inference on several independent
    chains and returns lambda-hat = nbeta (E_q[L_n(w)] - L_n(w*)), its error, and findings on whether to believe
    it. Variational values are upper estimates at singular points; a finding says so where it applies.

    Args:
        loss_fn: `(params, batch) -> mean loss per example`, in nats.
        params: Trained parameters w*, any pytree with floating-point arrays.
        data: Pytree of arrays with a common leading axis of examples; `batch` has the same structure.
        key: An int seed or a jax random key.
        nbeta: n times the inverse temperature; n / log n when left out.
        localization: Strength gamma of the Gaussian that ties w to w*, in model coordinates.
        config: A `VIConfig`, or anything `VIConfig.create` reads.
        num_chains: Independent fits; two or more let `llc_sem` see the spread of the fits.
        progress: Whether to show a status line on stderr, or a function that receives `Progress`.
        throw: Whether to raise when the fit or the evaluation is not finite; otherwise a finding says so.
        **overrides: Fields of `VIConfig`.

    Returns:
        The estimate; `print(estimate.summary())`.

    Raises:
        ConfigError: If an option is unknown or impossible.
        DataError: If the data, the parameters or the loss cannot be used.
        NonFiniteError: If NaN or infinity appears, unless `throw` is False.

    Cost:
        `estimate.work`; with n = 1,797 and the defaults 1,000 to 6,000 full gradients for all chains.

    References:
        Lau et al., The Local Learning Coefficient (2024).

    Example:
        >>> import jax.numpy as jnp
        >>> from fastvi import estimate_llc
        >>> data = (jnp.ones((100, 1)),)
        >>> result = estimate_llc(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(4), data, progress=False)
        >>> round(result.llc, 1)
        1.9
    """
    began, compiled = time.perf_counter(), CLOCK.seconds
    settings = VIConfig.create(config, **overrides)
    _check_count("num_chains", num_chains)
    dtype = _check_settings(settings, localization)
    objective, center = ravel_loss(loss_fn, params, dtype)
    data, num_data = check_data(data)
    if nbeta is None:
        if num_data < 2:
            raise DataError("nbeta defaults to n / log n, which needs at least 2 examples; got 1. Pass nbeta.")
        nbeta = num_data / math.log(num_data)
    problem = _problem(center, data, num_data, nbeta, localization, settings, "nbeta")
    check_loss(objective, center, jax.tree_util.tree_map(lambda leaf: leaf[: problem.batch_size], problem.data))
    num_draws = _draws_per_step(settings, 2)
    key_start, key_chains = jax.random.split(as_key(key))
    status = StatusLine() if progress is True else None
    fit = run_fit(
        programs_for(objective, settings, num_draws, None),
        problem,
        settings,
        key_start,
        jax.random.split(key_chains, num_chains),
        early_stop=settings.early_stop is not False,
        report=status or (progress if callable(progress) else None),
    )
    if status is not None:
        status.close()
    timings = {**fit.seconds, "compile": CLOCK.seconds - compiled, "total": time.perf_counter() - began}
    result = _estimate(fit, problem, settings, count_work(fit, problem, settings, num_draws, num_chains), timings)
    if throw and result.health and result.health[0].name == "non_finite":
        raise NonFiniteError(f"{result.health[0]} Pass throw=False to get the partial result.")
    return result


def _estimate(fit: Fit, problem: Problem, config: VIConfig, work: Work, timings: dict[str, float]) -> LLCEstimate:
    """Move a finished fit to the host and interpret it."""
    outcome, start = jax.device_get(fit.outcome), jax.device_get(fit.start)
    evaluation = outcome.evaluation
    traces = {name: np.asarray(trace) for name, trace in fit.traces.items()}
    steps = traces["elbo"].shape[1]
    traces["cumulative_fge"] = np.broadcast_to(work.fge_per_step * np.arange(1, steps + 1), traces["elbo"].shape)
    chains = evaluation.llc.size
    within = float(np.sqrt(np.mean(evaluation.llc_sem.astype(float) ** 2) / chains))
    between = float(np.std(evaluation.llc, ddof=1) / np.sqrt(chains)) if chains > 1 else 0.0
    trend = elbo_trend(traces["elbo"])
    posterior = problem.posterior
    evidence = Evidence(
        llc_per_chain=np.asarray(evaluation.llc, float),
        llc_sem_per_chain=np.asarray(evaluation.llc_sem, float),
        elbo=traces["elbo"],
        virial=traces["virial"][:, -max(1, min(steps // 4, 500)) :].mean(axis=0),
        log_weight_sd=np.asarray(evaluation.log_weight_sd, float),
        elbo_gain=trend.gain,
        elbo_gain_error=trend.error,
        converged=fit.converged,
        rank=int(start.rank),
        wanted_rank=int(start.wanted_rank),
        rank_limit=rank_limit(config, posterior.center.size, posterior.center.dtype.itemsize),
        newton_decrement=float(start.newton_decrement),
    )
    return LLCEstimate(
        llc=float(np.mean(evaluation.llc)),
        llc_sem=max(within, between),
        llc_per_chain=evidence.llc_per_chain,
        llc_sem_per_chain=evidence.llc_sem_per_chain,
        elbo=float(np.mean(evaluation.elbo)),
        init_loss=float(outcome.reference_loss),
        nbeta=float(posterior.nbeta),
        localization=float(posterior.gamma),
        n_data=problem.num_data,
        dim=posterior.center.size,
        converged=fit.converged,
        curvature={
            "rank": int(start.rank),
            "wanted_rank": int(start.wanted_rank),
            "explained": float(start.explained),
            "trace": float(start.trace),
            "spectrum": np.asarray(start.spectrum, float)[: max(int(start.num_hvp), 0)].tolist(),
            "newton_decrement": float(start.newton_decrement),
        },
        evaluation={
            name: np.asarray(getattr(evaluation, name), float).tolist()
            for name in ("elbo", "llc_mc", "variance_reduction", "trace_term", "log_weight_sd")
        },
        work=work.as_dict(),
        timings=timings,
        traces=traces,
        log_weights=np.asarray(evaluation.log_weight),
        health=health_findings(evidence),
        config=config,
    )


class _StaticText(str):
    """Text inside a result that `jax.jit` may return: a pytree node without leaves."""


jax.tree_util.register_static(_StaticText)


def fit(
    *,
    rng_key: Any,
    objective: FlatObjective,
    wstar_flat: Float[Array, " dim"],
    data: Batch,
    n_data: int,
    beta: Any,
    gamma: Any,
    vi_cfg: Any = None,
    whitener: Any = None,
    loss_full_flat: Callable[[Float[Array, " dim"]], Array] | None = None,
) -> dict[str, Any]:
    """Fit one chain in flat coordinates: the contract of a sampler backend.

    Fixed number of steps, one gradient a step unless `samples_per_step` says otherwise; works plainly and inside
    `jax.jit` and `jax.vmap` over `rng_key`. A fit that is not finite returns NaN and `result_code` 1.

    Args:
        rng_key: Typed or legacy jax key, or an int.
        objective: Mean loss per example and its gradient on a flat vector and a batch.
        wstar_flat: w*, shape (dim,).
        data: Pytree of arrays with `n_data` examples.
        n_data: Number of examples n.
        beta: Inverse temperature.
        gamma: Strength of the localizer.
        vi_cfg: Anything `VIConfig.create` reads.
        whitener: Object with `A_sqrt`, shape (dim,) or (): a diagonal geometry of which the shape is used.
        loss_full_flat: `(w) -> L_n(w)`; the objective on `data` in chunks when left out.

    Returns:
        lambda_hat (); traces, each (steps,); extras with Eq_Ln, Ln_wstar, Eq_Ln_mc, Eq_Ln_cv, llc_sem, elbo, pi,
        D_sqrt, result_code, cv_info; timings in seconds (zero under a trace); work.

    Raises:
        ConfigError: If an option is unknown or impossible.
        DataError: If the data, w* or the objective cannot be used.
    """
    config = VIConfig.create(vi_cfg)
    dtype = _check_settings(config, gamma)
    if config.early_stop:
        raise ConfigError("early_stop must be off in fit, whose traces have a fixed length: use estimate_llc for it.")
    center = _flat_vector(wstar_flat, dtype)
    data, num_data = check_data(data, _check_count("n_data", n_data))
    nbeta = _positive_scalar("beta", beta) * num_data
    problem = _problem(center, data, num_data, nbeta, gamma, config, "beta")
    check_loss(
        objective,
        center,
        jax.tree_util.tree_map(lambda leaf: leaf[: problem.batch_size], problem.data),
        "objective",
    )
    num_draws = _draws_per_step(config, 1)
    key = as_key(rng_key)
    finished = run_fit(
        programs_for(objective, config, num_draws, loss_full_flat),
        problem,
        config,
        jax.random.fold_in(key, 0),
        jax.random.fold_in(key, 1)[None],
        whitener_scale=_whitener_scale(whitener, center),
    )
    work = count_work(finished, problem, config, num_draws, 1)
    first = jax.tree_util.tree_map(lambda leaf: leaf[0], (finished.outcome.evaluation, finished.outcome.arrays))
    evaluation, arrays = first
    reference_loss = finished.outcome.reference_loss.astype(dtype)
    traces = {name: trace[0] for name, trace in finished.traces.items()}
    traces["cumulative_fge"] = work.fge_per_step * jnp.arange(1, config.steps + 1, dtype=dtype)
    to_loss = 1 / problem.posterior.nbeta
    mean_loss, plain_loss = (
        reference_loss + evaluation.llc * to_loss,
        reference_loss + evaluation.llc_mc * to_loss,
    )
    return {
        "lambda_hat": evaluation.llc,
        "traces": traces,
        "extras": {
            "Eq_Ln": mean_loss,
            "Ln_wstar": reference_loss,
            "Eq_Ln_mc": plain_loss,
            "Eq_Ln_cv": mean_loss,
            "llc_sem": evaluation.llc_sem,
            "elbo": evaluation.elbo,
            "log_weight_sd": evaluation.log_weight_sd,
            "result_code": (~jnp.isfinite(evaluation.llc + traces["elbo"][-1])).astype(jnp.int32),
            "cv_info": {
                "Eq_Ln_mc": plain_loss,
                "Eq_Ln_cv": mean_loss,
                "variance_reduction": evaluation.variance_reduction,
                "trace_term": evaluation.trace_term,
            },
            **arrays,
        },
        "timings": {
            "adaptation": finished.seconds["adaptation"],
            "sampling": finished.seconds["sampling"] + finished.seconds["evaluation"],
        },
        "work": {"sampler_flavour": _StaticText(config.family), **work.as_dict()},
    }


class SamplerRunResult(NamedTuple):
    """What `run_vi` returns: traces of shape (chains, steps), seconds, counts."""

    traces: dict[str, Array]
    timings: dict[str, float]
    work: dict[str, Any]


def run_vi(
    key: Any,
    posterior: Any,
    data: Batch,
    config: Any,
    num_chains: int,
    loss_minibatch_flat: Callable[[Float[Array, " dim"], Batch], Array],
    grad_loss_minibatch: Callable[[Float[Array, " dim"], Batch], Array] | None,
    loss_full_flat: Callable[..., Array],
    n_data: int | None = None,
    beta: Any = None,
    gamma: Any = None,
) -> SamplerRunResult:
    """Run several chains of `fit` under the contract of a sampler.

    Args:
        key: Typed or legacy key, or an int.
        posterior: Object with `flat0`, the centre w* of shape (dim,), or that vector itself.
        data: Pytree of arrays with a common leading axis.
        config: Anything `VIConfig.create` reads.
        num_chains: Number of independent chains, vmapped.
        loss_minibatch_flat: `(w, batch) -> mean loss`.
        grad_loss_minibatch: Its gradient, or None for autodiff.
        loss_full_flat: `(w) -> L_n(w)`.
        n_data: Number of examples; read off the data when left out.
        beta: Inverse temperature, required.
        gamma: Strength of the localizer, required.

    Returns:
        Traces (chains, steps): those of `fit` and, repeated along steps, llc, Eq_Ln_mc, Eq_Ln_cv,
        variance_reduction, acceptance_rate, energy (the ELBO) and is_divergent. Ln is NaN: VI does not sample it.

    Raises:
        ConfigError: If beta or gamma is missing or an option impossible.
        DataError: If the data cannot be used.
    """
    for name, value in (("beta", beta), ("gamma", gamma)):
        if value is None:
            raise ConfigError(f"{name} must be given to run_vi; got None. Use beta=1/log(n) and gamma=1 to begin with.")
    began = time.perf_counter()
    _check_count("num_chains", num_chains)
    data, num_data = check_data(data, n_data)
    center = getattr(posterior, "flat0", posterior)
    objective = make_flat_objective(loss_minibatch_flat, grad_loss_minibatch)
    keys = jax.random.split(as_key(key), num_chains)

    def one_chain(chain_key: Key):
        result = fit(
            rng_key=chain_key,
            objective=objective,
            wstar_flat=center,
            data=data,
            n_data=num_data,
            beta=beta,
            gamma=gamma,
            vi_cfg=config,
            loss_full_flat=loss_full_flat,
        )
        return result["lambda_hat"], result["traces"], result["extras"], result["work"]

    llc, traces, extras, work = jax.block_until_ready(jax.jit(jax.vmap(one_chain))(keys))
    shape = traces["elbo"].shape
    control = {name: value for name, value in extras["cv_info"].items() if name != "trace_term"}
    repeated = {name: jnp.broadcast_to(value[:, None], shape) for name, value in {"llc": llc, **control}.items()}
    settings = VIConfig.create(config)
    return SamplerRunResult(
        traces={
            **traces,
            **repeated,
            "Ln": jnp.full(shape, jnp.nan, traces["elbo"].dtype),
            "acceptance_rate": jnp.ones(shape, traces["elbo"].dtype),
            "energy": traces["elbo"],
            "is_divergent": ~jnp.isfinite(traces["elbo"]),
        },
        timings={
            "adaptation": 0.0,
            "sampling": time.perf_counter() - began,
            "total": time.perf_counter() - began,
        },
        work={
            **{
                k: (
                    str(v)
                    if isinstance(v, str)
                    else float(np.mean(v))
                    if k.startswith(("fge", "total"))
                    else int(np.mean(v))
                )
                for k, v in work.items()
            },
            "lambda_hat_mean": float(jnp.mean(llc)),
            "lambda_hat_std": float(jnp.std(llc)),
            "Eq_Ln_mean": float(jnp.mean(extras["Eq_Ln"])),
            "Eq_Ln_std": float(jnp.std(extras["Eq_Ln"])),
            "Ln_wstar": float(extras["Ln_wstar"][0]),
            "beta": float(beta),
            "n_data": num_data,
            "steps": settings.steps,
        },
    )


def as_key(key: Any) -> Any:
    """Accept an int seed, a legacy uint32 key or a typed key.

    Raises:
        ConfigError: If it is none of these.
    """
    if isinstance(key, (int, np.integer)):
        if isinstance(key, bool):
            raise ConfigError(f"key must be an int or a jax random key; got {_describe(key)}.")
        return jax.random.key(int(key))
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if typed and shape == ():
        return key
    if dtype is not None and not typed and dtype == np.uint32 and shape == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")
    raise ConfigError(f"key must be an int, jax.random.key(...) or jax.random.PRNGKey(...); got {_describe(key)}.")


def _describe(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array {value.dtype}{list(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def _check_settings(config: VIConfig, localization: Any) -> Any:
    """Refuse what this release or this process cannot do; return the dtype of the fit."""
    config.check_available()
    if (
        config.gamma is not None
        and not isinstance(localization, jax.core.Tracer)
        and config.gamma != float(localization)
    ):
        raise ConfigError(
            f"gamma is given twice and differs: {config.gamma} in the config, {float(localization)} as argument. "
            "Drop it from the config."
        )
    if config.dtype == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ConfigError('dtype "float64" needs jax.config.update("jax_enable_x64", True) before any array is made.')
    return jnp.dtype(config.dtype)


def _problem(center, data, num_data, nbeta, localization, config: VIConfig, name: str) -> Problem:
    """Assemble target and data in the dtype of the fit."""
    dtype = center.dtype
    config.check_against(center.size, num_data)
    nbeta, gamma = _positive_scalar(name, nbeta), _nonnegative_scalar("localization", localization)
    cast = jax.tree_util.tree_map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, data
    )
    posterior = LocalPosterior(center, jnp.asarray(nbeta, dtype), jnp.asarray(gamma, dtype))
    return Problem(posterior, cast, num_data, config.batch_size or min(DEFAULT_BATCH_SIZE, num_data))


def _draws_per_step(config: VIConfig, default: int) -> int:
    return default if config.samples_per_step is None else config.samples_per_step


def _check_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ConfigError(f"{name} must be an integer >= 1; got {value!r} ({type(value).__name__}).")
    return int(value)


def _scalar(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> Any:
    """Check a number; one that is being traced can only be checked for its shape."""
    if isinstance(value, jax.core.Tracer) and value.shape == ():
        return value
    if isinstance(value, (bool, str)) or value is None or np.shape(value) != ():
        raise ConfigError(f"{name} must be a number {rule}; got {_describe(value)}.")
    number = float(value)
    if not (math.isfinite(number) and holds(number)):
        raise ConfigError(f"{name} must be a number {rule}; got {number}.")
    return number


def _positive_scalar(name: str, value: Any) -> Any:
    return _scalar(name, value, "> 0 (for example 1/log(n) for beta, n/log(n) for nbeta)", lambda x: x > 0)


def _nonnegative_scalar(name: str, value: Any) -> Any:
    return _scalar(name, value, ">= 0", lambda x: x >= 0)


def _flat_vector(wstar: Any, dtype: Any) -> Float[Array, " dim"]:
    if np.ndim(wstar) != 1 or not np.size(wstar) or not jnp.issubdtype(jnp.result_type(wstar), jnp.floating):
        raise DataError(f"wstar_flat must be a floating-point vector of shape (dim,); got {_describe(wstar)}.")
    if not isinstance(wstar, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(wstar))):
        raise DataError("wstar_flat holds NaN or infinity; the centre must be finite. Did training diverge?")
    return jnp.asarray(wstar).astype(dtype)


def _whitener_scale(whitener: Any, center: Float[Array, " dim"]) -> Float[Array, " dim"] | None:
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
