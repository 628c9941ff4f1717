"""Run the stages of a fit: chunk by chunk with a stopping rule, or as one traceable program."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Keys
from fastvi.compilation import Ahead
from fastvi.config import VIConfig
from fastvi.families.base import AbstractFamily
from fastvi.geometry.curvature import BLOCK
from fastvi.geometry.start import Start, rank_limit
from fastvi.inference.loop import Problem, State
from fastvi.inference.optimizer import Horizon, fixed_phases
from fastvi.inference.programs import Outcome, Programs, Stages, build_family, start_key
from fastvi.inference.schedule import (
    DECAY_FRACTION,
    FLAT_LOOKS,
    MIN_WINDOW,
    decay_length,
    elbo_trend,
    is_balanced,
)

CHUNK = 100  # steps between looks at the traces
MAX_ADAPTIVE_WARMUP = 100  # steps; a run that stops by itself is not planned to last


class Progress(NamedTuple):
    """What a progress callback is told; `value` is the ELBO of a fit, the llc so far of a correction."""

    stage: str
    step: int
    steps: int
    value: float


@dataclasses.dataclass
class Fit:
    """A finished fit, before anyone interprets it."""

    family: AbstractFamily
    params: Any
    start: Start
    outcome: Outcome
    traces: dict[str, Array]
    calibration_rounds: Any
    seconds: dict[str, float]
    converged: bool | None


def run_fit(
    stages: Stages,
    problem: Problem,
    config: VIConfig,
    chain_keys: Keys,
    *,
    whitener_scale: Array | None = None,
    early_stop: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> Fit:
    """Run all stages.

    What the chains share, the start from the curvature at w*, is random but the same for every key: a fit of the same
    problem by another key has the same core and needs no other program.

    Args:
        stages: The stages.
        problem: Target and data.
        config: The configuration.
        chain_keys: One key for each chain.
        whitener_scale: S^{-1} from outside, in place of the configured whitening.
        early_stop: Whether to stop when the ELBO is flat; needs concrete values.
        report: Called between chunks.

    Returns:
        The fit. Under a trace of jax (jit, vmap) nothing is looked at on the host and `seconds` are zero.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves((problem, chain_keys)))
    if traced:
        return Fit(*stages.whole(problem, chain_keys, whitener_scale), Clock().seconds, None)
    dim = problem.posterior.center.size
    clock, programs = Clock(), stages.for_work(config.steps, dim)
    report = report or _silent
    report(Progress("curvature", 0, config.steps, float("nan")))
    key = start_key()
    start = clock.time("adaptation", lambda: programs.prepare(problem, key, whitener_scale))
    limit = rank_limit(config, problem.posterior.center.size, problem.posterior.center.dtype.itemsize)
    rank = min(limit, -(-int(start.rank) // BLOCK) * BLOCK)
    chunk = min(CHUNK, config.steps) if early_stop or report is not _silent else config.steps
    launch_arguments = (build_family(config, start, rank), problem, start.core[:rank], key, chain_keys)
    family, state, rounds = clock.time("adaptation", lambda: _launch(programs, launch_arguments, chunk))
    state, traces, converged = _run_chunks(
        programs,
        family,
        problem,
        config,
        state,
        chain_keys,
        clock,
        chunk=chunk,
        early_stop=early_stop,
        report=report,
    )
    report(Progress("evaluation", config.steps, config.steps, float("nan")))
    outcome = clock.time("evaluation", lambda: programs.finish(family, problem, state.params, chain_keys))
    return Fit(family, state.params, start, outcome, traces, rounds, clock.seconds, converged)


def _launch(programs: Programs, arguments: tuple, chunk: int) -> tuple[AbstractFamily, State, Array]:
    """Run the launch, with the programs of the later stages compiling beside it."""
    _, problem, _, _, chain_keys = arguments
    ahead = Ahead()
    traced = programs.launch.trace(*arguments)
    ahead.compile("launch", traced.lower())
    family, state, _ = traced.out_info
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    horizon = Horizon(scalar, scalar, scalar)
    ahead.compile("steps", programs.steps.lower(family, problem, state, chain_keys, step, horizon, length=chunk))
    ahead.compile("finish", programs.finish.lower(family, problem, state.params, chain_keys))
    ahead.wait(("launch", "steps", "finish"))
    ahead.close()
    return programs.launch(*arguments)


def _run_chunks(
    programs: Programs,
    family: AbstractFamily,
    problem: Problem,
    config: VIConfig,
    state: State,
    keys: Keys,
    clock: "Clock",
    *,
    chunk: int,
    early_stop: bool,
    report: Callable[[Progress], None],
) -> tuple[State, dict[str, Array], bool | None]:
    """Run the steps; with `early_stop`, at the peak rate until the ELBO is flat, then through the decay."""
    parts, done, looks, converged = [], 0, 0, None
    warmup, decay_start, end = fixed_phases(config)
    if early_stop:
        warmup = min(warmup, MAX_ADAPTIVE_WARMUP)
        decay_start, converged = config.steps / (1 + DECAY_FRACTION), False
    while done < end:
        length = min(chunk, end - done)
        horizon = Horizon(*(jnp.asarray(x, jnp.float32) for x in (warmup, decay_start, end)))
        state, part = clock.time(
            "sampling",
            lambda state=state, done=done, horizon=horizon, length=length: programs.steps(
                family, problem, state, keys, jnp.int32(done), horizon, length=length
            ),
        )
        parts.append(part)
        done += length
        if not early_stop and report is _silent:
            continue
        elbo = np.concatenate([np.asarray(part["elbo"]) for part in parts], axis=1)
        report(Progress("fit", done, end, float(np.mean(elbo[:, -length:]))))
        if not np.all(np.isfinite(elbo[:, -1])):
            break
        if early_stop and not converged and MIN_WINDOW <= done < decay_start:
            settled = elbo_trend(elbo).is_flat and is_balanced(np.asarray(part["virial"]))
            looks = looks + 1 if settled else 0
            if looks == FLAT_LOOKS:
                converged = True
                decay_start, end = (
                    done,
                    min(config.steps, done + -(-decay_length(done, problem.posterior.center.size) // chunk) * chunk),
                )
    traces = {name: jnp.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    return state, traces, converged


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
