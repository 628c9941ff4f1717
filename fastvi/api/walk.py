"""Estimates by a walk from the localizer: nothing is fitted, and no pass over the data is made."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fastvi._compilation import CompileWatch
from fastvi._devices import layout_for
from fastvi._errors import ConfigError
from fastvi._vectors import Leaves
from fastvi.api.plan import bound_fit, plan_estimate, walk_budget
from fastvi.config import VIConfig
from fastvi.evaluation.products import nats_of_rounded_products
from fastvi.fitting.protocols import Progress
from fastvi.kernels.noise import split_key, streams
from fastvi.results.early_end import EarlyEnd
from fastvi.results.estimate import LLCEstimate, More
from fastvi.results.findings import correction_findings
from fastvi.results.parts import (
    ChainValues,
    Correction,
    Curvature,
    DrawValues,
    Timings,
    said_by_walkers,
)
from fastvi.results.progress import reporting, tell_sampling
from fastvi.results.walk_findings import LEAST_SHARE, walk_findings
from fastvi.results.work import RunWork
from fastvi.sampling.ensemble import MinibatchEnsemble, Target
from fastvi.sampling.from_localizer.batches import AbstractReader, DrawnReader, FeedReader
from fastvi.sampling.from_localizer.memory import check_memory
from fastvi.sampling.from_localizer.setup import WalkSetup
from fastvi.sampling.from_localizer.steps import minibatch_programs
from fastvi.sampling.from_localizer.walk import HOPELESS_SHARE, TooStiff, Walk, walk_from_localizer
from fastvi.sampling.keeping import NO_KEEPER, AbstractWalkKeeper
from fastvi.sampling.settings import SamplerSettings
from fastvi.target.checks import LossLook
from fastvi.target.data import Data, Problem
from fastvi.target.fingerprint import Fingerprint
from fastvi.target.look import weigher_of
from fastvi.target.losses import WeightedBatch, check_weights
from fastvi.target.ravel import TreeObjective
from fastvi.target.stream import Feed
from fastvi.target.work import Work

# Dimensions from which on a walk is tried before a fit, where both are possible. Below, a fit takes
# a second or two and its metric always pays.
LEAST_DIM = 2048
# Steps of a round: the host looks as often. Half of it looks twice as often, at a millisecond each.
ROUND = 16
# Examples of a part of a walker's batch, where examples are dear and where they are cheap; a pass
# that takes this many examples tells the two apart.
PART, PART_OF_CHEAP, CHEAP = 4, 16, 1024
# Evaluations of all walkers that the budget pays for, at least, where parts are large.
LEAST_EVALUATIONS = 8 * 200
# Parts of a batch whose round is fed at once; batches of more are fed in shorter rounds. Double
# holds twice as many examples on the device.
FED_PARTS = 4
# Standard errors, and beside them the part of itself, by which a mean weight must differ to be said
# to drift: chance alone does once in 16,000 estimates.
DRIFT_SIGMAS, NEGLIGIBLE_DRIFT = 4.0, 0.02
# Coordinates of all walkers that a result holds for `sample_posterior`, with momenta and gradients:
# 48 MiB. At half, half as large models draw; at double, a list of results holds twice as much.
MOST_HELD = 2**22


def walks_without_fit(config: VIConfig) -> bool:
    """Say whether a walk without a fit does all that a configuration asks for."""
    return config.method in (None, "auto", "sample") and not config.of_a_fit


def walks_divided(config: VIConfig) -> bool:
    """Say whether parameters that come divided over devices stay so: where a walk is asked for.

    A fit takes them whole, and so does a walk that may give way to one.
    """
    start = config.sampler.chosen_start
    is_asked = start == "localizer" or (config.method == "sample" and start != "fit")
    return is_asked and walks_without_fit(config)


def refuse_beside_walk(sampler: SamplerSettings, of_a_fit: Sequence[str]) -> None:
    """Refuse what is of a fit where walkers are to begin at the localizer.

    Raises:
        ConfigError: If there is any of it.
    """
    if of_a_fit and sampler.chosen_start == "localizer":
        raise ConfigError(
            f"{sampler.named_start} makes no fit, and {of_a_fit[0]} is of one: leave one of them "
            "out."
        )


def chooses_walk(problem: Problem, config: VIConfig, look: LossLook) -> tuple[bool, bool]:
    """Say whether to try a walk from the localizer, and whether nothing else is possible.

    Raises:
        ConfigError: If it was asked for and cannot be.
    """
    if isinstance(problem.posterior.center, Leaves):
        return True, True
    start, gamma = config.sampler.chosen_start, float(problem.posterior.gamma)
    if start == "localizer":
        asked = config.sampler.named_start
        refuse_beside_walk(config.sampler, config.of_a_fit)
        if not walks_without_fit(config):
            raise ConfigError(
                f"{asked} walks, and method={config.method!r} does not: leave one of them out."
            )
        if gamma <= 0:
            raise ConfigError(
                f"{asked} needs localization > 0: without it, the localizer has no width."
            )
        return True, True
    if start == "fit" or gamma <= 0 or not walks_without_fit(config):
        return False, False
    # a fit rarely takes what it may at most, which leaves some of the budget to its walkers
    is_poor = config.budget is not None and (
        # a walk that gives way to a fit leaves it the rest
        (1 - 2 * HOPELESS_SHARE) * config.budget
        < bound_fit(problem, plan_estimate(config, problem, None), look)
    )
    # a fit and the blocks of its walkers see all data: few examples of much weight among them
    is_wide = problem.posterior.center.size >= LEAST_DIM and look.effective_share >= LEAST_SHARE
    return is_poor or is_wide, is_poor


def estimate_by_walk(
    objective: TreeObjective,
    problem: Problem,
    config: VIConfig,
    key: Any,
    look: LossLook,
    loss: Fingerprint,
    budget: float,
    must_walk: bool,
    report: Callable[[Progress], None] | None,
    feed: Feed | None = None,
    keeper: AbstractWalkKeeper = NO_KEEPER,
    early_end: EarlyEnd = EarlyEnd(),
) -> LLCEstimate | TooStiff:
    """Walk from the localizer, on data at hand or those that `feed` gives."""
    if report is not None:
        report(Progress("walk", 0, int(budget), math.nan))
    began, settings = time.perf_counter(), config.sampler
    is_cheap = problem.data.max_batch >= CHEAP and budget > PART_OF_CHEAP * LEAST_EVALUATIONS
    part = PART_OF_CHEAP if is_cheap else PART
    keys = split_key(streams.derive(key, streams.Purpose.WALKERS), settings.walkers)
    center = problem.posterior.center
    layout = layout_for(center)
    layout.check(settings.walkers, "sampler.walkers")
    check_memory(center.size, settings.walkers, center.dtype.itemsize, layout)
    reader: AbstractReader = DrawnReader(
        layout.share(problem.data.examples), min(part, problem.data.num_examples)
    )
    if feed is not None:
        is_weighted = isinstance(problem.data.examples, WeightedBatch)
        weigh = _weigh_batches(objective, problem, loss) if is_weighted else None
        reader = FeedReader(feed, problem.data.examples, part, keys.size, ROUND * FED_PARTS, weigh)

    with CompileWatch() as watch:
        programs = minibatch_programs(objective, loss, problem.posterior, reader.first, ROUND)
        setup = WalkSetup(
            programs=programs,
            posterior=problem.posterior,
            leaf_sizes=tuple(objective.structure.leaf_sizes),
            reader=reader,
            keys=keys,
            seed=np.random.SeedSequence(np.ravel(jax.random.key_data(key)).tolist()),
            settings=settings,
            error=config.error,
            # The look is paid for by the same budget.
            budget=budget - look.sample_gradients,
            spent=look.sample_gradients,
            must_walk=must_walk,
            report=tell_sampling(report, "walk", 1, budget, config.error),
            num_data=problem.num_data,
            full_gradient=functools.partial(programs.full_gradient, problem)
            if problem.holds_all
            else None,
            ends=early_end,
        )
        walk = walk_from_localizer(setup, keeper)
    if isinstance(walk, TooStiff):
        return walk
    seconds = time.perf_counter() - began
    timings = Timings(watch.seconds, 0.0, 0.0, 0.0, seconds, seconds)
    asked = Asked(Target(objective, loss, problem), setup, look, _weight_drift(reader, look))
    config = config.replace(method="sample", budget=budget)
    result = _interpret(asked, walk, config, timings, early_end)
    # of a stream nothing is left to go on with
    is_small = not isinstance(center, Leaves) and walk.course.state.position.size <= MOST_HELD
    return _held(asked, walk, result) if feed is None and is_small else result


class Asked(NamedTuple):
    """What a finished walk is interpreted by.

    Attributes:
        target: What was sampled.
        setup: What the walk shared.
        look: What was seen of the loss before.
        weight_drift: By how much the mean weight of what was read differs.
    """

    target: Target
    setup: WalkSetup
    look: LossLook
    weight_drift: float


def _held(asked: Asked, walk: Walk, result: LLCEstimate) -> LLCEstimate:
    """Return a result that holds its walkers."""
    said, course = walk.course.said, walk.course._replace(said=None)
    ensemble = MinibatchEnsemble(asked.target, asked.setup, course, result.llc, walk.measured, said)
    going_on = functools.partial(_go_on, asked)
    return dataclasses.replace(result, ensemble=ensemble, going_on=going_on)


def _go_on(asked: Asked, result: LLCEstimate, more: More) -> LLCEstimate:
    """Go on with the walk of a result."""
    began, ensemble = time.perf_counter(), result.ensemble
    ensemble.target.check_unchanged()
    before, num_data = ensemble.course.work, asked.target.problem.num_data
    budget = more.budget or walk_budget(num_data, result.dim)
    with CompileWatch() as watch, reporting(more.progress) as report:
        tell = tell_sampling(report, "walk", 1, before + budget, more.error)
        walk = ensemble.averaged_on(more.error, budget, tell, more.early_end)
    timings = result.timings.with_correction(time.perf_counter() - began, watch.seconds)
    whole = before + asked.look.sample_gradients + budget
    config = result.config.replace(error=more.error, budget=whole)
    found = _interpret(asked, walk, config, timings, more.early_end)
    return _held(asked, walk, found.of_masked(ensemble.target.is_masked))


def _weigh_batches(
    objective: TreeObjective, problem: Problem, loss: Fingerprint
) -> Callable[[WeightedBatch], tuple[float, float]]:
    """Return what tells mean and mean square of weights, over the mean that the loss divides by.

    It refuses impossible weights. It is not counted as work: weights do not depend on parameters,
    so that XLA leaves the model out.
    """
    weigher = weigher_of(objective, problem, loss)
    center, data = problem.posterior.center, problem.data
    inverse = float(np.asarray(data.examples.inverse_mean_weight)[0])

    def weigh(examples: WeightedBatch) -> tuple[float, float]:
        mean, square, invalid = map(float, weigher(center, Data(examples, data.max_batch)))
        check_weights(mean, invalid, "loss_fn")
        return mean * inverse, square * inverse**2

    return weigh


def _weight_drift(reader: AbstractReader, look: LossLook) -> float:
    """Return by how much the mean weight of what was read differs; 0 where it is chance."""
    said = reader.reading.weights
    if said is None:
        return 0.0
    chance = DRIFT_SIGMAS * math.hypot(look.weight_error, said.noise)
    return said.drift if abs(said.drift) > chance + NEGLIGIBLE_DRIFT else 0.0


def _interpret(
    asked: Asked, walk: Walk, config: VIConfig, timings: Timings, early_end: EarlyEnd
) -> LLCEstimate:
    """Put a finished walk into the form of an estimate; what a fit would say is left empty."""
    target, setup, look, weight_drift = asked
    problem, measured = target.problem, walk.measured
    posterior = problem.posterior
    product_rounding = nats_of_rounded_products(
        target.objective,
        target.loss,
        problem,
        lambda: walk.course.state.position * walk.course.scale,
    )
    analysis = walk.check.analysis
    nan, none = math.nan, np.zeros((0, 0))
    curvatures = np.asarray(setup.leaf_sizes) * (measured.curvature + float(posterior.gamma))
    num_data = walk.examples if problem.data.is_sample else problem.num_data
    work = Work(gradients=walk.work).fge(num_data)
    looking = Work(gradients=look.sample_gradients).fge(num_data)
    # A mean weight that is off scales the loss, and llc with it.
    weight = math.hypot(look.weight_error, weight_drift) * analysis.llc
    parts = analysis.parts.plus(evaluation=math.hypot(weight, product_rounding))
    result = LLCEstimate(
        llc=analysis.llc,
        llc_sem=parts.total,
        error_parts=parts,
        llc_per_chain=analysis.per_walker,
        llc_sem_per_chain=analysis.per_walker_sem,
        elbo=nan,
        init_loss=walk.reference_loss,
        nbeta=float(posterior.nbeta),
        localization=float(posterior.gamma),
        # of data that are read once, those that were read
        n_data=num_data,
        dim=posterior.center.size,
        converged=None,
        curvature=Curvature(
            rank=0,
            wanted_rank=0,
            explained=0.0,
            trace=float(curvatures.sum()),
            spectrum=[],
            newton_decrement=measured.decrement,
            lowest=nan,
            products="none",
        ),
        evaluation=ChainValues([], [], [], [], [], []),
        work=RunWork(0, 0, 0, 0, looking, 0.0, 0.0, 0.0, 0.0, looking + work, work),
        timings=timings,
        traces={},
        log_weights=none,
        draws=DrawValues(none, none, none),
        health=(),
        config=config.of_a_walk,
        llc_vi=nan,
        llc_vi_sem=nan,
        correction=Correction(
            method="sample",
            khat=nan,
            in_memory=problem.holds_all,
            least_budget=walk.least_budget + look.sample_gradients,
            **said_by_walkers(walk.check, setup.settings.bin_length, walk.course.done),
            batch=walk.batch,
            step_size=walk.step_size,
            returned=walk.returned,
            stiffness=measured.stiffness,
            product_rounding=product_rounding,
            narrow_dtype=look.narrow_dtype,
        ),
        walk_llc=walk.check.llc,
        stopped=early_end.reason if walk.check.unmet else None,
    )
    result = dataclasses.replace(result, health=walk_findings(result, walk, look, weight_drift))
    return dataclasses.replace(result, health=correction_findings(result))
