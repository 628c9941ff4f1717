"""The one driver of every family: a scan over steps with the chains vmapped inside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Int, Keys, PyTree, Scalar
from fastvi.config import VIConfig
from fastvi.evaluation.errors import virial
from fastvi.families.base import AbstractFamily, Draws, TargetValues, num_groups
from fastvi.fitting.annealing import annealed
from fastvi.fitting.optimizer import (
    Horizon,
    elapsed_decay,
    gradient_norm,
    learning_rate,
    make_optimizer,
    scale,
)
from fastvi.fitting.pruning import prune
from fastvi.kernels.noise import streams
from fastvi.target.data import Problem, evaluate_target
from fastvi.target.objective import FlatObjective

BASELINE_DECAY = 0.95


class State(NamedTuple):
    """What the next step needs, for one chain."""

    params: PyTree
    opt_state: Any
    baseline: Scalar
    cache: PyTree
    slow: dict[str, Scalar]


def init_state(family: AbstractFamily, params: PyTree, config: VIConfig) -> State:
    """Return the state before the first step."""
    dtype = jax.tree_util.tree_leaves(params)[0].dtype
    rules = family.update_rules(params, draw_groups(config))
    return State(
        params=params,
        opt_state=make_optimizer(config, rules).init(params),
        baseline=jnp.zeros((), dtype),
        cache=family.make_cache(params),
        slow=family.slow_statistics(params),
    )


def draw_groups(config: VIConfig) -> int:
    """Count the independent draws of a step."""
    return num_groups(config.step_draws, config.mirrors)


def run_steps(
    family: AbstractFamily,
    objective: FlatObjective,
    problem: Problem,
    config: VIConfig,
    state: State,
    keys: Keys,
    first_step: Int[Array, ""],
    horizon: Horizon,
    length: int,
) -> tuple[State, dict[str, Float[Array, "chains steps"]]]:
    """Run `length` steps on every chain.

    Randomness depends on the chain's key and the step's index alone, so chunks of any length
    compose. Steps beyond the horizon's end leave the parameters as they are, so that chunks of one
    length make any number of steps.

    Args:
        family: The family.
        objective: The loss.
        problem: Target and data, shared by the chains.
        config: The configuration.
        state: States stacked over chains.
        keys: One key for each chain.
        first_step: Index of the first step.
        horizon: The schedule.
        length: Number of steps.

    Returns:
        The new state and the traces.

    Cost:
        `config.step_draws` minibatch gradients for each step and chain.
    """
    settled_family, num_draws, groups = family, config.step_draws, draw_groups(config)
    rules = family.update_rules(state.params, groups)
    optimizer = make_optimizer(config, rules)

    def randomness(key, step):
        return family.draw_noise(key, groups, streams.step_noise(step))

    def one_chain(state: State, noise, key, step, rate, elapsed, refresh):
        family = _at_step(settled_family, config, step)
        batch = problem.next_batch(key, streams.step_batch(step))
        draws = family.transform(state.params, noise, mirror=groups < num_draws, cache=state.cache)
        value, grad = evaluate_target(objective, problem, draws.displacement, batch, keys.size)
        baseline = jnp.where(step == 0, jnp.mean(value - draws.log_prob), state.baseline)
        target = TargetValues(value, grad, baseline)
        ascent = family.ascent(state.params, draws, target, groups=groups)
        updates, opt_state = optimizer.update(ascent, state.opt_state, elapsed=elapsed)
        updates = _scaled(updates, rules.rates, rate)
        params, cache = family.apply_updates(state.params, state.cache, updates)
        if config.prunes:
            due = ((step + 1) % config.eval_every == 0) & (rate > 0)
            params, opt_state = jax.lax.cond(
                due,
                lambda p, o: prune(family, p, o, rules.per_component, config),
                lambda p, o: (p, o),
                params,
                opt_state,
            )
        slow = jax.lax.cond(
            refresh, lambda p: family.slow_statistics(p), lambda _: state.slow, params
        )
        baseline = BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * _objective_value(
            family, value, draws
        )
        trace = {**_statistics(draws, value, grad), "grad_norm": gradient_norm(ascent)}
        trace |= {**family.step_statistics(params, draws), **slow}
        return (State(params, opt_state, baseline, cache, slow), randomness(key, step + 1)), trace

    names = []

    def body(carry, planned):
        state, ahead = carry
        carry, trace = jax.vmap(one_chain, in_axes=(0, 0, 0, None, None, None, None))(
            state, ahead, keys, *planned
        )
        names[:] = trace
        # one array for all scalars: XLA would write each by a loop of its own
        return carry, jnp.stack(list(trace.values()))

    steps = first_step + jnp.arange(length)
    rates = jnp.where(steps < horizon.end, learning_rate(config, horizon, steps), 0.0)
    plan = (steps, rates, elapsed_decay(horizon, steps), steps % config.eval_every == 0)
    # noise is drawn one step ahead: as part of the carry it is computed once, not again by each of
    # its readers
    ahead = jax.vmap(randomness, in_axes=(0, None))(keys, first_step)
    (state, _), stacked = jax.lax.scan(body, (state, ahead), plan)
    traces = dict(zip(names, jnp.moveaxis(stacked, 0, 2), strict=True))
    return state, {
        **traces,
        "lr": jnp.broadcast_to(rates, (keys.size, length)).astype(stacked.dtype),
    }


def _statistics(draws: Draws, value, grad) -> dict[str, Scalar]:
    """Return what is traced of the draws of a step."""
    return {
        "elbo": jnp.mean(value - draws.log_prob),
        "elbo_like": jnp.mean(value),
        "logq": jnp.mean(draws.log_prob),
        "radius2": jnp.mean(jnp.sum(draws.displacement**2, axis=-1)),
        "virial": virial(draws.displacement, grad),
    }


def _scaled(updates, factors, rate):
    """Multiply each update by the learning rate and its factor."""

    def one(factor, update):
        return scale(update, jnp.asarray(rate * factor).astype(update.dtype))

    return jax.tree_util.tree_map(one, factors, updates)


def _objective_value(family, value, draws):
    return jnp.mean(value - family.entropy_weight * draws.log_prob)


def _at_step(family, config: VIConfig, step):
    return family.annealed(*annealed(config, step)) if config.anneals else family
