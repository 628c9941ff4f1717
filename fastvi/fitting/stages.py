"""The compiled stages of a fit.

Prepare, launch, steps, finish. One set for each loss, configuration and shapes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastvi._compilation import PROGRAMS, quick_compilation
from fastvi._typing import Array, Float, Int, Key, Keys, Scalar
from fastvi.config import VIConfig
from fastvi.evaluation.llc import (
    DataLosses,
    Evaluation,
    draws_at_once,
    evaluate,
    evaluation_draws,
    full_losses_at,
    losses_at,
)
from fastvi.families import FAMILIES
from fastvi.families.backends import BACKENDS
from fastvi.families.base import AbstractFamily, Geometry
from fastvi.fitting.calibrate import calibrate_scale
from fastvi.fitting.optimizer import Horizon, fixed_phases
from fastvi.fitting.sharding import data_parallel_mean, over_devices
from fastvi.fitting.step import State, init_state, run_steps
from fastvi.geometry.start import Start, make_start, rank_limit
from fastvi.kernels.noise import streams
from fastvi.target.data import AbstractData, Problem, shared_mean
from fastvi.target.fingerprint import Fingerprint, fingerprint_loss, shapes_of
from fastvi.target.objective import FlatObjective, call_full_loss

# Draws of all steps and chains times dim up to which a second of compilation outweighs a quarter of
# the steps' time.
QUICK_WORK = 1e8


class Outcome(NamedTuple):
    """What the last stage returns: for each chain, and on all data at w* the loss and its gradient.

    `slope` is None where the loss on all data is a function of the caller's. `data_error` is what
    the sample adds to the error of llc where the data were a sample.
    """

    evaluation: Evaluation
    reference_loss: Scalar
    slope: Float[Array, " dim"] | None
    arrays: dict[str, Array]
    data_error: float = 0.0


class Programs(NamedTuple):
    """The stages, compiled for calls from the host or plain for use inside a trace.

    Attributes:
        prepare: `(problem, key, whitener_scale) -> Start`.
        launch: `(family, problem, core, key, chain_keys) -> (family, State, rounds of
            calibration)`.
        steps: `(family, problem, state, chain_keys, first_step, horizon, length) -> (State,
            traces)`; compiled, it consumes the state.
        finish: `(family, problem, params, chain_keys, piece, before, share) -> (Outcome,
            DataLosses)`: what all pieces of the data up to this one say, which is a `share` of
            them; `before` is what those before it said.
        nothing_seen: `(problem, chains) -> DataLosses` before the first piece.
        relaunch: `(family, problem, params, key)` -> the same as `launch`, from the q of another
            fit.
        excess_along: `(w*, displacements, piece)` -> mean loss of the piece at these above that at
            w*.
    """

    prepare: Callable[..., Start]
    launch: Callable[..., tuple[AbstractFamily, State, Int[Array, ""]]]
    steps: Callable[..., tuple[State, dict[str, Float[Array, "chains steps"]]]]
    finish: Callable[..., tuple[Outcome, DataLosses]]
    nothing_seen: Callable[..., DataLosses]
    relaunch: Callable[..., tuple[AbstractFamily, State, Int[Array, ""]]]
    excess_along: Callable[..., Float[Array, " points"]]


class Stages(NamedTuple):
    """One set of stages in all forms.

    Attributes:
        quick: Compiled sooner, run slower.
        compiled: Compiled for speed.
        whole: `(problem, chain_keys, whitener_scale)` -> family, params, Start, Outcome, traces,
            rounds: a fit of fixed length as one program, for use inside a trace.
        loss: What the loss computes; where it closes over values of an enclosing trace only `whole`
            can be used.
    """

    quick: Programs
    compiled: Programs
    whole: Callable[..., tuple[AbstractFamily, Any, Start, Outcome, dict[str, Array], Scalar]]
    loss: Fingerprint

    def for_work(self, draws: int, dim: int) -> Programs:
        """Return the compiled stages, with steps that compile sooner and run slower where they make few draws."""
        return self.quick if draws * dim <= QUICK_WORK else self.compiled


def programs_for(
    objective: FlatObjective,
    problem: Problem,
    config: VIConfig,
    loss_full_flat: Callable | None = None,
) -> Stages:
    """Return the stages.

    Functions that compute the same share them, compiled, for one configuration and shapes.

    The stages call the functions as long as somebody else holds them: what is not compiled by then
    cannot be.
    """
    loss, config = fingerprint_loss(objective, problem, loss_full_flat), config.filled
    if loss.is_traced:
        return _build(objective, config, loss_full_flat, loss)
    # a family or a backend that is registered anew under an old name is another one
    key = ("fit", config, shapes_of(problem), FAMILIES[config.family], BACKENDS.get(config.backend))
    functions = (objective, loss_full_flat)
    return PROGRAMS.find(
        loss, key, functions, lambda objective, full: _build(objective, config, full, loss)
    )


def _build(
    objective: Any, config: VIConfig, loss_full_flat: Callable | None, loss: Fingerprint
) -> Stages:
    def prepare(problem: Problem, key: Key, whitener_scale: Float[Array, " dim"] | None) -> Start:
        key_subset, key_start = (
            streams.derive(key, purpose)
            for purpose in (streams.Purpose.SUBSET, streams.Purpose.CURVATURE)
        )
        subset = problem.data.subset(key_subset, config.hessian_examples)
        return make_start(
            objective,
            problem.posterior,
            subset,
            problem.next_batch,
            config,
            key_start,
            whitener_scale,
        )

    def launch(family: AbstractFamily, problem: Problem, core, key: Key, keys: Keys):
        """Initialise the chains.

        A start that passes the virial check at once is changed more slowly.
        """
        flat = jnp.zeros_like(problem.posterior.center)
        params = jax.vmap(lambda k: family.init(k, core, flat))(keys)
        return relaunch(family, problem, params, key)

    def relaunch(family: AbstractFamily, problem: Problem, params, key: Key):
        first = jax.tree_util.tree_map(lambda leaf: leaf[0], params)
        shift, rounds = calibrate_scale(family, first, objective, problem, key)
        params = jax.vmap(lambda one: family.widened(one, shift))(params)
        family = family.with_slow_start(rounds == 1)
        return family, jax.vmap(lambda one: init_state(family, one, config))(params), rounds

    def steps(family, problem, state, keys, first_step, horizon: Horizon, *, length: int):
        return run_steps(
            family, objective, problem, config, state, keys, first_step, horizon, length
        )

    def excess_along(center, points, piece: AbstractData):
        return shared_mean(functools.partial(losses_at, objective), piece, (center, points)).excess

    finish = _evaluation(objective, config, loss_full_flat)
    nothing = functools.partial(nothing_seen, config=config, has_slope=loss_full_flat is None)
    programs = Programs(prepare, launch, steps, finish, nothing, relaunch, excess_along)
    return _compiled(programs, config, loss)


def _evaluation(
    objective: FlatObjective, config: VIConfig, loss_full_flat: Callable | None
) -> Callable:
    """Return the stage after the last step."""

    def losses_on(data: AbstractData, center, displacement, spread: bool) -> DataLosses:
        if loss_full_flat is not None:
            full = functools.partial(call_full_loss, loss_full_flat, data=data.examples)
            return full_losses_at(full, center, displacement)
        mean = data_parallel_mean if spread else shared_mean
        copies = 1 + draws_at_once(displacement.shape[0])
        at_points = functools.partial(losses_at, objective)
        return mean(at_points, data, (center, displacement), copies)

    def finish(
        family: AbstractFamily,
        problem: Problem,
        params,
        keys: Keys,
        data: AbstractData,
        before: DataLosses,
        share,
        *,
        spread: bool = False,
    ) -> tuple[Outcome, DataLosses]:
        center = problem.posterior.center

        def one(inputs):
            chain_params, chain_key, chain_before = inputs
            draws = evaluation_draws(family, chain_params, chain_key, config.evaluation_draws)
            losses = jax.tree_util.tree_map(
                lambda old, new: old + share * (new - old),
                chain_before,
                losses_on(data, center, draws.displacement, spread),
            )
            evaluation = evaluate(
                family,
                chain_params,
                objective,
                problem,
                draws,
                losses,
                chain_key,
                control_variate=config.control_variate or "auto",
                trace_probes=config.trace_probes,
            )
            return evaluation, losses, family.summary_arrays(chain_params)

        evaluation, losses, arrays = jax.lax.map(one, (params, keys, before))
        slope = None if losses.slope is None else losses.slope[0]
        return Outcome(evaluation, losses.reference[0], slope, arrays), losses

    return finish


def nothing_seen(problem: Problem, chains: int, config: VIConfig, has_slope: bool) -> DataLosses:
    """Return what no data say, for `finish` to begin with."""
    center = problem.posterior.center
    pairs = config.evaluation_draws // 2
    return DataLosses(
        jnp.zeros((chains, 2 * pairs), center.dtype),
        jnp.zeros(chains, center.dtype),
        jnp.zeros((chains, center.size), center.dtype) if has_slope else None,
    )


def _compiled(plain: Programs, config: VIConfig, loss: Fingerprint) -> Stages:
    once = quick_compilation()
    steps = over_devices(plain.steps, (False, False, True, True, False, False))
    jit_steps = functools.partial(jax.jit, steps, static_argnames=("length",), donate_argnums=(2,))
    compiled = Programs(
        prepare=jax.jit(plain.prepare, compiler_options=once),
        launch=jax.jit(plain.launch, compiler_options=once),
        steps=jit_steps(),
        finish=jax.jit(functools.partial(plain.finish, spread=True), compiler_options=once),
        nothing_seen=plain.nothing_seen,
        relaunch=jax.jit(plain.relaunch, compiler_options=once),
        excess_along=jax.jit(plain.excess_along, compiler_options=once),
    )
    quick = compiled._replace(steps=jit_steps(compiler_options=once))
    return Stages(quick, compiled, jax.jit(functools.partial(_whole, plain, config)), loss)


def _whole(
    plain: Programs, config: VIConfig, problem: Problem, keys: Keys, whitener_scale: Array | None
) -> tuple:
    """Run all stages.

    The core has all the rows that it may have, since their number is not known.
    """
    key, center = streams.shared_key(), problem.posterior.center
    start = plain.prepare(problem, key, whitener_scale)
    rank = rank_limit(config, center.size, center.dtype.itemsize)
    family, state, rounds = plain.launch(
        build_family(config, start, rank), problem, start.core[:rank], key, keys
    )
    horizon = Horizon(*(jnp.asarray(step, jnp.float32) for step in fixed_phases(config)))
    state, traces = plain.steps(
        family, problem, state, keys, jnp.int32(0), horizon, length=config.steps
    )
    nothing = plain.nothing_seen(problem, keys.size)
    outcome, _ = plain.finish(family, problem, state.params, keys, problem.data, nothing, 1.0)
    return family, state.params, start, outcome, traces, rounds


def build_family(config: VIConfig, start: Start, core_rows: int) -> AbstractFamily:
    """Instantiate the configured family with `core_rows` rows of core (a padding of the rows in use)."""
    geometry = Geometry(
        scale=start.scale,
        core=start.core[:core_rows],
        rank=start.rank,
        unit=1 / jnp.sqrt(start.rest),
        noise_size=rank_limit(config, start.scale.size, start.scale.dtype.itemsize),
    )
    return FAMILIES[config.family].create(config.family_settings, geometry)
