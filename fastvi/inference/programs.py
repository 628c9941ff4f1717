"""The compiled stages of a fit: prepare, launch, steps, finish. One set for each objective and configuration."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Int, Key, Keys, Scalar
from fastvi.compilation import cache_key, from_cache_key, quick_compilation
from fastvi.config import VIConfig
from fastvi.estimators.llc import Evaluation, evaluate, make_excess_fn
from fastvi.families import FAMILIES
from fastvi.families.base import AbstractFamily
from fastvi.geometry.start import Start, make_start, rank_limit
from fastvi.inference.calibrate import calibrate_scale
from fastvi.inference.loop import Problem, State, init_state, run_steps
from fastvi.inference.optimizer import Horizon
from fastvi.inference.sharding import data_parallel_loss, over_devices
from fastvi.objective import FlatObjective, full_data_loss

QUICK_WORK = 1e8  # steps times dim up to which a second of compilation outweighs a quarter of the steps' time
CACHED_PROGRAMS = 32  # sets of compiled stages kept; each holds its objective alive


class Outcome(NamedTuple):
    """What the last stage returns for each chain."""

    evaluation: Evaluation
    reference_loss: Scalar
    arrays: dict[str, Array]


class Programs(NamedTuple):
    """The stages, compiled for calls from the host or plain for use inside a trace.

    Attributes:
        prepare: `(problem, key, whitener_scale) -> Start`.
        launch: `(family, problem, core, key, chain_keys) -> (family, State, rounds of calibration)`.
        steps: `(family, problem, state, chain_keys, first_step, horizon, length) -> (State, traces)`; compiled, it
            consumes the state.
        finish: `(family, problem, params, chain_keys) -> Outcome`.
    """

    prepare: Callable[..., Start]
    launch: Callable[..., tuple[AbstractFamily, State, Int[Array, ""]]]
    steps: Callable[..., tuple[State, dict[str, Float[Array, "chains steps"]]]]
    finish: Callable[..., Outcome]


class Stages(NamedTuple):
    """One set of stages in all forms."""

    quick: Programs
    compiled: Programs
    plain: Programs

    def for_work(self, steps: int, dim: int) -> Programs:
        """Return the compiled stages, with steps that compile sooner and run slower where there are few of them."""
        return self.quick if steps * dim <= QUICK_WORK else self.compiled


def programs_for(objective: FlatObjective, config: VIConfig, loss_full_flat: Callable | None) -> Stages:
    """Return the stages for these functions; the same functions and configuration share them, compiled."""
    return _build(cache_key(objective), config, loss_full_flat)


@functools.lru_cache(maxsize=CACHED_PROGRAMS)
def _build(objective: Any, config: VIConfig, loss_full_flat: Callable | None) -> Stages:
    objective = from_cache_key(objective)

    def prepare(problem: Problem, key: Key, whitener_scale: Float[Array, " dim"] | None) -> Start:
        key_subset, key_start = jax.random.split(key)
        subset = problem.data
        if problem.num_data > config.hessian_examples:
            index = jax.random.choice(key_subset, problem.num_data, (config.hessian_examples,), replace=False)
            subset = jax.tree_util.tree_map(lambda leaf: leaf[index], problem.data)
        return make_start(objective, problem.posterior, subset, problem.next_batch, config, key_start, whitener_scale)

    def launch(family: AbstractFamily, problem: Problem, core, key: Key, keys: Keys):
        """Initialise the chains; a start that passes the virial check at once is changed more slowly."""
        flat = jnp.zeros_like(problem.posterior.center)
        params = jax.vmap(lambda k: family.init(k, core, flat, _START_BLOCK))(keys)
        first = jax.tree_util.tree_map(lambda leaf: leaf[0], params)
        shift, rounds = calibrate_scale(family, first, objective, problem, key)
        params = params._replace(log_scale=params.log_scale + shift)
        family = family.trusting(rounds == 1)
        return family, jax.vmap(lambda one: init_state(family, one, config))(params), rounds

    def steps(family, problem, state, keys, first_step, horizon: Horizon, *, length: int):
        return run_steps(family, objective, problem, config, state, keys, first_step, horizon, length)

    def finish(family: AbstractFamily, problem: Problem, params, keys: Keys, *, spread: bool = False) -> Outcome:
        mean_loss = data_parallel_loss if spread else full_data_loss
        reference_loss = (
            mean_loss(objective, problem.posterior.center, problem.data)
            if loss_full_flat is None
            else loss_full_flat(problem.posterior.center)
        )
        chains = over_devices(evaluate_chains, (False, False, False, True, True)) if spread else evaluate_chains
        evaluation, arrays = chains(family, problem, reference_loss, params, keys)
        return Outcome(evaluation, reference_loss, arrays)

    def evaluate_chains(family: AbstractFamily, problem: Problem, reference_loss, params, keys: Keys):
        excess_fn = make_excess_fn(objective, problem, loss_full_flat)

        def one(inputs):
            chain_params, chain_key = inputs
            evaluation = evaluate(
                family,
                chain_params,
                objective,
                problem,
                excess_fn,
                reference_loss,
                chain_key,
                num_draws=config.evaluation_draws,
                control_variate=config.control_variate,
                trace_probes=config.trace_probes,
            )
            return evaluation, family.summary_arrays(chain_params)

        return jax.lax.map(one, (params, keys))

    return _compiled(Programs(prepare, launch, steps, finish))


def _compiled(plain: Programs) -> Stages:
    once = quick_compilation()
    steps = over_devices(plain.steps, (False, False, True, True, False, False))
    jit_steps = functools.partial(jax.jit, steps, static_argnames=("length",), donate_argnums=(2,))
    compiled = Programs(
        prepare=jax.jit(plain.prepare, compiler_options=once),
        launch=jax.jit(plain.launch, compiler_options=once),
        steps=jit_steps(),
        finish=jax.jit(functools.partial(plain.finish, spread=True), compiler_options=once),
    )
    quick = compiled._replace(steps=jit_steps(compiler_options=once))
    return Stages(quick, compiled, plain)


_START_BLOCK = 2**31  # counters of a chain's key beyond those of its steps; the evaluation's follow


def build_family(config: VIConfig, start: Start, core_rows: int) -> AbstractFamily:
    """Instantiate the configured family with `core_rows` rows of core (a padding of the rows in use)."""
    return FAMILIES[config.family](
        scale=start.scale,
        trust=jnp.ones((), start.scale.dtype),
        core_mask=(jnp.arange(core_rows) < start.rank).astype(start.scale.dtype),
        ranks=tuple(min(rank, start.scale.size) for rank in config.ranks),
        means=config.means,
        noise_size=rank_limit(config, start.scale.size, start.scale.dtype.itemsize),
        temperature=config.alpha_temperature,
        dirichlet=1.0 if config.alpha_dirichlet_prior is None else config.alpha_dirichlet_prior,
        entropy_bonus=config.entropy_bonus,
    )
