"""How long jax traces and compiles before a first and a second estimate at d = 1e4."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from bench.harness import record
from bench.problems import BATCH, tanh_network
from fastvi import LocalPosterior, VIConfig, estimate_llc, make_flat_objective
from fastvi.api.plan import family_choice, fit_schedule, fit_settings, with_draws
from fastvi.fitting.stages import FromCurvature, build_family, programs_for
from fastvi.fitting.step_plan import fixed_phases, plan_steps
from fastvi.target.data import Problem, hold
from fastvi.target.stream import CHUNK

SIZE, NUM_DATA = 10_000, 2_000
CHAINS = 1  # of a fit that walkers begin at
STEPS = 2 * CHUNK  # the programs are those of a fit of any length
ASKED = {"first estimate": 4.0, "second estimate": 0.0}  # seconds


def stage_rows():
    """Trace, lower and compile each stage by itself."""
    loss, center, data = tanh_network(SIZE, NUM_DATA)
    posterior = LocalPosterior(center, jnp.float32(NUM_DATA / math.log(NUM_DATA)), jnp.float32(1.0))
    problem = Problem(posterior, hold(data), BATCH)
    config = with_draws(VIConfig(), center.size, 1.0)
    settings, schedule = fit_settings(config), fit_schedule(config)
    objective = make_flat_objective(loss)
    draws = STEPS * settings.step.num_draws * CHAINS
    programs = programs_for(objective, problem, settings).for_work(draws, problem)
    key, keys = jax.random.key(0), jax.random.split(jax.random.key(1), CHAINS)
    plan = plan_steps(schedule, fixed_phases(schedule), 0, CHUNK, CHUNK, np.float32)
    rows = []

    def compiled(stage, function, *args):
        began = time.perf_counter()
        lowered = function.lower(*args)
        middle = time.perf_counter()
        program = lowered.compile()
        end = time.perf_counter()
        rows.append(
            _row(stage, center.size, middle - began, end - middle, program.as_text().count("\n"))
        )
        return program(*args)

    start = compiled("prepare", programs.prepare, problem, key, None)
    rank = start.core.shape[0]
    family = build_family(family_choice(config), settings.start, start, rank)
    origin = FromCurvature(family, start.core, keys)
    launched = origin, np.float32(0), np.bool_(False)
    family, state = compiled("launch", programs.launch, *launched)
    state, _ = compiled("steps", programs.steps, family, problem, state, keys, plan)
    nothing = programs.nothing_seen(problem, CHAINS)
    common = family, problem, state.params, keys, problem.data, nothing
    compiled("finish", programs.finish, *common, jnp.float32(1))
    return rows


def _row(stage, dim, trace, compile_, lines):
    known = trace != ""
    return {
        "stage": stage,
        "d": dim,
        "trace_s": trace,
        "compile_s": compile_,
        "total_s": trace + compile_ if known else compile_,
        "asked_s": ASKED.get(stage, ""),
        "hlo_lines": lines,
    }


def test_compile(benchmark):
    loss, center, data = tanh_network(SIZE, NUM_DATA)

    def estimate(seed):
        return estimate_llc(loss, center, data, key=seed, steps=STEPS, progress=False, throw=False)

    jax.clear_caches()
    first = benchmark.pedantic(estimate, args=(0,), rounds=1)
    second = estimate(1)
    totals = [
        _row(stage, center.size, "", result.timings.compile, "")
        for stage, result in (("first estimate", first), ("second estimate", second))
    ]
    jax.clear_caches()
    record("compile", [*stage_rows(), *totals])
