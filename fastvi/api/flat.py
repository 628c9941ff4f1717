"""`fit` and `run_vi`: the contracts of a sampler backend, in flat coordinates."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._modes import in_own_modes
from fastvi._typing import Array, Batch, Float, Given, Keys
from fastvi.api.arguments import (
    check_count,
    check_dtype,
    choose_localization,
    flat_vector,
    make_problem,
    positive_scalar,
    whitener_scale,
)
from fastvi.api.plan import family_choice, fit_schedule, fit_settings, with_control_variate
from fastvi.config import VIConfig
from fastvi.fitting.run import Fit, run_fit
from fastvi.fitting.stages import programs_for
from fastvi.kernels.noise import split_key
from fastvi.observables.draws import FittedQ
from fastvi.results.flat import SamplerRunResult
from fastvi.results.work import RunWork, count_work
from fastvi.target.containers import hold_data
from fastvi.target.data import Problem, hold
from fastvi.target.keys import as_key
from fastvi.target.look import look_at_target
from fastvi.target.objective import FlatObjective, make_flat_objective


@jax.tree_util.register_static
class _StaticText(str):
    """Text inside a result that `jax.jit` may return: a pytree node without leaves."""


@in_own_modes
def fit(
    *,
    rng_key: Any,
    objective: Given[FlatObjective],
    wstar_flat: Given[Float[Array, " dim"]],
    data: Given[Batch],
    n_data: Given[int],
    beta: Any,
    gamma: Any = None,
    vi_cfg: Any = None,
    whitener: Any = None,
    loss_full_flat: Given[Callable[..., Array] | None] = None,
) -> dict[str, Any]:
    """Fit one chain in flat coordinates: the contract of a sampler backend.

    Fixed number of steps, one gradient a step unless `samples_per_step` says otherwise; works
    plainly and inside `jax.jit` and `jax.vmap` over `rng_key`. A fit that is not finite returns NaN
    and `result_code` 1; so does one whose beta or gamma is traced and turns out to be impossible.

    Args:
        rng_key: Typed or legacy jax key, or an int.
        objective: Mean loss per example and its gradient on a flat vector and a batch.
        wstar_flat: w*, shape (dim,).
        data: Pytree of arrays with `n_data` examples, or what is read into memory as such.
        n_data: Number of examples n.
        beta: Inverse temperature.
        gamma: Strength of the localizer; `gamma` of the configuration when left out, one of the two
            must be given.
        vi_cfg: Anything `VIConfig.create` reads.
        whitener: Object with `A_sqrt`, shape (dim,) or (): a diagonal geometry of which the shape
            is used.
        loss_full_flat: `(w) -> L_n(w)` or `(w, data) -> L_n(w)`; the objective on `data` in chunks
            when left out.

    Returns:
        lambda_hat (); traces, each (steps,); extras with Eq_Ln, Ln_wstar, Eq_Ln_mc, Eq_Ln_cv,
        llc_sem (Monte Carlo under this q alone), elbo, pi, D_sqrt, result_code, cv_info and q (a
        `FittedQ` of flat vectors, to draw from); timings in seconds (zero under a trace); work.

    Raises:
        ConfigError: If an option is unknown or impossible.
        DataError: If the data, w* or the objective cannot be used.

    Cost:
        `steps` times `samples_per_step` gradients on `batch_size` examples, `eval_samples` losses
        on all data, and the curvature of the start; `work` counts them.
    """
    problem, config = _pose(wstar_flat, data, n_data, beta, gamma, VIConfig.create(vi_cfg))
    run = _run(objective, problem, config, as_key(rng_key)[None], loss_full_flat, whitener)
    # There is one chain, whose axis goes.
    llc, traces, extras = jax.tree_util.tree_map(
        lambda leaf: leaf[0], (run.llc, run.traces, run.extras)
    )
    return {
        "lambda_hat": llc,
        "traces": traces,
        "extras": {**extras, "q": run.q},
        "timings": _stage_seconds(run),
        "work": {"sampler_flavour": _StaticText(config.family), **run.work._asdict()},
    }


@in_own_modes
def run_vi(
    key: Any,
    posterior: Any,
    data: Given[Batch],
    config: Any,
    num_chains: Given[int],
    loss_minibatch_flat: Given[Callable[[Float[Array, " dim"], Batch], Array]],
    grad_loss_minibatch: Given[Callable[[Float[Array, " dim"], Batch], Array] | None],
    loss_full_flat: Given[Callable[..., Array]],
    n_data: Given[int | None] = None,
    beta: Any = None,
    gamma: Any = None,
) -> SamplerRunResult:
    """Run several chains of `fit` under the contract of a sampler.

    Args:
        key: Typed or legacy key, or an int.
        posterior: Object with `flat0`, the centre w* of shape (dim,), or that vector itself.
        data: Pytree of arrays with a common leading axis, or what is read into memory as such.
        config: Anything `VIConfig.create` reads.
        num_chains: Number of independent chains, vmapped.
        loss_minibatch_flat: `(w, batch) -> mean loss`.
        grad_loss_minibatch: Its gradient, or None for autodiff.
        loss_full_flat: `(w) -> L_n(w)` or `(w, data) -> L_n(w)`.
        n_data: Number of examples; read off the data when left out.
        beta: Inverse temperature, required.
        gamma: Strength of the localizer; `gamma` of the configuration when left out, one of the two
            must be given.

    Returns:
        Traces (chains, steps): those of `fit` and, repeated along steps, llc, Eq_Ln_mc, Eq_Ln_cv,
        variance_reduction, acceptance_rate, energy (the ELBO) and is_divergent. Ln is NaN: VI does
        not sample it.

    Raises:
        ConfigError: If beta or gamma is missing, or an option is impossible or has no effect here.
        DataError: If the data cannot be used.

    Cost:
        That of `fit` for each chain; all of them are in memory at once.
    """
    settings = VIConfig.create(config)
    for name, value in (("beta", beta), ("gamma", choose_localization(gamma, settings))):
        if value is None:
            raise ConfigError(
                f"{name} must be given to run_vi; got None. Use beta=1/log(n) and gamma=1 to "
                "begin with."
            )
    began = time.perf_counter()
    check_count("num_chains", num_chains)
    objective = make_flat_objective(loss_minibatch_flat, grad_loss_minibatch)
    data, num_data = hold_data(data, n_data)
    problem, filled = _pose(
        getattr(posterior, "flat0", posterior), data, num_data, beta, gamma, settings
    )
    run = _run(objective, problem, filled, split_key(as_key(key), num_chains), loss_full_flat)
    return SamplerRunResult(
        traces=_sampler_traces(run),
        timings={**_stage_seconds(run), "total": time.perf_counter() - began},
        work={
            "sampler_flavour": filled.family,
            **run.work._asdict(),
            "lambda_hat_mean": float(jnp.mean(run.llc)),
            "lambda_hat_std": float(jnp.std(run.llc)),
            "Eq_Ln_mean": float(jnp.mean(run.extras["Eq_Ln"])),
            "Eq_Ln_std": float(jnp.std(run.extras["Eq_Ln"])),
            "Ln_wstar": float(run.extras["Ln_wstar"][0]),
            "beta": float(beta),
            "n_data": num_data,
            "steps": filled.steps,
        },
    )


def _sampler_traces(run: "_Run") -> dict[str, Any]:
    """Return the traces that the contract of a sampler names; what has one value is repeated."""
    elbo = run.traces["elbo"]
    values = {"llc": run.llc, **run.extras["cv_info"]}
    repeated = {
        name: jnp.broadcast_to(value[:, None], elbo.shape)
        for name, value in values.items()
        if name != "trace_term"
    }
    return {
        **run.traces,
        **repeated,
        # made on the host: no NaN that jax_debug_nans looks for
        "Ln": jax.device_put(np.full(elbo.shape, np.nan, elbo.dtype)),
        "acceptance_rate": jnp.ones(elbo.shape, elbo.dtype),
        "energy": elbo,
        "is_divergent": ~jnp.isfinite(elbo),
    }


def _stage_seconds(run: "_Run") -> dict[str, float]:
    """Return the seconds of the two stages that the contracts name."""
    return {
        "adaptation": run.seconds["adaptation"],
        "sampling": run.seconds["sampling"] + run.seconds["evaluation"],
    }


class _Run(NamedTuple):
    """Finished chains: all arrays have a leading axis of chains."""

    llc: Float[Array, " chains"]
    traces: dict[str, Array]
    extras: dict[str, Any]
    seconds: dict[str, float]
    work: RunWork
    q: FittedQ


def _run(
    objective: Given[FlatObjective],
    problem: Problem,
    config: VIConfig,
    chain_keys: Keys,
    loss_full_flat: Given[Callable[..., Array] | None],
    whitener: Any = None,
) -> _Run:
    """Look at the objective, run all steps, and collect what the contracts name."""
    center = problem.posterior.center
    problem, look, loss = look_at_target(
        objective,
        problem,
        None,
        "objective",
        # The look may take a share of the passes over the data that the fit takes.
        budget_fge=config.steps * config.step_draws * problem.batch_size / problem.num_data,
        loss_full_flat=loss_full_flat,
        max_batch=config.max_batch,
    )
    # the look traces no loss on all data of the caller's own, which is one more to be traced
    known = loss if loss_full_flat is None else None
    finished = run_fit(
        programs_for(objective, problem, fit_settings(config), loss_full_flat, loss=known),
        problem,
        family_choice(config),
        fit_schedule(config),
        chain_keys,
        whitener_scale=whitener_scale(whitener, center),
    )
    work = count_work(finished, problem, config, chain_keys.size, look)
    shape = finished.traces["elbo"].shape
    steps = jnp.arange(1, shape[1] + 1, dtype=center.dtype)
    cumulative = jnp.broadcast_to(work.fge_per_step * steps, shape)
    return _Run(
        llc=finished.outcome.evaluation.llc,
        traces={
            name: jnp.asarray(trace)
            for name, trace in {**finished.traces, "cumulative_fge": cumulative}.items()
        },
        extras=_extras(finished, problem),
        seconds=finished.seconds,
        work=work,
        q=FittedQ(finished.family, finished.params, center),
    )


def _pose(
    wstar_flat: Any, data: Any, n_data: Any, beta: Any, gamma: Any, config: VIConfig
) -> tuple[Problem, VIConfig]:
    """Check the arguments; return target and data, and the configuration filled in for them."""
    dtype = check_dtype(config)
    _refuse_options_of_estimates(config)
    center = flat_vector(wstar_flat, dtype)
    held = hold(hold_data(data, check_count("n_data", n_data), dtype)[0])
    config = with_control_variate(
        config.replace(method="variational").applied(center.size), center.size
    )
    nbeta = positive_scalar("beta", beta) * held.num_data
    gamma = choose_localization(gamma, config)
    return make_problem(center, held, nbeta, gamma, config, "beta"), config.filled


def _refuse_options_of_estimates(config: VIConfig) -> None:
    """Refuse what `estimate_llc` alone can do."""
    refused = (
        (
            config.tensorboard,
            "tensorboard must be False in fit and run_vi, which write to no folder: pass what "
            "run_vi returns to fastvi.results.report.tensorboard.write_events(result, folder).",
        ),
        (
            config.method not in (None, "variational"),
            f"method must be 'variational' in fit and run_vi; got {config.method!r}. Use "
            "estimate_llc for it.",
        ),
        (
            config.early_stop,
            "early_stop must be off in fit, whose traces have a fixed length: use estimate_llc "
            "for it.",
        ),
    )
    for is_asked, message in refused:
        if is_asked:
            raise ConfigError(message)


def _extras(finished: Fit, problem: Problem) -> dict[str, Any]:
    """Collect values beside the estimate, each with a leading axis of chains."""
    evaluation, nbeta = finished.outcome.evaluation, problem.posterior.nbeta
    reference_loss = finished.outcome.reference_loss.astype(evaluation.llc.dtype)
    mean_loss = reference_loss + evaluation.llc / nbeta
    plain_loss = reference_loss + evaluation.llc_mc / nbeta
    # Nothing can be raised under a trace. NaN in either term makes the sum NaN.
    finite = jnp.isfinite(evaluation.llc + finished.traces["elbo"][:, -1])
    return {
        # The contract has two names for the corrected mean.
        "Eq_Ln": mean_loss,
        "Ln_wstar": jnp.broadcast_to(reference_loss, mean_loss.shape),
        "Eq_Ln_mc": plain_loss,
        "Eq_Ln_cv": mean_loss,
        "llc_sem": evaluation.llc_sem,
        "elbo": evaluation.elbo,
        "log_weight_sd": evaluation.log_weight_sd,
        "result_code": (~finite).astype(jnp.int32),
        "cv_info": {
            "Eq_Ln_mc": plain_loss,
            "Eq_Ln_cv": mean_loss,
            "variance_reduction": evaluation.variance_reduction,
            "trace_term": evaluation.trace_term,
        },
        **finished.outcome.arrays,
    }
