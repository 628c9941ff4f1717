"""`estimate_llc`: the learning coefficient of a trained model, for people."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import CompileWatch
from fastvi._devices import layout_for
from fastvi._errors import ConfigError, DataError, NonFiniteError
from fastvi._modes import in_own_modes
from fastvi._processes import agree, is_several
from fastvi._typing import Batch, Given, Key, PyTree
from fastvi._vectors import Leaves
from fastvi.api.arguments import (
    check_count,
    check_dtype,
    choose_localization,
    make_problem,
)
from fastvi.api.minimum import Minimum, look_at_minimum
from fastvi.api.plan import (
    DEFAULT_BATCH_SIZE,
    check_blocks,
    check_budget,
    default_budget,
    family_choice,
    fit_schedule,
    fit_settings,
    plan_estimate,
    start_settings,
    walk_budget,
)
from fastvi.api.resample import Fitted, correct_within, with_method
from fastvi.api.walk import (
    chooses_walk,
    estimate_by_walk,
    refuse_beside_walk,
    walks_divided,
    walks_without_fit,
)
from fastvi.config import VIConfig
from fastvi.evaluation.errors import ErrorParts, chain_error
from fastvi.evaluation.importance import assess_importance
from fastvi.fitting.protocols import Progress
from fastvi.fitting.run import Fit, Options, Snapshot, run_fit
from fastvi.fitting.schedule import elbo_trend
from fastvi.fitting.stages import Outcome, programs_for
from fastvi.geometry.minimum import rounding_nats
from fastvi.geometry.start import rank_limit
from fastvi.kernels.noise import split_key
from fastvi.results.early_end import EarlyEnd
from fastvi.results.estimate import MOST_SCALES, LLCEstimate, kept_scales
from fastvi.results.findings import Evidence, health_findings, with_stopped
from fastvi.results.parts import ChainValues, Curvature, DrawValues, Timings
from fastvi.results.progress import reporting, told_of_reading
from fastvi.results.resume import (
    AFTER_THE_FIT,
    CORRECTION,
    FIT,
    WALK,
    FitKeeper,
    ProgressFolder,
    StageFile,
    WalkKeeper,
    identify,
)
from fastvi.results.work import RunWork, count_work
from fastvi.sampling.ensemble import Target as SamplingTarget
from fastvi.sampling.from_localizer.walk import KEPT_OF_WALKS, TooStiff
from fastvi.sampling.keeping import NO_KEEPER
from fastvi.sampling.run import KEPT_OF_RUNS
from fastvi.target.checks import LossLook
from fastvi.target.containers import open_data
from fastvi.target.data import AbstractData, Problem, Window, hold
from fastvi.target.fingerprint import Fingerprint
from fastvi.target.inputs import check_data, is_stream, refuse_a_trace
from fastvi.target.keys import as_key
from fastvi.target.look import look_at_target
from fastvi.target.ravel import TreeObjective, TreeStructure, ravel_loss, split_loss
from fastvi.target.restrict import restrict
from fastvi.target.restricted import RestrictedLoss
from fastvi.target.stream import (
    AbstractStream,
    Feed,
    HostStream,
    feed_once,
    open_stream,
    uncorrected,
)

# Examples of an iterator that are looked at, and then walked on. Half of it leaves the mean weight
# of a weighted loss less sure by 1.4; double reads twice as many before anything is said.
FIRST_EXAMPLES = 512
SNAPSHOT_SCALES = 256  # entries of D^{1/2} in a snapshot
DEFAULT_LOCALIZATION = 1.0  # half of it lets walkers spread by sqrt(2) in flat directions


@in_own_modes
def estimate_llc(
    loss_fn: Given[Callable[[PyTree, Batch], Any]],
    params: PyTree,
    data: Given[Batch],
    *,
    key: Any = 0,
    nbeta: Given[float | None] = None,
    localization: Given[float | None] = None,
    config: Any = None,
    num_chains: Given[int | None] = None,
    progress: Given[bool | Callable[[Progress], None]] = True,
    throw: Given[bool] = True,
    param_mask: Any = None,
    resume_from: Given[str | os.PathLike[str] | None] = None,
    time_limit: Given[float | None] = None,
    **overrides: Any,
) -> LLCEstimate:
    """Estimate the local learning coefficient of a trained model.

    Averages over the local posterior `exp(-nbeta L_n(w) - localization/2 |w - w*|^2)` and returns
    lambda-hat = nbeta (E[L_n(w)] - L_n(w*)), its error, and findings on whether to believe it.

    By default q is fitted to the posterior by variational inference. Walkers then start at draws of
    q and sample the posterior itself. Importance weights on draws of q take their place where q is
    close enough. In many dimensions, on streams, and on budgets that pay for no fit, walkers start
    at the localizer and step on fresh minibatches, unless the posterior is too stiff for that.

    `llc` is the posterior's own value. `llc_vi` is that of q, which is too large at singular points
    and NaN where nothing was fitted. With `method="variational"` both are q's.

    Args:
        loss_fn: `(params, batch)` -> the mean loss of the batch's examples, in nats; or an array
            with one loss for each example or each of its tokens (batch axis first); or `(losses,
            weights)` of one such shape, for masks, padding and class weights: then `L_n =
            sum(weights * losses) / sum(weights)` over all data. n counts examples. State that it
            reads (attributes, globals, arrays) is read anew by each call, except by functions that
            jax itself keeps traced, as under `jax.jit`.
        params: Trained parameters w*, any pytree with floating-point arrays.
        data: Pytree of arrays with a common leading axis of examples; `batch` has the same
            structure. Or a table, a data set of examples, or a loader of such batches, which is
            read into memory up to 1 GiB and streamed above; or an iterator of shuffled batches,
            which is read once: then nbeta must be given. Walkers from the localizer step on
            streams. After a fit the methods are "variational" and "reweight", of an iterator
            "variational" alone, on a sample whose noise is part of `llc_sem`.
        key: An int seed or a jax random key.
        nbeta: n times the inverse temperature; n / log n when left out.
        localization: Strength gamma of the Gaussian that ties w to w*, in model coordinates;
            `gamma` of the configuration when left out, else 1.
        config: A `VIConfig`, or anything `VIConfig.create` reads.
        num_chains: Independent fits; two or more let `llc_vi_sem` see the spread of the fits. None
            means 4 where nothing corrects them, else 1.
        progress: Whether to show a status line on stderr, or a function that receives `Progress`.
        throw: Whether to raise when the fit or the evaluation is not finite; otherwise a finding
            says so.
        param_mask: Which parameters vary, see `fastvi.restrict`; all when left out.
        resume_from: Folder, or a `ProgressFolder`, in which the estimate keeps its progress and, if
            there is some, goes on from it, to the bits of one that was not interrupted. The data
            must be such as can be read again.
        time_limit: Seconds after which the estimate ends with what it has, and the larger error of
            that. It is looked at between rounds: what has begun to compile is waited for, and a fit
            that it has ended is still evaluated and walked on from for a round. Ctrl-C does the
            same at once, and pressed again raises KeyboardInterrupt.
        **overrides: Fields of `VIConfig`.

    Returns:
        The estimate; `print(estimate.summary())`.

    Raises:
        ConfigError: If an option is unknown or impossible, or has no effect beside the others.
        DataError: If the data, the parameters or the loss cannot be used: a loss that is not finite
            at w*, not a mean over examples, not deterministic, or at odds with its gradient.
        NonFiniteError: If NaN or infinity appears, unless `throw` is False.

    Cost:
        `estimate.work`; with the defaults some 3,000 to 100,000 sample gradients from the
        localizer, and after a fit 100 to 3,000 full gradients; never more than `budget`.

    References:
        Lau et al., The Local Learning Coefficient (2024).

    Examples:
        >>> import jax.numpy as jnp
        >>> from fastvi import estimate_llc
        >>> data = (jnp.ones((100, 1)),)
        >>> loss_fn = lambda w, batch: 0.5 * jnp.sum(w**2)
        >>> result = estimate_llc(loss_fn, jnp.zeros(4), data, progress=False)
        >>> round(result.llc, 1)
        1.9
    """
    refuse_a_trace(params, data, key, nbeta, localization)
    settings = VIConfig.create(config, **overrides)
    settings.check_asked(overrides)
    if param_mask is not None:
        loss_fn, params = restrict(loss_fn, params, param_mask)
    result = estimate_target(
        loss_fn,
        params,
        data,
        key,
        nbeta,
        localization,
        settings,
        num_chains=num_chains,
        progress=progress,
        throw=throw,
        resume_from=resume_from,
        time_limit=time_limit,
    )
    return result.of_masked(param_mask is not None)


def estimate_target(
    loss_fn: Given[Callable[..., Any]],
    params: PyTree,
    data: Any,
    key: Any,
    nbeta: Given[float | None],
    localization: Given[float | None],
    settings: VIConfig,
    *,
    num_chains: Given[int | None],
    progress: Given[bool | Callable[[Progress], None]],
    throw: Given[bool],
    resume_from: Given[str | os.PathLike[str] | None] = None,
    time_limit: Given[float | None] = None,
) -> LLCEstimate:
    """Estimate by a walk where that serves better, else by a fit; arguments of `estimate_llc`."""
    refuse_beside_walk(settings.sampler, [] if num_chains is None else ["num_chains"])
    # A walk makes no fits that there could be several of.
    may_walk = num_chains is None
    early_end = EarlyEnd(time_limit)
    with reporting(progress) as report:
        data = open_data(data, check_dtype(settings), report and told_of_reading(report))
    target = assemble(
        *(loss_fn, params, data, nbeta, localization, settings, as_key(key), may_walk),
        stays_divided=may_walk and walks_divided(settings),
    )
    del data  # which the device holds now
    folder = None if resume_from is None else _open_folder(resume_from, target.problem)
    with early_end.interruptible(tells=progress is True):
        if may_walk:
            target, result = _walk(target, progress, throw, folder, early_end)
            if result is not None:
                return result
        return run_estimate(
            target,
            num_chains,
            progress=progress,
            throw=throw,
            folder=folder,
            early_end=early_end,
        )


def _open_folder(given: Any, problem: Problem) -> ProgressFolder:
    """Return the folder of the progress of an estimate whose data can be read again."""
    if is_several():
        raise ConfigError(
            "resume_from keeps the progress of one process; got several. Leave it out, or run one "
            "process for each estimate."
        )
    if isinstance(problem.posterior.center, Leaves):
        raise ConfigError(
            "resume_from keeps parameters of one device; params are divided over several, and walk "
            "so. Leave it out, or pass jax.device_get(params) where they fit on one."
        )
    if problem.data.is_sample:
        raise DataError("resume_from needs data that can be read again; got an iterator.")
    return given if isinstance(given, ProgressFolder) else ProgressFolder(given)


def _walk(
    target: "Target",
    progress: bool | Callable[[Progress], None],
    throw: bool,
    folder: ProgressFolder | None,
    early_end: EarlyEnd,
) -> tuple["Target", LLCEstimate | None]:
    """Walk from the localizer where that serves better than a fit.

    Returns:
        The target, with the work of an attempt in its look, and the estimate if there is one.
    """
    objective, problem, config, key, stream, look, loss, feed = target
    num_data = None if problem.data.is_sample else problem.num_data
    budget = config.budget or walk_budget(num_data, problem.posterior.center.size)
    tries, must_walk = chooses_walk(problem, config, look)
    if feed is not None:
        # data that are read once leave nothing else: what was read is gone
        tries, must_walk = True, must_walk or problem.data.is_sample
    if not tries:
        return target, None
    try:
        keeper = NO_KEEPER
        if folder is not None:
            identity = identify(objective, problem, config, key)
            keeper = WalkKeeper(StageFile(folder, WALK, identity), KEPT_OF_WALKS)
        with reporting(progress) as report:
            found = estimate_by_walk(
                objective,
                problem,
                config.filled,
                key,
                look,
                loss,
                budget,
                must_walk,
                report,
                feed,
                keeper,
                early_end,
            )
    finally:
        if feed is not None:
            feed.close()
    if isinstance(found, TooStiff):
        # What the attempt has cost is counted as looking.
        spent = look._replace(sample_gradients=look.sample_gradients + found.work)
        if stream is not None:
            config = config.replace(method=uncorrected(config.method, stream.is_sample))
        return target._replace(look=spent, config=config), None
    if throw and _has(found, "non_finite"):
        raise NonFiniteError(f"{found.health[0]} Pass throw=False to get the partial result.")
    return target, found


class Target(NamedTuple):
    """What is estimated, checked; `config` is the one asked for, `loss` what the loss computes."""

    objective: TreeObjective
    problem: Problem
    config: VIConfig
    key: Key
    stream: AbstractStream | None
    look: LossLook
    loss: Fingerprint
    feed: Feed | None = None


def assemble(
    loss_fn: Given[Callable[..., Any]],
    params: PyTree,
    data: Any,
    nbeta: Given[float | None],
    localization: Given[float | None],
    config: VIConfig,
    key: Key,
    may_walk: bool = True,
    check_structure: Callable[[TreeStructure], None] | None = None,
    stays_divided: bool = False,
) -> Target:
    """Check loss, parameters and data, which `open_data` has opened, and put them together.

    `check_structure` sees the parameters before the loss does. Those that come divided over devices
    stay so where `stays_divided`; elsewhere they are gathered.
    """
    dtype = check_dtype(config)
    localization = choose_localization(localization, config, DEFAULT_LOCALIZATION)
    # without a localizer there is no walk, and weights beside the examples are on every device
    stays_divided &= bool(localization) and not isinstance(loss_fn, RestrictedLoss)
    divided = split_loss(loss_fn, params, dtype) if stays_divided else None
    objective, center = divided or ravel_loss(loss_fn, params, dtype)
    if check_structure is not None:
        check_structure(objective.structure)
    data, config, stream, feed = _read(
        data, dtype, key, config, may_walk and bool(localization), nbeta is None
    )
    if stream is None and feed is None and isinstance(objective.loss_fn, RestrictedLoss):
        data = dataclasses.replace(data, examples=objective.loss_fn.beside(data.examples))
    if divided is not None:
        data = dataclasses.replace(data, examples=layout_for(center).share(data.examples))
    num_data = data.num_data
    if nbeta is None:
        if num_data < 2:
            raise DataError(
                "nbeta defaults to n / log n, which needs at least 2 examples; got 1. Pass nbeta."
            )
        nbeta = num_data / math.log(num_data)
    config = config.applied(center.size)
    problem = make_problem(center, data, nbeta, localization, config, "nbeta")
    # minibatches of the size that the fit takes: the loss is then traced for both at once
    batch_size = plan_estimate(config, problem, None).config.batch_size
    problem = dataclasses.replace(problem, batch_size=batch_size)
    # The look counts in passes over the data.
    budget = (config.budget or default_budget(None if data.is_sample else num_data)) / num_data
    problem, look, loss = look_at_target(
        objective, problem, stream, "loss_fn", budget_fge=budget, max_batch=config.max_batch
    )
    return Target(objective, problem, config, key, stream, agree(look), loss, feed)


def _read(
    data: Any, dtype: Any, key: Key, config: VIConfig, may_walk: bool, wants_size: bool
) -> tuple[AbstractData, VIConfig, AbstractStream | None, Feed | None]:
    """Check the data; of a stream, read what a look needs and no more.

    Returns:
        The data on the device, the configuration, and what windows and batches come from.
    """
    if isinstance(data, AbstractData):
        return data, config, None, None
    if not is_stream(data):
        return hold(check_data(data, dtype=dtype)[0]), config, None, None
    is_once = isinstance(data, Iterator)
    if wants_size and is_once:
        raise DataError(
            "nbeta defaults to n / log n, and an iterator does not tell n: data can be read "
            "only once. Pass nbeta, or an object whose __iter__ begins anew each time."
        )
    walks = may_walk and walks_without_fit(config) and config.sampler.chosen_start != "fit"
    # A walk goes on where the look has stopped reading, and needs no second pass.
    if walks and is_once:
        feed = feed_once(data, dtype)
        first = feed.peek(FIRST_EXAMPLES)
        if first is None:
            raise DataError("data has no examples: the iterator of batches was empty.")
        on_device = hold(jax.tree_util.tree_map(jnp.asarray, first))
        if on_device.num_examples < FIRST_EXAMPLES:
            # All were read, which makes them data in memory.
            return on_device, config, None, None
        window = Window(on_device.examples, on_device.max_batch, FIRST_EXAMPLES, True)
        return window, config, None, feed
    stream = open_stream(data, dtype, key, config.batch_size or DEFAULT_BATCH_SIZE)
    if stream.fits:
        return stream.window(0), config, None, None
    if config.sampler.chosen_start == "fit":
        raise ConfigError(
            "walkers that start at a fit take gradients of blocks of all data, which a stream does "
            "not hold: pass arrays, or leave out sampler.start and sampler.gradients."
        )
    if walks and isinstance(stream, HostStream):
        return stream.window(0), config, stream, stream.feed()
    config = config.replace(method=uncorrected(config.method, stream.is_sample))
    return stream.window(0), config, stream, None


def run_estimate(
    target: Target,
    num_chains: Given[int | None] = None,
    *,
    progress: Given[bool | Callable[[Progress], None]] = True,
    throw: Given[bool] = True,
    folder: ProgressFolder | None = None,
    warm: Fitted | None = None,
    early_end: EarlyEnd = EarlyEnd(),
) -> LLCEstimate:
    """Fit, evaluate and correct, from the curvature at w* or from the q of another fit."""
    began = time.perf_counter()
    if num_chains is not None:
        check_count("num_chains", num_chains)
    objective, problem, settings, key, stream, look, loss, _ = target
    whole = plan_estimate(settings, problem, num_chains)
    # What can be refused is refused before anything compiles.
    check_budget(problem, whole, look, is_warm=warm is not None)
    check_blocks(problem, settings.sampler)
    plan, num_chains = whole
    early_stop = bool(plan.early_stop)
    keys = split_key(key, num_chains)
    keeper, identity = None, {}
    if folder is not None:
        identity = identify(objective, problem, plan, keys) | {"early_stop": early_stop}
        of_fit = {name: one for name, one in identity.items() if name not in AFTER_THE_FIT}
        keeper = FitKeeper(StageFile(folder, FIT, of_fit))
    stages = programs_for(objective, problem, fit_settings(plan), loss=loss)
    with CompileWatch() as watch, reporting(progress) as report:
        options = Options(
            early_stop,
            report,
            warm and warm.fit,
            keeper,
            stream,
            keeps_snapshots=plan.tensorboard,
            looks_down=True,
            # a run that will be refused for one lost chain need not go on
            ends_where=np.any if throw else np.all,
            ends=early_end,
        )
        fit = run_fit(
            stages, problem, family_choice(plan), fit_schedule(plan), keys, options=options
        )
        fit = _agreed(fit)
    timings = Timings(**fit.seconds, compile=watch.seconds, total=time.perf_counter() - began)
    where = SamplingTarget(objective, stages.loss, problem)
    minimum = look_at_minimum(where, fit, plan.evaluation_draws)
    work = count_work(fit, problem, plan, num_chains, look, minimum.losses)
    result = _estimate(fit, problem, plan, work, timings, minimum, look)
    is_whole = fit.converged or result.traces["elbo"].shape[1] >= fit_schedule(plan).steps
    if early_end.reason and not is_whole:
        result = dataclasses.replace(result, stopped=early_end.reason)
        result = dataclasses.replace(result, health=with_stopped(result))
    if throw and _has(result, "non_finite"):
        raise NonFiniteError(f"{result.health[0]} Pass throw=False to get the partial result.")
    result = dataclasses.replace(
        result, fitted=Fitted(fit, problem, objective, stages.loss, keys, warm and warm.previous)
    )
    # A q that is not finite has no draws to start at, and an improper posterior no mean.
    if plan.method == "variational" or _has(result, "non_finite", "improper_posterior"):
        return result
    recorded = with_method(result, plan.method, settings.error, settings.budget, settings.sampler)
    # without a budget of the whole, that of sampling is what its default says
    spent = 0.0 if settings.budget is None else result.work.total_fge * problem.num_data
    walk_keeper = NO_KEEPER
    if folder is not None:
        asked = recorded.to_dict()
        identity |= {name: asked[name] for name in AFTER_THE_FIT} | {"spent": spent}
        # of the same fit, what differs is what may
        file = StageFile(folder, CORRECTION, identity, begins_anew=True)
        walk_keeper = WalkKeeper(file, KEPT_OF_RUNS)
    return correct_within(
        result,
        recorded,
        spent,
        progress=progress,
        throw=throw,
        keeper=walk_keeper,
        early_end=early_end,
    )


def _agreed(fit: Fit) -> Fit:
    """Return the first process's fit, where several have made it."""
    found = fit.family, fit.params, fit.start, fit.outcome, fit.traces
    names = ("family", "params", "start", "outcome", "traces")
    return dataclasses.replace(fit, **dict(zip(names, agree(found), strict=True)))


