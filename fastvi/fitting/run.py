"""Run the stages of a fit: chunk by chunk with a stopping rule, or as one traceable program."""

import abc
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import compile_ahead
from fastvi._modes import jax_setting
from fastvi._typing import Array, Keys
from fastvi.evaluation.llc import Beside, error_over_pieces
from fastvi.families.base import AbstractFamily
from fastvi.fitting.calibrate import MAX_ROUNDS, calibration_steps, narrowing
from fastvi.fitting.protocols import Progress, never
from fastvi.fitting.schedule import (
    DECAY_FRACTION,
    FLAT_LOOKS,
    MIN_WINDOW,
    decay_length,
    elbo_trend,
    is_balanced,
    negligible_nats,
)
from fastvi.fitting.stages import (
    FamilyChoice,
    FromCurvature,
    FromFit,
    Outcome,
    Programs,
    Stages,
    build_family,
    calibration_keys,
    fit_inside_a_trace,
)
from fastvi.fitting.step import State
from fastvi.fitting.step_plan import Phases, ScheduleSettings, fixed_phases, frozen, plan_steps
from fastvi.geometry.curvature import BLOCK
from fastvi.geometry.minimum import LINE_POINTS, descent_line
from fastvi.geometry.start import Start, rank_limit
from fastvi.kernels.noise import streams
from fastvi.target.data import AbstractData, Problem
from fastvi.target.posterior import LocalPosterior
from fastvi.target.stream import CHUNK, AbstractStream

MAX_ADAPTIVE_WARMUP = 100  # steps; a run that stops by itself is not planned to last


class Snapshot(NamedTuple):
    """Arrays that describe q after a step, each with a first axis of chains."""

    step: int
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass
class Fit:
    """A finished fit, before anyone interprets it.

    `warm` if it began at another's q, `snapshots` where asked for.
    """

    family: AbstractFamily
    params: Any
    start: Start
    outcome: Outcome
    traces: dict[str, Any]
    calibration_rounds: Any
    seconds: dict[str, float]
    converged: bool | None
    warm: bool = False
    snapshots: tuple[Snapshot, ...] = ()


