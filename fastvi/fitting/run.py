"""Run the stages of a fit: chunk by chunk with a stopping rule, or as one traceable program."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import Ahead
from fastvi._typing import Array, Keys
from fastvi.config import VIConfig
from fastvi.evaluation.llc import error_over_pieces
from fastvi.families.base import AbstractFamily
from fastvi.fitting.optimizer import Horizon, fixed_phases
from fastvi.fitting.protocols import AbstractKeeper, Progress
from fastvi.fitting.schedule import (
    DECAY_FRACTION,
    FLAT_LOOKS,
    MIN_WINDOW,
    decay_length,
    elbo_trend,
    is_balanced,
    negligible_nats,
)
from fastvi.fitting.stages import Outcome, Programs, Stages, build_family
from fastvi.fitting.step import State
from fastvi.geometry.curvature import BLOCK
from fastvi.geometry.start import Start, rank_limit
from fastvi.kernels.noise import streams
from fastvi.target.data import AbstractData, Problem
from fastvi.target.modes import jax_setting
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
    traces: dict[str, Array]
    calibration_rounds: Any
    seconds: dict[str, float]
    converged: bool | None
    warm: bool = False
    snapshots: list[Snapshot] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Course:
    """Where a fit is between two chunks.

    All that the next one depends on, beside problem and keys.
    """

    family: AbstractFamily
    state: State
    start: Start
    calibration_rounds: Any
    phases: tuple[float, float, int]
    parts: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    snapshots: list[Snapshot] = dataclasses.field(default_factory=list)
    done: int = 0
    flat_looks: int = 0
    converged: bool | None = None


class Options(NamedTuple):
    """What a fit from the host may have beside its problem.

    Attributes:
        early_stop: Whether to stop when the ELBO is flat.
        report: Called between chunks.
        warm: Another fit to begin at, of a problem with the same number of parameters.
        keeper: Where progress is kept.
        stream: Where windows of data and the evaluation's data come from.
    """

    early_stop: bool = False
    report: Callable[[Progress], None] | None = None
    warm: Fit | None = None
    keeper: AbstractKeeper | None = None
    stream: AbstractStream | None = None


def run_fit(
    stages: Stages,
    problem: Problem,
    config: VIConfig,
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
        config: The configuration.
        chain_keys: One key for each chain.
        whitener_scale: S^{-1} from outside, in place of the configured whitening.
        options: What needs concrete values.

    Returns:
        The fit. Under a trace of jax (jit, vmap) nothing is looked at on the host and `seconds` are
        zero.
    """
    config = config.filled
    leaves = jax.tree_util.tree_leaves((problem, chain_keys, whitener_scale))
    if stages.loss.is_traced or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return Fit(*stages.whole(problem, chain_keys, whitener_scale), Clock().seconds, None)
    draws = config.steps * config.step_draws * chain_keys.size
    clock, programs = Clock(), stages.for_work(draws, problem.posterior.center.size)
    report = options.report or _silent
    report(Progress("curvature", 0, config.steps, float("nan")))
    chunk = chunk_length(config.steps) if any(options) else config.steps
    piece = _piece_length(config, chunk)
    course = clock.time(
        "adaptation",
        lambda: _begin(programs, problem, config, chain_keys, whitener_scale, options, piece),
    )
    if options.keeper is not None:
        options.keeper.restore(course)
    _run_chunks(programs, problem, config, course, chain_keys, clock, chunk, options)
    report(Progress("evaluation", config.steps, config.steps, float("nan")))
    family, params, start = course.family, course.state.params, course.start
    arguments, source = (family, problem, params, chain_keys), options.stream or problem.data
    outcome = clock.time("evaluation", lambda: _finish(programs, arguments, source))
    traces: dict[str, Array] = {
        name: jnp.concatenate([part[name] for part in course.parts], axis=1)
        for name in course.parts[0]
    }
    rounds, warm = course.calibration_rounds, options.warm is not None
    return Fit(
        family,
        params,
        start,
        outcome,
        traces,
        rounds,
        clock.seconds,
        course.converged,
        warm,
        course.snapshots,
    )