def _has(result: LLCEstimate, *names: str) -> bool:
    return any(finding.name in names for finding in result.health)


def _estimate(
    fit: Fit,
    problem: Problem,
    config: VIConfig,
    work: RunWork,
    timings: Timings,
    minimum: Minimum,
    look: LossLook,
) -> LLCEstimate:
    """Move a finished fit to the host and interpret it."""
    outcome, start = jax.device_get(fit.outcome), fit.start
    evaluation = outcome.evaluation
    traces = {name: np.asarray(trace) for name, trace in fit.traces.items()}
    shape = traces["elbo"].shape
    traces["cumulative_fge"] = np.broadcast_to(
        work.fge_per_step * np.arange(1, shape[1] + 1), shape
    )
    # chains share the sample that data which are read once are evaluated on
    parts = ErrorParts(
        chain_error(evaluation.llc, evaluation.llc_sem), evaluation=float(outcome.data_error)
    )
    posterior = problem.posterior
    evidence = _evidence(fit, outcome, problem, config, traces, minimum, look)
    return LLCEstimate(
        llc=float(np.mean(evaluation.llc)),
        llc_sem=parts.total,
        error_parts=parts,
        llc_per_chain=evidence.llc_per_chain,
        llc_sem_per_chain=evidence.llc_sem_per_chain,
        elbo=float(np.mean(evaluation.elbo)),
        init_loss=float(outcome.reference_loss),
        nbeta=float(posterior.nbeta),
        localization=float(posterior.gamma),
        n_data=problem.num_data,
        dim=posterior.center.size,
        converged=fit.converged,
        curvature=Curvature(
            rank=int(start.rank),
            wanted_rank=int(start.wanted_rank),
            explained=float(start.explained),
            trace=float(start.trace),
            # The values beyond those computed are padding.
            spectrum=np.asarray(start.spectrum, float)[: int(start.num_values)].tolist(),
            newton_decrement=evidence.newton_decrement,
            # The localizer adds its strength to every curvature.
            lowest=minimum.bottom.curvature + float(posterior.gamma),
            products=minimum.products,
        ),
        evaluation=ChainValues(
            *(np.asarray(getattr(evaluation, name), float).tolist() for name in ChainValues._fields)
        ),
        work=work,
        timings=timings,
        traces=traces,
        log_weights=np.asarray(evaluation.log_weight),
        draws=DrawValues(
            *map(np.asarray, (evaluation.excess, evaluation.log_prob, evaluation.resp_entropy))
        ),
        family_arrays=_family_arrays(outcome.arrays),
        snapshots=_snapshots(fit.snapshots),
        health=health_findings(evidence),
        config=config.replace(method="variational").recorded,
        llc_vi=float(np.mean(evaluation.llc)),
        llc_vi_sem=parts.total,
    )


