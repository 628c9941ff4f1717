"""`correct`: from the variational value of a finished fit to the posterior's own.

It reweights the draws of q, or samples the posterior with walkers that start at them.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._compilation import CompileWatch
from fastvi._errors import ConfigError, NonFiniteError
from fastvi._modes import in_own_modes
from fastvi._typing import Array, Float, Given, Keys
from fastvi.api.plan import check_blocks, default_budget
from fastvi.config import VIConfig
from fastvi.evaluation.control_variate import regress
from fastvi.evaluation.errors import ErrorParts, chain_error, pair_mean
from fastvi.evaluation.importance import GOOD, pareto_smooth
from fastvi.evaluation.products import nats_of_rounded_products
from fastvi.fitting.protocols import Progress
from fastvi.fitting.run import Fit
from fastvi.fitting.schedule import few_dimensions_factor
from fastvi.observables.draws import FittedQ, fitted_q
from fastvi.results.early_end import EarlyEnd
from fastvi.results.estimate import LLCEstimate, More
from fastvi.results.findings import correction_findings
from fastvi.results.parts import Correction, said_by_walkers
from fastvi.results.progress import reporting, tell_sampling
from fastvi.sampling.ensemble import BlockEnsemble, Target
from fastvi.sampling.keeping import NO_KEEPER, AbstractWalkKeeper
from fastvi.sampling.programs import SamplerPrograms, sampler_programs
from fastvi.sampling.run import LENGTH, RunSetup, SamplerResult, Unmet, begin, run_walkers
from fastvi.sampling.settings import SamplerSettings
from fastvi.sampling.tuning import USUAL_ERROR
from fastvi.sampling.walkers import Walkers
from fastvi.target.data import Problem
from fastvi.target.fingerprint import Fingerprint
from fastvi.target.narrow import narrow_dtype
from fastvi.target.ravel import TreeObjective
from fastvi.target.stream import uncorrected

# Part of the draws that must count for "auto" to reweight them. Half trusts fewer draws; 1 none.
EFFECTIVE_SHARE = 0.5
# Error of reweighted draws, over the one that was asked for, that "auto" takes. Few draws do not
# show the tail of their weights: of ten with up to twice this error one was off by 3.5 of its
# errors (least_squares_20). At half, more estimates walk; at double, that one is believed.
REWEIGHTED_ERROR = 0.33
# Times that the weighted mean is linearised about its own result: each takes off the square of what
# was left, so that two would do, and six give the same digits.
RELINEARISATIONS = 3
# Relative rounding of a weighted mean: log weights are differences of numbers of the ELBO's size.
ROUNDING = 1e-4


class PreviousRun(NamedTuple):
    """An earlier run of the sampler on this target.

    Attributes:
        walkers: Where it ended.
        center: The w* that its walkers were about.
        number: How many runs have used these walkers.
        is_settled: Whether its criteria were met.
    """

    walkers: Walkers
    center: Float[Array, " dim"]
    number: int
    is_settled: bool


class Fitted(NamedTuple):
    """Live state needed to go on from a fit.

    Attributes:
        fit: The fit.
        problem: The target with its data.
        objective: The loss.
        loss: What the loss computed at the fit.
        keys: Keys of the chains.
        previous: The last run of the sampler, if any.
        is_masked: Whether the caller passed all parameters and a mask, not a restricted loss.
    """

    fit: Fit
    problem: Problem
    objective: TreeObjective
    loss: Fingerprint
    keys: Keys
    previous: PreviousRun | None = None
    is_masked: bool = False

    @property
    def q(self) -> FittedQ:
        """The fitted q, to draw from."""
        center, fit = self.problem.posterior.center, self.fit
        return fitted_q(fit.family, fit.params, center, self.objective, self.is_masked)

    def check_unchanged(self) -> Fingerprint:
        """Return what the loss computes now; refuse what is something else than at the fit."""
        return Target(self.objective, self.loss, self.problem).check_unchanged()


@in_own_modes
def correct(
    result: LLCEstimate,
    method: Given[str] = "auto",
    *,
    error: Given[float | None] = None,
    budget: Given[float | None] = None,
    sampler: Any = None,
    time_limit: Given[float | None] = None,
    progress: Given[bool | Callable[[Progress], None]] = True,
    throw: Given[bool] = True,
) -> LLCEstimate:
    """Turn the variational value of a finished estimate into the posterior's own.

    "reweight" reweights the draws of the evaluation (Pareto-smoothed) and costs nothing more. It
    can be trusted while k-hat is below 0.7. "sample" runs underdamped Langevin dynamics from draws
    of q, in the coordinates that q makes round. Its gradients are on blocks of the data as small as
    their noise allows, and it averages with virial control variates. "auto" reweights where k-hat
    is below 0.5, half of the draws count and their error is below a third of `error`, and samples
    otherwise.

    Walkers that have corrected this result before go on from where they are, and what they
    averaged then is left out: `result.more` goes on with the average.

    Args:
        result: An estimate of this process, from `estimate_llc`.
        method: "auto", "sample" or "reweight"; "variational" returns the result as it is.
        error: As in `VIConfig`; what the result was estimated with when left out.
        budget: As in `VIConfig`; what the result was estimated with when left out.
        sampler: As in `VIConfig`; what the result was estimated with when left out.
        time_limit: As in `estimate_llc`.
        progress: Whether to show a status line on stderr, or a function that receives `Progress`.
        throw: Whether to raise when the corrected value is not finite; otherwise a finding says so.

    Returns:
        A new estimate whose llc, llc_sem and findings are the corrected ones; `llc_vi` keeps the
        old value.

    Raises:
        ConfigError: If an option is impossible, or not one of this method.
        DataError: If the result is a walk without a fit or was loaded from disk, or walkers are
            needed and the loss has changed.
        NonFiniteError: If NaN or infinity appears, unless `throw` is False.

    Cost:
        "sample": some 50 to 3,000 full gradients, never more than `budget`. Where that
        pays for no walk, draws of q are reweighted, and a finding says how much would do.
    """
    result.fit_for("go on from")
    recorded, early_end = with_method(result, method, error, budget, sampler), EarlyEnd(time_limit)
    with early_end.interruptible(tells=progress is True):
        return correct_within(
            result, recorded, 0.0, progress=progress, throw=throw, early_end=early_end
        )


def correct_within(
    result: LLCEstimate,
    recorded: VIConfig,
    spent: float,
    *,
    progress: bool | Callable[[Progress], None],
    throw: bool,
    keeper: AbstractWalkKeeper = NO_KEEPER,
    early_end: EarlyEnd = EarlyEnd(),
) -> LLCEstimate:
    """Correct an estimate, by a configuration of whose budget some has been spent."""
    fitted: Fitted = result.fit_for("go on from")
    if recorded.method == "variational":
        return result
    check_blocks(fitted.problem, recorded.sampler)
    config = recorded.filled
    if not fitted.problem.holds_all:
        # Called for what it refuses.
        uncorrected(config.method, fitted.problem.data.is_sample)
    began = time.perf_counter()
    with CompileWatch() as watch:
        method, weights, khat = _choose(fitted, config)
        values = _reweight(fitted, weights) if method == "reweight" else None
        allowed = REWEIGHTED_ERROR * config.error
        too_rough = values is not None and values.llc_sem > allowed * abs(values.llc)
        # Reweighting that was asked for by name stays, whatever its error.
        if values is None or (too_rough and config.method == "auto"):
            with reporting(progress) as report:
                method = "sample"
                values = _sample(fitted, config, weights, spent, report, keeper, early_end)
    seconds = time.perf_counter() - began, watch.seconds
    details = {"method": method, "khat": khat, **values.details}
    # of a run that has ended by itself nothing was stopped, whatever was said of the fit
    stopped = early_end.reason if details.get("unmet") else None
    return _corrected(result, values, details, recorded, stopped, seconds, throw)


def _corrected(
    result: LLCEstimate,
    values: "_Values",
    details: dict[str, Any],
    recorded: VIConfig,
    stopped: str | None,
    seconds: tuple[float, float],
    throw: bool,
) -> LLCEstimate:
    """Put what a method found in the place of what a result says.

    `seconds` are those that it took, and those of them that compiled.
    """
    fitted, timings = result.fitted, result.timings.with_correction(*seconds)
    corrected = dataclasses.replace(
        result,
        llc=values.llc,
        llc_sem=values.llc_sem,
        error_parts=values.parts,
        llc_per_chain=values.per_chain,
        llc_sem_per_chain=values.sem_per_chain,
        # An unpaid run names the method that stands in for it.
        correction=Correction(**details),
        walk_llc=values.walk,
        work=result.work.with_correction(values.work),
        timings=timings,
        config=recorded,
        stopped=stopped,
        fitted=fitted._replace(previous=values.previous or fitted.previous),
        ensemble=values.ensemble or result.ensemble,
        going_on=_way_on(values, recorded),
    )
    corrected = dataclasses.replace(corrected, health=correction_findings(corrected))
    broken = [finding for finding in corrected.health if finding.name == "non_finite"]
    if throw and broken:
        raise NonFiniteError(f"{broken[0]} Pass throw=False to get the partial result.")
    return corrected


def with_method(
    result: LLCEstimate, method: str, error: float | None, budget: float | None, sampler: Any
) -> VIConfig:
    """Return the result's configuration with this method, and the settings that are not None.

    Raises:
        ConfigError: If the method has no use for one of them.
    """
    asked = {"method": method, "error": error, "budget": budget, "sampler": sampler}
    VIConfig.create(asked).check_available()
    given = {name: value for name, value in asked.items() if value is not None}
    config = result.config.replace(**given)
    if config.sampler.chosen_start == "localizer":
        raise ConfigError(
            f"correct goes on from a fit, and {config.sampler.named_start} is of walks from the "
            "localizer: leave it out, or run estimate_llc again."
        )
    return config.replace(budget=config.budget or default_budget(result.n_data)).recorded


def _way_on(values: "_Values", recorded: VIConfig) -> Any:
    """Return what goes on from a result; None where draws are reweighted because somebody asked."""
    if values.ensemble is not None:
        return _go_on
    return _choose_anew if recorded.method == "auto" else None


def _choose_anew(result: LLCEstimate, more: More) -> LLCEstimate:
    """Keep reweighted draws where they are good enough, and else let walkers start at them."""
    recorded = with_method(result, "auto", more.error, more.budget, None)
    return correct_within(
        result,
        recorded,
        0.0,
        progress=more.progress,
        throw=more.throw,
        early_end=more.early_end,
    )


def _go_on(result: LLCEstimate, more: More) -> LLCEstimate:
    """Go on with the walk that has corrected a result."""
    fitted: Fitted = result.fit_for("go on from")
    fitted.check_unchanged()
    began, ensemble, num_data = time.perf_counter(), result.ensemble, fitted.problem.num_data
    before = ensemble.told["work"]
    budget = more.budget or default_budget(num_data)
    with CompileWatch() as watch, reporting(more.progress) as report:
        tell = tell_sampling(report, "correction", num_data, before + budget, more.error)
        run = ensemble.averaged_on(more.error, budget, tell, more.early_end)
    whole = result.sample_gradients + budget
    recorded = result.config.replace(error=more.error, budget=whole)
    previous, correction = fitted.previous, result.correction
    assert previous is not None, "walkers have corrected it"
    assert correction is not None, "walkers have corrected it"
    spent = result.sample_gradients - before
    values = _values_of(fitted, run, recorded.sampler, spent, previous.number)
    values = values._replace(work=values.work - before / num_data)
    details = {"method": "sample", "khat": correction.khat, **values.details}
    stopped = more.early_end.reason if run.check.unmet else None
    seconds = time.perf_counter() - began, watch.seconds
    return _corrected(result, values, details, recorded, stopped, seconds, more.throw)


class _Values(NamedTuple):
    """What a method found."""

    llc: float
    parts: ErrorParts
    per_chain: Float[np.ndarray, " chains"]
    sem_per_chain: Float[np.ndarray, " chains"]
    walk: Float[np.ndarray, "walkers bins"]
    work: float
    details: dict[str, Any]
    previous: PreviousRun | None = None
    ensemble: BlockEnsemble | None = None

    @property
    def llc_sem(self) -> float:
        return self.parts.total


def _choose(
    fitted: Fitted, config: VIConfig
) -> tuple[str, Float[np.ndarray, "chains draws"], float]:
    """Return the method, and the weights with their k-hat: smoothed only where their tail is heavy.

    Smoothing light tails would add noise that no error accounts for.
    """
    log_weight = np.asarray(fitted.fit.outcome.evaluation.log_weight, float)
    weights, khat = pareto_smooth(log_weight.ravel())
    if khat < GOOD:
        weights = np.exp(log_weight.ravel() - np.max(log_weight))
        weights /= np.sum(weights)
    method: str = config.method or "auto"
    if method == "auto":
        counts = 1 / np.sum(weights**2) >= EFFECTIVE_SHARE * weights.size
        method = "reweight" if khat < GOOD and counts else "sample"
    return method, weights.reshape(log_weight.shape), khat


def _reweight(fitted: Fitted, weights: Float[np.ndarray, "chains draws"]) -> _Values:
    """Average under self-normalised weights, with the control variates of q.

    These act on the ratio of two averages, linearised about its own result: else the noise of the
    weights times what the control variates have taken off would be left.
    """
    evaluation = fitted.fit.outcome.evaluation
    llc = float(fitted.problem.posterior.nbeta) * np.asarray(evaluation.excess, float)
    columns, dtype = np.asarray(evaluation.columns, float), fitted.problem.posterior.center.dtype
    doubt = np.asarray(evaluation.expectation_variance, float)
    pairs, value = llc.shape[1] // 2, float(np.sum(weights * llc))
    means = variances = np.zeros(llc.shape[0])
    for _ in range(RELINEARISATIONS):
        # Weights of mean one turn the weighted mean into a plain one, as `regress` takes it.
        influence = weights * weights.size * (llc - value)
        fits = [
            regress(jnp.asarray(y, dtype), jnp.asarray(x, dtype))
            for y, x in zip(pair_mean(influence, axis=1), columns, strict=True)
        ]
        means = value + np.array([float(fit.mean) for fit in fits])
        variances = np.array(
            [
                float(fit.residual_variance) / pairs
                + np.sum(np.asarray(fit.coefficients) ** 2 * own)
                for fit, own in zip(fits, doubt, strict=True)
            ]
        )
        value = float(means.mean())
    parts = ErrorParts(chain_error(means, np.sqrt(variances)), evaluation=ROUNDING * abs(value))
    details = {
        "effective_draws": float(1 / np.sum(weights**2)),
        "in_memory": fitted.problem.holds_all,
    }
    return _Values(value, parts, means, np.sqrt(variances), np.zeros((0, 0)), 0, details)


def _sample(
    fitted: Fitted,
    config: VIConfig,
    weights: Float[np.ndarray, "chains draws"],
    spent: float,
    report: Callable[[Progress], None] | None,
    keeper: AbstractWalkKeeper,
    early_end: EarlyEnd,
) -> _Values:
    """Run the walkers; reweight where what is left of the budget pays for no step of theirs."""
    chains, num_data, settings = fitted.keys.size, fitted.problem.num_data, config.sampler
    per_chain = _walkers_per_chain(fitted, config.error, settings)
    previous = fitted.previous
    if previous is not None and previous.walkers.position.shape[0] != chains * per_chain:
        previous = None  # another number of walkers: these start at q

    programs = sampler_programs(
        fitted.objective, fitted.check_unchanged(), fitted.problem, settings
    )
    programs.layout.check(chains * per_chain, "sampler.walkers")
    shared = programs.layout.share((fitted.problem, fitted.fit.outcome.reference_loss))
    problem, reference_loss = shared
    setup = RunSetup(
        programs,
        problem,
        reference_loss,
        settings,
        config.error,
        config.budget - spent,
        tell_sampling(report, "correction", num_data, config.budget - spent, config.error),
        chains=chains,
        fewest=chains * -(-settings.walkers // chains),
        agreed_before=previous is not None and previous.is_settled,
        ends=early_end,
    )
    walkers = _start_walkers(programs, fitted, previous, chains * per_chain)
    start = begin(setup, walkers)
    if not setup.pays(start):
        least = spent + setup.least_budget(start, setup.counts[0])
        return _unpaid(_reweight(fitted, weights), least, settings)
    run = run_walkers(setup, walkers, keeper)
    number = 1 if previous is None else previous.number + 1
    return _values_of(fitted, run, settings, spent, number)


def _values_of(
    fitted: Fitted, run: SamplerResult, settings: SamplerSettings, spent: float, number: int
) -> _Values:
    """Return what a run has found, the `number`-th of these walkers."""
    means, errors = _per_chain(run, fitted.keys.size, settings.walkers)
    rounding = nats_of_rounded_products(
        fitted.objective,
        fitted.check_unchanged(),
        fitted.problem,
        lambda: run.end.walkers.linear_map.displacement(run.end.walkers.position),
    )
    return _Values(
        run.check.analysis.llc,
        run.check.analysis.parts.plus(evaluation=rounding),
        means,
        errors,
        run.check.llc,
        run.end.work / fitted.problem.num_data,
        {
            **run_details(run, settings, spent),
            "narrow_dtype": narrow_dtype(fitted.loss.uses),
            "product_rounding": rounding,
        },
        PreviousRun(run.end.walkers, fitted.problem.posterior.center, number, not run.check.unmet),
        BlockEnsemble.parked(
            Target(fitted.objective, fitted.loss, fitted.problem, fitted.is_masked),
            run,
        ),
    )


def _walkers_per_chain(fitted: Fitted, error: float, settings: SamplerSettings) -> int:
    """Return how many walkers start at the draws of each chain.

    More start in few dimensions, and fewer of these where the error may be larger than usual.
    """
    share = min(1.0, (USUAL_ERROR / error) ** 2)
    most = max(1, round(settings.walkers_in_few_dimensions * share))
    # Rounded up, so that every chain has the same number.
    factor = few_dimensions_factor(fitted.problem.posterior.center.size, most)
    return -(-settings.walkers * factor // fitted.keys.size)


def _per_chain(
    run: SamplerResult, chains: int, groups: int
) -> tuple[Float[np.ndarray, " parts"], Float[np.ndarray, " parts"]]:
    """Return mean and error of the walkers of each chain, or of groups where there is one chain."""
    found = (run.check.analysis.per_walker, run.check.analysis.per_walker_sem)
    # one row for each chain; a single chain's walkers are dealt out to the groups
    means, errors = (
        values.reshape(chains, -1) if chains > 1 else values.reshape(-1, groups).T
        for values in found
    )
    return means.mean(axis=1), np.sqrt(np.sum(errors**2, axis=1)) / errors.shape[1]


def _unpaid(values: _Values, least_budget: float, settings: SamplerSettings) -> _Values:
    """Say of reweighted draws that they stand in for a run."""
    details = {
        "method": "reweight",
        "settled": False,
        "unmet": (Unmet(LENGTH, 0, settings.min_bins * settings.bin_length),),
        "least_budget": least_budget,
        "narrow_dtype": None,
    }
    return values._replace(details={**values.details, **details})


def _start_walkers(
    programs: SamplerPrograms, fitted: Fitted, previous: PreviousRun | None, num_walkers: int
) -> Walkers:
    """Place walkers at draws of q, or take over those of the previous run."""
    common = (fitted.fit.family, fitted.problem, fitted.fit.params)
    if previous is not None:
        # The number of runs so far gives their keys other noise than before.
        number = jnp.int32(previous.number)
        moved = programs.move(*common, previous.walkers, previous.center, number)
        if previous.center is fitted.problem.posterior.center:
            return moved
        # about another w* on the same noise: the difference of the two estimates has little of it
        return moved._replace(keys=previous.walkers.keys)
    evaluation = fitted.fit.outcome.evaluation
    return programs.place(
        *common, fitted.keys, evaluation.log_weight, evaluation.excess, num_walkers=num_walkers
    )


def run_details(run: SamplerResult, settings: SamplerSettings, spent: float) -> dict[str, Any]:
    """Return what a result keeps of a run."""
    anchor = run.end.estimate.anchor
    return {
        **said_by_walkers(run.check, settings.bin_length, run.end.steps),
        "least_budget": spent + run.least_budget,
        "data_blocks": run.end.fidelity.num_blocks,
        "kept_examples": 0 if anchor is None else anchor.kept.size,
        "energy_error": run.end.fidelity.energy_error,
        "step_size": run.end.step_size,
        "rounding": float(np.sqrt(run.end.rounding)),
        "returned": run.end.returned,
    }