def chunk_length(steps: int) -> int:
    """Return the length of chunks, of which one program makes all steps, with the fewest steps beyond the last."""
    return (
        steps
        if steps <= CHUNK
        else min(range(CHUNK, CHUNK // 2 - 1, -1), key=lambda length: -steps % length)
    )


def _piece_length(config: VIConfig, chunk: int) -> int:
    """Return the length of what one call of the program runs.

    A chunk, or what divides it and the way to a snapshot.

    Chunks are the same with snapshots or without, and with them where the stopping rule looks.
    """
    return math.gcd(chunk, config.eval_every) if config.tensorboard else chunk


def _begin(
    programs: Programs,
    problem: Problem,
    config: VIConfig,
    keys: Keys,
    whitener_scale: Array | None,
    options: Options,
    chunk: int,
) -> Course:
    """Start from the curvature at w*, or from another fit's q moved to w*."""
    phases, converged = fixed_phases(config), None
    if options.early_stop:
        phases = (
            min(phases[0], MAX_ADAPTIVE_WARMUP),
            config.steps / (1 + DECAY_FRACTION),
            config.steps,
        )
        converged = False
    key = streams.shared_key()
    if options.warm is not None:
        start = _known_before(options.warm.start)
        launched = programs.relaunch(options.warm.family, problem, options.warm.params, key)
    else:
        start = programs.prepare(problem, key, whitener_scale)
        limit = rank_limit(
            config, problem.posterior.center.size, problem.posterior.center.dtype.itemsize
        )
        rank = min(limit, -(-int(start.rank) // BLOCK) * BLOCK)
        launched = _launch(
            programs,
            (build_family(config, start, rank), problem, start.core[:rank], key, keys),
            chunk,
            options.stream,
        )
    family, state, rounds = launched
    return Course(family, state, start, rounds, phases, converged=converged)


def _known_before(start: Start) -> Start:
    """Return the start of another fit as one that cost nothing and says nothing of the spectrum at this w*."""
    none, unknown = jnp.zeros_like(start.num_hvp), jnp.full_like(start.lowest, jnp.nan)
    return dataclasses.replace(start, num_values=none, num_hvp=none, lowest=unknown)


def _launch(
    programs: Programs, arguments: tuple, chunk: int, stream: AbstractStream | None
) -> tuple[AbstractFamily, State, Array]:
    """Run the launch, with the programs of the later stages compiling beside it."""
    _, problem, _, _, chain_keys = arguments
    if jax_setting("jax_disable_jit"):  # then nothing is to be compiled
        return programs.launch(*arguments)
    with Ahead() as ahead:
        traced = programs.launch.trace(*arguments)
        ahead.compile("launch", traced.lower())
        family, state, _ = traced.out_info
        scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        horizon = Horizon(scalar, scalar, scalar)
        lowered = programs.steps.lower(
            family, problem, state, chain_keys, step, horizon, length=chunk
        )
        ahead.compile("steps", lowered)
        if stream is None:
            common = family, problem, state.params, chain_keys, problem.data
            nothing = programs.nothing_seen(problem, chain_keys.size)
            share = jax.ShapeDtypeStruct((), problem.posterior.center.dtype)
            ahead.compile("finish", programs.finish.lower(*common, nothing, share))
        ahead.wait(("launch", "steps") if stream else ("launch", "steps", "finish"))
    return programs.launch(*arguments)


def _run_chunks(
    programs: Programs,
    problem: Problem,
    config: VIConfig,
    course: Course,
    keys: Keys,
    clock: "Clock",
    chunk: int,
    options: Options,
) -> None:
    """Run the steps.

    With `early_stop`, at the peak rate until the ELBO is flat, then through the decay.
    """
    report = options.report or _silent
    while course.done < course.phases[2]:
        if options.stream is not None and course.done:
            problem = dataclasses.replace(problem, data=options.stream.window(course.done))
        length = min(chunk, course.phases[2] - course.done)
        horizon = Horizon(*(jnp.asarray(step, jnp.float32) for step in course.phases))
        arguments = problem, keys, horizon, course.done + length, _piece_length(config, chunk)
        part = clock.time(
            "sampling", lambda arguments=arguments: _advance(programs, config, course, *arguments)
        )
        course.parts.append(part)
        elbo = np.concatenate([part["elbo"] for part in course.parts], axis=1)
        report(
            Progress("fit", course.done, course.phases[2], float(np.mean(elbo[:, -length:])), part)
        )
        if not np.all(np.isfinite(elbo[:, -1])):
            break
        if options.early_stop and not course.converged:
            _look(course, elbo, config, problem.posterior.center.size, chunk)
        if options.keeper is not None:
            options.keeper.save(course)


def _advance(
    programs: Programs,
    config: VIConfig,
    course: Course,
    problem: Problem,
    keys: Keys,
    horizon: Horizon,
    end: int,
    piece: int,
) -> dict[str, np.ndarray]:
    """Run the steps up to `end` in pieces, with a snapshot of q after each where TensorBoard will ask."""
    pieces = []
    while course.done < end:
        length = min(piece, end - course.done)
        arguments = course.family, problem, course.state, keys, jnp.int32(course.done), horizon
        course.state, traces = programs.steps(*arguments, length=piece)
        pieces.append({name: np.asarray(trace)[:, :length] for name, trace in traces.items()})
        course.done += length
        if config.tensorboard and course.done % config.eval_every == 0:
            arrays = jax.device_get(_described(course.family, course.state.params))
            course.snapshots.append(Snapshot(course.done - 1, arrays))
    return {name: np.concatenate([part[name] for part in pieces], axis=1) for name in pieces[0]}


@jax.jit
def _described(family: AbstractFamily, params: Any) -> dict[str, Array]:
    return jax.vmap(family.summary_arrays)(params)


def _look(course: Course, elbo: np.ndarray, config: VIConfig, dim: int, chunk: int) -> None:
    """Begin the decay where the ELBO was flat at looks in a row."""
    warmup, decay_start, _ = course.phases
    if not max(MIN_WINDOW, config.settled_after) <= course.done < decay_start:
        return
    negligible = negligible_nats(course.family.negligible_gain, dim)
    settled = elbo_trend(elbo).is_flat(negligible) and is_balanced(course.parts[-1]["virial"])
    course.flat_looks = course.flat_looks + 1 if settled else 0
    if course.flat_looks == FLAT_LOOKS:
        course.converged = True
        decay = -(-decay_length(course.done, dim) // chunk) * chunk
        course.phases = (warmup, course.done, min(config.steps, course.done + decay))


def _finish(programs: Programs, arguments: tuple, source: AbstractData | AbstractStream) -> Outcome:
    """Evaluate q on all data, or a sample of them, piece by piece."""
    _, problem, _, keys = arguments
    posterior, running = problem.posterior, []
    outcome, losses, count = None, programs.nothing_seen(problem, keys.size), 0
    for piece in source.pieces():
        count += piece.num_examples
        share = jnp.asarray(piece.num_examples / count, posterior.center.dtype)
        outcome, losses = programs.finish(*arguments, piece, losses, share)
        running.append(float(jnp.mean(posterior.learning_coefficient(losses.excess))))
    assert outcome is not None  # no source is empty
    if isinstance(source, AbstractData) or not source.is_sample:
        return outcome
    of_weight = abs(running[-1]) * source.weight_error
    return outcome._replace(data_error=math.hypot(error_over_pieces(running), of_weight))


class Clock:
    """Sum the seconds of each stage, waiting for results."""

    def __init__(self):
        self.seconds = {"adaptation": 0.0, "sampling": 0.0, "evaluation": 0.0}

    def time(self, stage: str, call: Callable[[], Any]) -> Any:
        """Run a stage."""
        began = time.perf_counter()
        result = jax.block_until_ready(call())
        self.seconds[stage] += time.perf_counter() - began
        return result


def _silent(progress: Progress) -> None:
    """Report nothing."""