def _evidence(
    fit: Fit,
    outcome: Outcome,
    problem: Problem,
    config: VIConfig,
    traces: dict[str, np.ndarray],
    minimum: Minimum,
    look: LossLook,
) -> Evidence:
    """Collect what findings are read from."""
    start, evaluation, posterior = fit.start, outcome.evaluation, problem.posterior
    steps, trend = traces["elbo"].shape[1], elbo_trend(traces["elbo"])
    return Evidence(
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
        rank_limit=rank_limit(
            start_settings(config), posterior.center.size, posterior.center.dtype.itemsize
        ),
        newton_decrement=minimum.newton_gain,
        importance=assess_importance(np.asarray(evaluation.log_weight)),
        radius2=traces["radius2"],
        localization=float(posterior.gamma),
        dim=posterior.center.size,
        excess=float(posterior.nbeta) * np.asarray(evaluation.excess, float),
        rounding=rounding_nats(posterior, float(outcome.reference_loss)),
        weight_rounding=look.weight_rounding,
        loss_rounding=look.loss_rounding,
        narrow_dtype=look.narrow_dtype,
        init_loss=float(outcome.reference_loss),
        bottom=minimum.bottom,
        in_memory=problem.holds_all,
        **_mixture_evidence(outcome.arrays, config),
    )


