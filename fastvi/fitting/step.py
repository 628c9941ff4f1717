"""The one driver of every family: a loop over steps with the chains vmapped inside."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Keys, PyTree, Scalar
from fastvi.evaluation.errors import virial
from fastvi.families.base import AbstractFamily, Draws, TargetValues, num_groups
from fastvi.fitting.optimizer import gradient_norm, make_optimizer, scale
from fastvi.fitting.pruning import prune
from fastvi.fitting.step_plan import StepPlan, StepRows
from fastvi.kernels.noise import streams
from fastvi.target.data import Problem, evaluate_target
from fastvi.target.objective import FlatObjective

# Share of the past in the running baseline of the objective: a memory of 20 steps. At half the
# memory it follows the noise of single draws, at double it lags behind the first steps' rise.
BASELINE_DECAY = 0.95


class StepSettings(NamedTuple):
    """What the program of the steps is made for.

    Attributes:
        num_draws: Draws of q a step.
        mirrors: Whether they come in mirrored pairs where their number is even.
        max_ratio: Longest gradient relative to the typical norm; None: no bound.
        anneals: Whether temperature or entropy bonus change.
        prunes: Whether light components are pruned.
    """

    num_draws: int = 1
    mirrors: bool = True
    max_ratio: float | None = 5.0
    anneals: bool = False
    prunes: bool = False

    @property
    def groups(self) -> int:
        """The independent draws of a step."""
        return num_groups(self.num_draws, self.mirrors)


class State(NamedTuple):
    """What the next step needs, for one chain."""

    params: PyTree
    opt_state: Any
    baseline: Scalar
    cache: PyTree
    slow: dict[str, Scalar]


def init_state(family: AbstractFamily, params: PyTree, settings: StepSettings) -> State:
    """Return the state before the first step."""
    dtype = jax.tree_util.tree_leaves(params)[0].dtype
    optimizer = make_optimizer(settings.max_ratio, family.update_rules(params, settings.groups))
    return State(
        params=params,
        opt_state=optimizer.init(params),
        baseline=jnp.zeros((), dtype),
        cache=family.make_cache(params),
        slow=family.slow_statistics(params),
    )


def run_steps(
    family: AbstractFamily,
    objective: FlatObjective,
    problem: Problem,
    settings: StepSettings,
    state: State,
    keys: Keys,
    plan: StepPlan,
) -> tuple[State, dict[str, Float[Array, "chains rows"]]]:
    """Run the steps of a plan on every chain.

    Randomness depends on the chain's key and the step's index alone, so calls of any length
    compose. A step whose rate is zero leaves the parameters as they are.

    Args:
        family: The family.
        objective: The loss.
        problem: Target and data, shared by the chains.
        settings: What the program is made for.
        state: States stacked over chains.
        keys: One key for each chain.
        plan: The numbers of the steps.

    Returns:
        The new state, and the traces of all rows, of which the first `plan.length` were run.

    Cost:
        `settings.num_draws` minibatch gradients for each step and chain.
    """
    rows, num_chains = jax.tree_util.tree_map(jnp.asarray, plan.rows), keys.size

    def evaluate(problem, displacement, batch):
        return evaluate_target(objective, problem, displacement, batch, num_chains)

    is_single = num_chains == 1
    if is_single:  # an axis of one would be carried through the model
        state, keys = jax.tree_util.tree_map(lambda leaf: leaf[0], (state, keys))

    def over_chains(function: Callable, in_axes: Any = 0) -> Callable:
        return function if is_single else jax.vmap(function, in_axes)

    def of_all(shared, keys, state, ahead, row):
        family, problem, plan = shared
        one_chain = functools.partial(_step, family, evaluate, problem, settings, plan)
        return over_chains(one_chain, (0, 0, 0, None))(state, ahead, keys, row)

    # traced once, though the loop's traces are sized by tracing a step before it
    step = functools.partial(jax.jit(of_all, inline=True), (family, problem, plan), keys)
    # noise is drawn one step ahead: as part of the carry it is computed once, not again by each of
    # its readers
    ahead = over_chains(lambda key: _noise(family, settings, key, rows.step[0]))(keys)
    names = list(jax.eval_shape(step, state, ahead, _row(rows, 0))[2])

    def advance(index, carry):
        state, ahead, traces = carry
        state, ahead, trace = step(state, ahead, _row(rows, index))
        # one array for all scalars: XLA would write each by a loop of its own
        scalars = jnp.stack([trace[name] for name in names])
        return state, ahead, jax.lax.dynamic_update_index_in_dim(traces, scalars, index, 0)

    dtype = jax.tree_util.tree_leaves(state.params)[0].dtype
    blank = jnp.zeros((rows.step.size, len(names), *keys.shape), dtype)
    state, _, traces = jax.lax.fori_loop(0, plan.length, advance, (state, ahead, blank))
    if is_single:
        state, traces = jax.tree_util.tree_map(lambda leaf: leaf[None], state), traces[..., None]
    rates = jnp.broadcast_to(rows.rate, (num_chains, rows.step.size)).astype(dtype)
    return state, {**dict(zip(names, jnp.moveaxis(traces, 0, 2), strict=True)), "lr": rates}


def _row(rows: StepRows, index) -> StepRows:
    return jax.tree_util.tree_map(lambda column: column[index], rows)


def _noise(family, settings: StepSettings, key, step):
    return family.draw_noise(key, settings.groups, streams.step_noise(step))


def _step(
    family, evaluate, problem: Problem, settings: StepSettings, plan, state: State, noise, key, row
):
    """Make one step of one chain; return its state, the noise of the next step and the scalars."""
    if settings.anneals:
        family = family.annealed(row.temperature, row.entropy_bonus)
    rules = family.update_rules(state.params, settings.groups)
    batch = problem.next_batch(key, streams.step_batch(row.step))
    draws = family.transform(
        state.params, noise, mirror=settings.groups < settings.num_draws, cache=state.cache
    )
    value, grad = evaluate(problem, draws.displacement, batch)
    # Before the first step there is no past: its own value stands in.
    baseline = jnp.where(row.step == 0, jnp.mean(value - draws.log_prob), state.baseline)
    target = TargetValues(value, grad, baseline)
    ascent = family.ascent(state.params, draws, target, groups=settings.groups)
    updates, opt_state = make_optimizer(settings.max_ratio, rules).update(
        ascent, state.opt_state, elapsed=row.elapsed
    )
    updates = _scaled(updates, rules.rates, row.rate)
    params, cache = family.apply_updates(state.params, state.cache, updates)
    if settings.prunes:
        bounds = rules.per_component, plan.least_weight, plan.most_components
        params, opt_state = jax.lax.cond(
            row.prunes,
            lambda p, o: prune(family, p, o, *bounds),
            lambda p, o: (p, o),
            params,
            opt_state,
        )
    # Between records the last ones are repeated.
    slow = jax.lax.cond(
        row.records, lambda p: family.slow_statistics(p), lambda _: state.slow, params
    )
    objective_value = jnp.mean(value - family.entropy_weight * draws.log_prob)
    baseline = BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * objective_value
    trace = {
        **_statistics(draws, value, grad),
        "grad_norm": gradient_norm(ascent),
        **family.step_statistics(params, draws),
        **slow,
    }
    ahead = _noise(family, settings, key, row.step + 1)
    return State(params, opt_state, baseline, cache, slow), ahead, trace


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
    return jax.tree_util.tree_map(
        lambda factor, update: scale(update, jnp.asarray(rate * factor).astype(update.dtype)),
        factors,
        updates,
    )
