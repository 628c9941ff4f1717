"""The compiled stages of a fit: prepare, launch, steps, finish.

One set for each loss, settings and shapes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import (
    PROGRAMS,
    compiler_options,
    options_by_speed,
    speed_for,
)
from fastvi._typing import Array, Float, Key, Keys, PyTree, Scalar
from fastvi.evaluation.llc import (
    Beside,
    DataLosses,
    Evaluation,
    EvaluationSettings,
    draws_at_once,
    evaluate,
    evaluation_draws,
    full_losses_at,
    losses_at,
)
from fastvi.families import FAMILIES
from fastvi.families.base import AbstractFamily, Geometry
from fastvi.fitting.calibrate import MAX_ROUNDS, calibration_steps, narrowing
from fastvi.fitting.sharding import data_parallel_mean, over_devices
from fastvi.fitting.step import State, StepSettings, init_state, run_steps
from fastvi.fitting.step_plan import (
    ScheduleSettings,
    StepPlan,
    fixed_phases,
    frozen,
    plan_steps,
)
from fastvi.geometry.start import Start, StartSettings, make_start, most_products, rank_limit
from fastvi.kernels.noise import split_key, streams
from fastvi.target.data import AbstractData, Problem, shared_mean
from fastvi.target.fingerprint import Fingerprint, fingerprint_loss, shapes_of
from fastvi.target.objective import FlatObjective, call_full_loss


class FitSettings(NamedTuple):
    """What the programs of a fit are made for, beside the family that they are called with.

    Attributes:
        start: What the start reads.
        step: What the steps read.
        evaluation: What the evaluation reads.
    """

    start: StartSettings
    step: StepSettings
    evaluation: EvaluationSettings


class FamilyChoice(NamedTuple):
    """The name of a family, and its `Settings`."""

    name: str
    settings: Any


class FromCurvature(eqx.Module):
    """The q that a fit begins at by itself: drawn about the core of the curvature at w*."""

    family: AbstractFamily
    core: Float[Array, "core dim"]
    keys: Keys

    def family_and_params(self) -> tuple[AbstractFamily, PyTree]:
        """Return the family, and the parameters of every chain."""
        flat = jnp.zeros_like(self.family.scale)
        params = jax.vmap(lambda key: self.family.init(key, self.core, flat))(self.keys)
        # else XLA puts the hash of the draws into each of their readers
        return self.family, jax.lax.optimization_barrier(params)


class FromFit(eqx.Module):
    """The q that another fit has ended at."""

    family: AbstractFamily
    params: PyTree

    def family_and_params(self) -> tuple[AbstractFamily, PyTree]:
        """Return them."""
        return self.family, self.params


class Outcome(NamedTuple):
    """What the last stage returns: for each chain, and on all data at w* the loss and its gradient.

    `slope` is None where the loss on all data is a function of the caller's. `data_error` is what
    the sample adds to the error of llc where the data were a sample. `beside` is the excess at
    points beside the draws, where some were given.
    """

    evaluation: Evaluation
    reference_loss: Scalar
    slope: Float[Array, " dim"] | None
    arrays: dict[str, Array]
    data_error: float = 0.0
    beside: Float[Array, " points"] | None = None


class Programs(NamedTuple):
    """The stages, compiled for calls from the host or plain for use inside a trace.

    Attributes:
        prepare: `(problem, key, whitener_scale) -> Start`.
        launch: `(origin, shift, slow) -> (family, State)` of every chain, from a `FromCurvature` or
            a `FromFit`: q scaled by exp(shift), which learns slowly where `slow`.
        steps: `(family, problem, state, chain_keys, plan) -> (State, traces)`; compiled, it
            consumes the state.
        finish: `(family, problem, params, chain_keys, piece, before, share, beside) -> (Outcome,
            DataLosses)`: what all pieces of the data up to this one say, which is a `share` of
            them; `before` is what those before it said. Points `beside` the draws are evaluated
            with those of the first chain.
        nothing_seen: `(problem, chains, beside) -> DataLosses` before the first piece.
    """

    prepare: Callable[..., Start]
    launch: Callable[..., tuple[AbstractFamily, State]]
    steps: Callable[..., tuple[State, dict[str, Float[Array, "chains rows"]]]]
    finish: Callable[..., tuple[Outcome, DataLosses]]
    nothing_seen: Callable[..., DataLosses]


class Stages(NamedTuple):
    """One set of stages in all forms.

    Attributes:
        compiled: For calls from the host.
        steps: The steps alone, compiled by each of `options_by_speed`.
        plain: Not compiled, for use inside a trace.
        settings: What they are made for.
        loss: What the loss computes; where it closes over values of an enclosing trace only
            `plain` can be used.
    """

    compiled: Programs
    steps: tuple[Callable[..., Any], ...]
    plain: Programs
    settings: FitSettings
    loss: Fingerprint

    def for_work(self, draws: int, problem: Problem) -> Programs:
        """Return the compiled stages, whose steps make so many draws from q in all.

        Where these are few, the steps compile sooner and run slower.
        """
        of_draw = self.loss.bytes_at_draw(problem.posterior.center.size, problem.batch_size)
        return self.compiled._replace(steps=self.steps[speed_for(draws * of_draw)])


def programs_for(
    objective: FlatObjective,
    problem: Problem,
    settings: FitSettings,
    loss_full_flat: Callable | None = None,
    loss: Fingerprint | None = None,
) -> Stages:
    """Return the stages.

    Functions that compute the same share them, compiled, for one set of settings and shapes.

    The stages call the functions as long as somebody else holds them: what is not compiled by then
    cannot be.

    Args:
        objective: The loss.
        problem: Target and data.
        settings: What the programs are made for.
        loss_full_flat: The caller's own loss on all data, if there is one.
        loss: What the functions compute, where that has been found on batches of these shapes;
            traced anew when left out.
    """
    loss = loss or fingerprint_loss(objective, problem, loss_full_flat)
    # Programs that close over values of a trace end with it, and are not kept.
    if loss.is_traced:
        return _build(objective, problem, settings, loss_full_flat, loss)
    return PROGRAMS.find(
        loss,
        ("fit", settings, shapes_of(problem)),
        (objective, loss_full_flat),
        lambda objective, full: _build(objective, problem, settings, full, loss),
    )


def _build(
    objective: Any,
    problem: Problem,
    settings: FitSettings,
    loss_full_flat: Callable | None,
    loss: Fingerprint,
) -> Stages:
    def prepare(problem: Problem, key: Key, whitener_scale: Float[Array, " dim"] | None) -> Start:
        key_subset, key_start = (
            streams.derive(key, purpose)
            for purpose in (streams.Purpose.SUBSET, streams.Purpose.CURVATURE)
        )
        return make_start(
            objective,
            problem.posterior,
            problem.data.subset(key_subset, settings.start.examples),
            problem.next_data,
            settings.start,
            key_start,
            whitener_scale,
        )

    def launch(origin: FromCurvature | FromFit, shift, slow):
        family, params = origin.family_and_params()
        family = family.with_slow_start(slow)
        params = jax.vmap(lambda one: family.widened(one, shift))(params)
        return family, jax.vmap(lambda one: init_state(family, one, settings.step))(params)

    def steps(family, problem, state, keys, plan: StepPlan):
        def stage(shared, stacked):
            (family, problem, plan), (state, keys) = shared, stacked
            return run_steps(family, objective, problem, settings.step, state, keys, plan)

        return over_devices(stage, (family, problem, plan), (state, keys))

    plain = Programs(
        prepare,
        launch,
        steps,
        finish=_evaluation(objective, settings.evaluation, loss_full_flat),
        nothing_seen=functools.partial(
            nothing_seen,
            num_draws=settings.evaluation.num_draws,
            has_slope=loss_full_flat is None,
        ),
    )
    return _compiled(plain, settings, problem, loss)


def _evaluation(
    objective: FlatObjective, settings: EvaluationSettings, loss_full_flat: Callable | None
) -> Callable:
    """Return the stage after the last step."""

    def finish(
        family: AbstractFamily,
        problem: Problem,
        params,
        keys: Keys,
        data: AbstractData,
        before: DataLosses,
        share,
        beside: Beside | None = None,
        *,
        spread: bool = False,
        concludes: bool = True,
    ) -> tuple[Outcome | None, DataLosses]:
        center = problem.posterior.center

        def one(inputs):
            chain_params, chain_key, chain_before, is_first = inputs
            # what no draw of q is of is the same for all chains
            wanted = beside and beside._replace(wanted=beside.wanted & is_first)
            draws = evaluation_draws(family, chain_params, chain_key, settings.num_draws)
            losses = jax.tree_util.tree_map(
                lambda old, new: old + share * (new - old),
                chain_before,
                _losses_on(
                    objective, loss_full_flat, data, (center, draws.displacement, wanted), spread
                ),
            )
            if not concludes:
                return losses
            evaluation = evaluate(
                family,
                chain_params,
                objective,
                problem,
                draws,
                losses,
                chain_key,
                control_variate=settings.control_variate,
                trace_probes=settings.trace_probes,
            )
            return evaluation, losses, family.summary_arrays(chain_params)

        found = jax.lax.map(one, (params, keys, before, jnp.arange(keys.size) == 0))
        if not concludes:
            return None, found
        evaluation, losses, arrays = found
        # What is said of w* itself is the same for all chains.
        _, reference, slope, at_beside = jax.tree_util.tree_map(lambda leaf: leaf[0], losses)
        return Outcome(evaluation, reference, slope, arrays, beside=at_beside), losses

    return finish


def _losses_on(
    objective: FlatObjective,
    loss_full_flat: Callable | None,
    data: AbstractData,
    points: tuple[Float[Array, " dim"], Float[Array, "draws dim"], Beside | None],
    spread: bool,
) -> DataLosses:
    """Return the mean losses of data at w*, at draws from it, and at points beside them.

    By the caller's own loss on all data, if there is one; over all devices where `spread`.
    """
    center, displacement, _ = points
    if loss_full_flat is not None:
        full = functools.partial(call_full_loss, loss_full_flat, data=data.examples)
        return full_losses_at(full, center, displacement)

    def at_points(center, displacement, beside, batch):
        return losses_at(objective, center, displacement, batch, beside)

    # What runs inside a trace of the caller's is not spread over devices.
    mean = data_parallel_mean if spread else shared_mean
    # A pass takes w* beside a group of draws.
    return mean(at_points, data, points, 1 + draws_at_once(displacement.shape[0]))


def nothing_seen(
    problem: Problem,
    chains: int,
    beside: Beside | None = None,
    *,
    num_draws: int,
    has_slope: bool,
) -> DataLosses:
    """Return what no data say, for `finish` to begin with."""
    center = problem.posterior.center

    def zeros(*shape: int) -> Array:
        return jax.device_put(np.zeros((chains, *shape), center.dtype))  # which compiles nothing

    slope = zeros(center.size) if has_slope else None
    return DataLosses(
        zeros(num_draws), zeros(), slope, beside and zeros(beside.displacement.shape[0])
    )


def _compiled(
    plain: Programs, settings: FitSettings, problem: Problem, loss: Fingerprint
) -> Stages:
    center = problem.posterior.center
    products = most_products(settings.start, center.size, center.dtype.itemsize)
    examples = min(settings.start.examples, problem.num_data)
    # a Hessian product computes about what two gradients do
    of_start = products * loss.bytes_at_draw(center.size, 2 * examples)
    of_draw = loss.bytes_at_draw(center.size, problem.num_data)
    of_evaluation = settings.evaluation.num_draws * of_draw

    def jit(function: Callable, computed: float, **options: Any) -> Callable:
        return jax.jit(function, compiler_options=compiler_options(computed), **options)

    # The state holds q and its moments: donated, the new one takes the memory of the old.
    steps = tuple(
        jax.jit(plain.steps, donate_argnames=("state",), compiler_options=one)
        for one in options_by_speed()
    )
    compiled = Programs(
        prepare=jit(plain.prepare, of_start),
        launch=jit(plain.launch, loss.bytes_at_draw(center.size, 0)),
        steps=steps[-1],
        finish=jit(
            functools.partial(plain.finish, spread=True),
            of_evaluation,
            # The pieces before the last take a program without the evaluation.
            static_argnames=("concludes",),
        ),
        nothing_seen=plain.nothing_seen,
    )
    return Stages(compiled, steps, plain, settings, loss)


def fit_inside_a_trace(
    stages: Stages,
    choice: FamilyChoice,
    schedule: ScheduleSettings,
    problem: Problem,
    keys: Keys,
    whitener_scale: Array | None,
) -> dict[str, Any]:
    """Run all stages, with as many steps as the schedule has, as one program.

    The core has all the rows that it may have, since their number is not known.

    Returns:
        family, params, start, outcome, traces, calibration_rounds.
    """
    plain, settings, center = stages.plain, stages.settings, problem.posterior.center
    start = plain.prepare(problem, streams.shared_key(), whitener_scale)
    rank = rank_limit(settings.start, center.size, center.dtype.itemsize)
    family = build_family(choice, settings.start, start, rank)
    origin = FromCurvature(family, start.core[:rank], keys)

    length, phases = calibration_steps(keys.size, settings.step.num_draws), fixed_phases(schedule)
    probe = frozen(plan_steps(schedule, phases, 0, length, length, center.dtype))
    begin = (jnp.zeros((), center.dtype), jnp.int32(0), jnp.asarray(True))

    def adjust(carry):
        shift, rounds, _ = carry
        family, state = plain.launch(origin, shift, jnp.asarray(False))
        # Each round draws by the numbers of other steps.
        step = probe.rows.step + rounds * length
        measured = probe._replace(rows=probe.rows._replace(step=step))
        traces = plain.steps(family, problem, state, calibration_keys(keys.size), measured)[1]
        less = narrowing(jnp.mean(traces["virial"]), jnp).astype(shift.dtype)
        return shift - less, rounds + 1, less > 0

    shift, rounds, _ = jax.lax.while_loop(
        lambda carry: carry[2] & (carry[1] < MAX_ROUNDS), adjust, begin
    )
    family, state = plain.launch(origin, shift, rounds == 1)
    plan = plan_steps(schedule, phases, 0, schedule.steps, schedule.steps, center.dtype)
    state, traces = plain.steps(family, problem, state, keys, plan)
    nothing = plain.nothing_seen(problem, keys.size)
    outcome, _ = plain.finish(family, problem, state.params, keys, problem.data, nothing, 1.0)
    return {
        "family": family,
        "params": state.params,
        "start": start,
        "outcome": outcome,
        "traces": traces,
        "calibration_rounds": rounds,
    }


def calibration_keys(num_chains: int) -> Keys:
    """Return a key for each chain's calibration, none of those that the fit draws from."""
    return split_key(streams.derive(streams.shared_key(), streams.Purpose.CALIBRATION), num_chains)


def build_family(
    choice: FamilyChoice, settings: StartSettings, start: Start, core_rows: int
) -> AbstractFamily:
    """Instantiate the family with `core_rows` rows of core, a padding of the rows in use."""
    # put on the device, for which nothing is compiled
    scale, core, unit = jax.device_put((start.scale, start.core[:core_rows], start.rest**-0.5))
    geometry = Geometry(
        scale=scale,
        core=core,
        rank=start.rank,
        unit=unit,
        noise_size=rank_limit(settings, start.scale.size, start.scale.dtype.itemsize),
    )
    return FAMILIES[choice.name].create(choice.settings, geometry)