def _family_arrays(arrays: dict[str, Any], most_scales: int = MOST_SCALES) -> dict[str, np.ndarray]:
    """Move the family's arrays to the host, with the scales thinned out."""
    found = {name: np.asarray(array) for name, array in arrays.items()}
    return (
        {**found, "D_sqrt": kept_scales(found["D_sqrt"], most_scales)}
        if "D_sqrt" in found
        else found
    )


def _snapshots(snapshots: tuple[Snapshot, ...]) -> dict[str, np.ndarray]:
    """Stack what the fit kept of q's shape along its way.

    Steps (snapshots,), arrays (chains, snapshots, ...).
    """
    if not snapshots:
        return {}
    thinned = [_family_arrays(one.arrays, SNAPSHOT_SCALES) for one in snapshots]
    stacked = {name: np.stack([arrays[name] for arrays in thinned], axis=1) for name in thinned[0]}
    return {"step": np.array([one.step for one in snapshots]), **stacked}


def _mixture_evidence(arrays: dict[str, Any], config: VIConfig) -> dict[str, Any]:
    """Read off weights and factors.

    A rank is called unused only where somebody asked for more than the default.
    """
    if "pi" not in arrays:
        return {}
    asked = config.r_per_component is not None or config.filled.r > VIConfig().filled.r
    norms = arrays.get("factor_norm2", np.zeros(0))
    return {
        "num_components": arrays["pi"].shape[1],
        "dominant_weight": float(np.mean(np.max(arrays["pi"], axis=1))),
        "longest_factor": float(np.max(norms)) if asked and norms.size else None,
    }