class Course(NamedTuple):
    """Where a fit is between two chunks.

    All that the next one depends on, beside problem and keys.
    """

    family: AbstractFamily
    state: State
    start: Start
    calibration_rounds: Any
    phases: Phases
    parts: tuple[dict[str, np.ndarray], ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    done: int = 0
    flat_looks: int = 0
    converged: bool | None = None


class AbstractKeeper(abc.ABC):
    """Keeps the progress of a fit."""

    @abc.abstractmethod
    def restore(self, course: Course) -> Course:
        """Return the course that was kept; the given one, which begins, where there is none."""

    @abc.abstractmethod
    def save(self, course: Course) -> None:
        """Keep the course."""


class Options(NamedTuple):
    """What a fit from the host may have beside its problem.

    Attributes:
        early_stop: Whether to stop when the ELBO is flat.
        report: Called between chunks.
        warm: Another fit to begin at, of a problem with the same number of parameters.
        keeper: Where progress is kept.
        stream: Where windows of data and the evaluation's data come from.
        keeps_snapshots: Whether the shape of q is kept at each record.
        looks_down: Whether the evaluation follows the direction of least curvature at w*.
        ends_where: `np.any` to end where any chain is lost to NaN, `np.all` where all are. None
            runs all steps whatever comes, as a fixed number of them is promised.
        ends: Asked between chunks whether to end there.
    """

    early_stop: bool = False
    report: Callable[[Progress], None] | None = None
    warm: Fit | None = None
    keeper: AbstractKeeper | None = None
    stream: AbstractStream | None = None
    keeps_snapshots: bool = False
    looks_down: bool = False
    ends_where: Callable[..., Any] | None = None
    ends: Callable[[], bool] = never


def run_fit(
    stages: Stages,
    problem: Problem,
    choice: FamilyChoice,
    schedule: ScheduleSettings,
    chain_keys: Keys,
    *,
    whitener_scale: Array | None = None,
    options: Options = Options(),
) -> Fit:
    """Run all stages.

    What the chains share, the start from the curvature at w*, is random but the same for every key:
    a fit of the same problem by another key has the same core and needs no other program.

    Args:
        stages: The stages.
        problem: Target and data.
        choice: The family.
        schedule: The steps.
        chain_keys: One key for each chain.
        whitener_scale: S^{-1} from outside, in place of the configured whitening.
        options: What needs concrete values.

    Returns:
        The fit. Under a trace of jax (jit, vmap) nothing is looked at on the host and `seconds` are
        zero.
    """
    seconds = {"adaptation": 0.0, "sampling": 0.0, "evaluation": 0.0}
    leaves = jax.tree_util.tree_leaves((problem, chain_keys, whitener_scale))
    # A loss that closes over traced values belongs to the trace around it, whatever the arguments.
    if stages.loss.is_traced or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        whole = jax.jit(
            lambda *arguments: fit_inside_a_trace(stages, choice, schedule, *arguments)
        )(problem, chain_keys, whitener_scale)
        return Fit(**whole, seconds=seconds, converged=None)
    draws = schedule.steps * stages.settings.step.num_draws * chain_keys.size
    programs = stages.for_work(draws, problem)
    report = options.report or _silent
    report(Progress("curvature", 0, schedule.steps, float("nan")))
    with _timed(seconds, "adaptation"):
        course = _begin(
            stages, programs, problem, choice, schedule, chain_keys, whitener_scale, options
        )
        # jax returns before it has computed, and the next stage would be charged for this one.
        jax.block_until_ready(course.state)
    if options.keeper is not None:
        course = options.keeper.restore(course)
    course = _run_chunks(programs, problem, schedule, course, chain_keys, seconds, options)
    report(Progress("evaluation", schedule.steps, schedule.steps, float("nan")))
    with _timed(seconds, "evaluation"):
        outcome = jax.block_until_ready(_finish(programs, problem, course, chain_keys, options))
    return Fit(
        family=course.family,
        params=course.state.params,
        start=course.start,
        outcome=outcome,
        traces={
            name: np.concatenate([part[name] for part in course.parts], axis=1)
            for name in course.parts[0]
        },
        calibration_rounds=course.calibration_rounds,
        seconds=seconds,
        converged=course.converged,
        warm=options.warm is not None,
        snapshots=course.snapshots,
    )


def _begin(
    stages: Stages,
    programs: Programs,
    problem: Problem,
    choice: FamilyChoice,
    schedule: ScheduleSettings,
    keys: Keys,
    whitener_scale: Array | None,
    options: Options,
) -> Course:
    """Start from the curvature at w*, or from another fit's q moved to w*."""
    phases, settings = fixed_phases(schedule), stages.settings
    if options.early_stop:
        # The last possible decay still fits in: it takes this fraction of the steps before it.
        decay_start = schedule.steps / (1 + DECAY_FRACTION)
        warmup = min(phases.warmup, MAX_ADAPTIVE_WARMUP)
        phases = Phases(warmup, decay_start, schedule.steps)
    if options.warm is not None:
        start = _known_before(options.warm.start)
        origin = FromFit(options.warm.family, options.warm.params)
    else:
        start = programs.prepare(problem, streams.shared_key(), whitener_scale)
        limit = rank_limit(
            settings.start, problem.posterior.center.size, problem.posterior.center.dtype.itemsize
        )
        # Whole blocks of rows: starts of nearly one rank share their compiled steps.
        rank = min(limit, -(-int(start.rank) // BLOCK) * BLOCK)
        here = jax.tree_util.tree_map(np.asarray, start)  # in numpy, which compiles nothing
        family = build_family(choice, settings.start, here, rank)
        origin = FromCurvature(family, jnp.asarray(here.core[:rank]), keys)
        beside = _line_points(problem.posterior, start) if options.looks_down else None
        if not jax_setting("jax_disable_jit"):  # then nothing is to be compiled
            compile_ahead(_lowered(programs, origin, problem, schedule, options.stream, beside))
    family, state, rounds = _calibrate(
        programs, origin, problem, schedule, settings.step.num_draws, keys.size
    )
    return Course(
        family, state, start, rounds, phases, converged=False if options.early_stop else None
    )


def _known_before(start: Start) -> Start:
    """Return the start of another fit as one that cost nothing.

    It says nothing of the spectrum at this w*.
    """
    return dataclasses.replace(
        start,
        num_values=jnp.zeros_like(start.num_values),
        num_hvp=jnp.zeros_like(start.num_hvp),
        lowest=jnp.full_like(start.lowest, jnp.nan),
    )


def _lowered(
    programs: Programs,
    origin: FromCurvature,
    problem: Problem,
    schedule: ScheduleSettings,
    stream: AbstractStream | None,
    beside: Beside | None,
) -> Iterator[Any]:
    """Lower the later stages one after another."""
    dtype, keys = problem.posterior.center.dtype, origin.keys
    traced = programs.launch.trace(origin, dtype.type(0), np.bool_(False))
    family, state = traced.out_info
    plan = plan_steps(schedule, fixed_phases(schedule), 0, CHUNK, CHUNK, dtype)
    yield programs.steps.lower(family, problem, state, keys, plan)
    yield traced.lower()
    if stream is None:
        nothing = programs.nothing_seen(problem, keys.size, beside)
        common = family, problem, state.params, keys, problem.data, nothing
        share = jax.ShapeDtypeStruct((), dtype)
        # said as it is said below: jax takes what is left out for another program
        yield programs.finish.lower(*common, share, beside, concludes=True)


def _calibrate(
    programs: Programs,
    origin: FromCurvature | FromFit,
    problem: Problem,
    schedule: ScheduleSettings,
    num_draws: int,
    num_chains: int,
) -> tuple[AbstractFamily, State, int]:
    """Narrow the start until its virial agrees with the loss, by steps that change nothing.

    A start that agrees at once is changed more slowly.

    Returns:
        The family, the states of the chains, and the rounds that it took.
    """
    dtype, keys = problem.posterior.center.dtype, calibration_keys(num_chains)
    length = calibration_steps(num_chains, num_draws)
    shift, rounds, narrows = 0.0, 0, True
    while narrows and rounds < MAX_ROUNDS:
        family, state = programs.launch(origin, dtype.type(shift), np.bool_(False))
        plan = plan_steps(schedule, fixed_phases(schedule), rounds * length, length, CHUNK, dtype)
        _, traces = programs.steps(family, problem, state, keys, frozen(plan))
        # Rows beyond the plan's length are not run, and hold zeros.
        less = float(narrowing(np.mean(np.asarray(traces["virial"])[:, :length]), np))
        shift, rounds, narrows = shift - less, rounds + 1, less > 0
    # A single round has found nothing to narrow: such a start learns slowly (docs/math.md, Start).
    family, state = programs.launch(origin, dtype.type(shift), np.bool_(rounds == 1))
    return family, state, rounds


def _run_chunks(
    programs: Programs,
    problem: Problem,
    schedule: ScheduleSettings,
    course: Course,
    keys: Keys,
    seconds: dict[str, float],
    options: Options,
) -> Course:
    """Run the steps.

    With `early_stop`, at the peak rate until the ELBO is flat, then through the decay.
    """
    report = options.report or _silent
    while course.done < course.phases.end:
        # The problem came with the first window.
        if options.stream is not None and course.done:
            problem = dataclasses.replace(problem, data=options.stream.window(course.done))
        end = min(course.done + CHUNK, course.phases.end)
        with _timed(seconds, "sampling"):
            course = _advance(programs, schedule, course, problem, keys, end, options)
        part = course.parts[-1]
        elbo = np.concatenate([part["elbo"] for part in course.parts], axis=1)
        latest = float(np.mean(elbo[:, -part["elbo"].shape[1] :]))
        ahead = None if options.early_stop and not course.converged else course.phases.end
        report(Progress("fit", course.done, course.phases.end, latest, expected=ahead, traces=part))
        if options.ends_where is not None and options.ends_where(~np.isfinite(elbo[:, -1])):
            break
        if options.early_stop and not course.converged:
            course = _check_convergence(course, elbo, schedule, problem.posterior.center.size)
        if options.keeper is not None:
            options.keeper.save(course)
        if options.ends():
            break
    return course


def _advance(
    programs: Programs,
    schedule: ScheduleSettings,
    course: Course,
    problem: Problem,
    keys: Keys,
    end: int,
    options: Options,
) -> Course:
    """Run the steps up to `end`, with a stop at each record where snapshots of q are kept."""
    pieces, every, dtype = [], schedule.record_every, problem.posterior.center.dtype
    while course.done < end:
        stop = min(end, (course.done // every + 1) * every) if options.keeps_snapshots else end
        length = stop - course.done
        plan = plan_steps(schedule, course.phases, course.done, length, CHUNK, dtype)
        state, traces = programs.steps(course.family, problem, course.state, keys, plan)
        pieces.append({name: np.asarray(trace)[:, :length] for name, trace in traces.items()})
        course = course._replace(state=state, done=stop)
        if options.keeps_snapshots and stop % every == 0:
            # A snapshot bears the number of the step that it follows.
            shape = Snapshot(stop - 1, jax.device_get(_described(course.family, state.params)))
            course = course._replace(snapshots=(*course.snapshots, shape))
    part = {name: np.concatenate([piece[name] for piece in pieces], axis=1) for name in pieces[0]}
    return course._replace(parts=(*course.parts, part))


@jax.jit
def _described(family: AbstractFamily, params: Any) -> dict[str, Array]:
    return jax.vmap(family.summary_arrays)(params)


def _check_convergence(
    course: Course, elbo: np.ndarray, schedule: ScheduleSettings, dim: int
) -> Course:
    """Begin the decay where the ELBO was flat at looks in a row."""
    # While temperature or bonus change, the ELBO follows another objective at every step.
    if not max(MIN_WINDOW, schedule.anneal_until) <= course.done < course.phases.decay_start:
        return course
    negligible = negligible_nats(course.family.negligible_gain, dim)
    is_flat = elbo_trend(elbo).is_flat(negligible) and is_balanced(course.parts[-1]["virial"])
    looks = course.flat_looks + 1 if is_flat else 0
    if looks < FLAT_LOOKS:
        return course._replace(flat_looks=looks)
    # The host looks between whole chunks only.
    decay = -(-decay_length(course.done, dim) // CHUNK) * CHUNK
    phases = Phases(course.phases.warmup, course.done, min(schedule.steps, course.done + decay))
    return course._replace(flat_looks=looks, converged=True, phases=phases)


def _line_points(posterior: LocalPosterior, start: Start) -> Beside:
    """Return the points along the direction of least curvature, and whether it is followed."""
    line, center = descent_line(posterior, start), posterior.center
    points, follows = np.zeros((LINE_POINTS, center.size)), False
    if line is not None and line.is_followed:
        points, follows = line.points, True
    # of numpy, and put on the device as it is, so that nothing is compiled for it
    return Beside(*jax.device_put((points.astype(center.dtype), np.asarray(follows))))


def _finish(
    programs: Programs,
    problem: Problem,
    course: Course,
    keys: Keys,
    options: Options,
) -> Outcome:
    """Evaluate q on all data, or a sample of them, piece by piece."""
    posterior, source = problem.posterior, options.stream or problem.data
    beside = _line_points(posterior, course.start) if options.looks_down else None
    arguments = (course.family, problem, course.state.params, keys)
    outcome, losses = None, programs.nothing_seen(problem, keys.size, beside)
    count, means = 0, []
    # One piece is read ahead: the last is the one that nothing follows.
    for piece, following in itertools.pairwise(itertools.chain(source.pieces(), [None])):
        assert piece is not None
        count += piece.num_examples
        # A running mean over pieces of any size moves by the share of the latest.
        share = jnp.asarray(piece.num_examples / count, posterior.center.dtype)
        # what follows from the losses, Hessian products among it, is computed once
        outcome, losses = programs.finish(
            *arguments, piece, losses, share, beside, concludes=following is None
        )
        means.append(np.mean(np.asarray(losses.excess)))
    assert outcome is not None  # no source is empty
    # A mean over all data has no sampling error.
    if isinstance(source, AbstractData) or not source.is_sample:
        return outcome
    running = np.asarray(posterior.learning_coefficient(jnp.asarray(means))).tolist()
    # The mean weight divides every loss, so that its relative error is one of llc.
    of_weight = abs(running[-1]) * source.weight_error
    return outcome._replace(data_error=math.hypot(error_over_pieces(running), of_weight))


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add what a block takes, which waits for its results, to the seconds of its stage."""
    began = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - began


def _silent(progress: Progress) -> None:
    """Report nothing."""
