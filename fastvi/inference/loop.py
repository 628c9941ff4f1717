"""The one driver of every family: a scan over steps with the chains vmapped inside."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._typing import Array, Batch, Float, Int, Key, Keys, PyTree, Scalar
from fastvi.config import VIConfig
from fastvi.families.base import NOISE_BLOCKS, AbstractFamily, Draws, num_groups
from fastvi.inference.annealing import annealed
from fastvi.inference.optimizer import Horizon, elapsed_decay, gradient_norm, learning_rate, make_optimizer, scale
from fastvi.inference.pruning import prune
from fastvi.kernels.noise import words
from fastvi.objective import FlatObjective, value_and_grad
from fastvi.posterior import LocalPosterior

BASELINE_DECAY = 0.95


class Problem(eqx.Module):
    """The target and the data that minibatches come from: all of it or, of a stream, a window of uniform draws."""

    posterior: LocalPosterior
    data: Batch
    num_data: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)

    @property
    def num_rows(self) -> int:
        """Count the examples at hand."""
        return jax.tree_util.tree_leaves(self.data)[0].shape[0]

    @property
    def holds_all(self) -> bool:
        """Whether all data are at hand."""
        return self.num_rows == self.num_data

    def next_batch(self, key: Key, block: Array | int = 0) -> Batch:
        """Draw a minibatch with replacement, or return all data when the batch is that large.

        A window is used up from a place of the key's own on: its examples are independent draws already, and reusing
        them would draw q towards the minimum of the window's loss.
        """
        if self.batch_size >= self.num_data:
            return self.data
        if not self.holds_all:
            first = words(key, 1)[0] % jnp.uint32(self.num_rows)
            used = jnp.asarray(block, jnp.uint32) // (NOISE_BLOCKS + 1) * self.batch_size
            index = (first + (used + jnp.arange(self.batch_size, dtype=jnp.uint32)) % self.num_rows) % self.num_rows
            return jax.tree_util.tree_map(lambda leaf: leaf[index.astype(jnp.int32)], self.data)
        # uneven by at most num_data / 2^32, and a third of the work of randint
        index = (words(key, self.batch_size, block=block) % jnp.uint32(self.num_data)).astype(jnp.int32)
        return jax.tree_util.tree_map(lambda leaf: leaf[index], self.data)


class State(NamedTuple):
    """What the next step needs, for one chain."""

    params: PyTree
    opt_state: Any
    baseline: Scalar
    cache: PyTree
    slow: dict[str, Scalar]


def evaluate_target(
    objective: FlatObjective, posterior: LocalPosterior, draws: Draws, batch: Batch
) -> tuple[Float[Array, " draws"], Float[Array, "draws dim"]]:
    """Evaluate log p and its gradient at every draw, on one batch."""

    def one(displacement):
        loss, grad = value_and_grad(objective, posterior.center + displacement, batch)
        value, slope = posterior.log_density(displacement, loss), posterior.log_density_grad(displacement, grad)
        return value.astype(displacement.dtype), slope.astype(displacement.dtype)  # the loss may know float64 alone

    if draws.displacement.shape[0] == 1:
        value, grad = one(draws.displacement[0])
        return value[None], grad[None]
    return jax.vmap(one)(draws.displacement)


def init_state(family: AbstractFamily, params: PyTree, config: VIConfig) -> State:
    """Return the state before the first step."""
    dtype = jax.tree_util.tree_leaves(params)[0].dtype
    return State(
        params=params,
        opt_state=make_optimizer(config, family.update_rules(draw_groups(config))).init(params),
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

    Randomness depends on the chain's key and the step's index alone, so chunks of any length compose. Steps beyond the
    horizon's end leave the parameters as they are, so that chunks of one length make any number of steps.

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
    rules = family.update_rules(groups)
    optimizer = make_optimizer(config, rules)

    def randomness(key, step):
        return family.draw_noise(key, groups, (NOISE_BLOCKS + 1) * step)

    def one_chain(state: State, noise, key, step, rate, elapsed, refresh):
        family = _at_step(settled_family, config, step)
        batch = problem.next_batch(key, (NOISE_BLOCKS + 1) * step + NOISE_BLOCKS)
        draws = family.transform(state.params, noise, mirror=groups < num_draws, cache=state.cache)
        value, grad = evaluate_target(objective, problem.posterior, draws, batch)
        baseline = jnp.where(step == 0, jnp.mean(value - draws.log_prob), state.baseline)
        ascent = family.ascent(state.params, draws, value, grad, baseline, antithetic=config.mirrors)
        updates, opt_state = optimizer.update(ascent, state.opt_state, elapsed=elapsed)
        updates = _scaled(updates, rules.rates, rate)
        params, cache = family.apply_updates(state.params, state.cache, updates)
        if config.prunes:
            due = ((step + 1) % config.eval_every == 0) & (rate > 0)
            params, opt_state = _pruned(family, params, opt_state, config, due)
        slow = jax.lax.cond(refresh, lambda p: family.slow_statistics(p), lambda _: state.slow, params)
        baseline = BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * _objective_value(family, value, draws)
        trace = {**_statistics(draws, value, grad), "grad_norm": gradient_norm(ascent)}
        trace |= {**family.step_statistics(params, draws), **slow}
        return (State(params, opt_state, baseline, cache, slow), randomness(key, step + 1)), trace

    names = []

    def body(carry, planned):
        state, ahead = carry
        carry, trace = jax.vmap(one_chain, in_axes=(0, 0, 0, None, None, None, None))(state, ahead, keys, *planned)
        names[:] = trace
        # one array for all scalars: XLA would write each by a loop of its own
        return carry, jnp.stack(list(trace.values()))

    steps = first_step + jnp.arange(length)
    rates = jnp.where(steps < horizon.end, learning_rate(config, horizon, steps), 0.0)
    plan = (steps, rates, elapsed_decay(horizon, steps), steps % config.eval_every == 0)
    # noise is drawn one step ahead: as part of the carry it is computed once, not again by each of its readers
    ahead = jax.vmap(randomness, in_axes=(0, None))(keys, first_step)
    (state, _), stacked = jax.lax.scan(body, (state, ahead), plan)
    traces = dict(zip(names, jnp.moveaxis(stacked, 0, 2), strict=True))
    return state, {**traces, "lr": jnp.broadcast_to(rates, (keys.size, length)).astype(stacked.dtype)}


def _statistics(draws: Draws, value, grad) -> dict[str, Scalar]:
    """Return what is traced of the draws of a step."""
    return {
        "elbo": jnp.mean(value - draws.log_prob),
        "elbo_like": jnp.mean(value),
        "logq": jnp.mean(draws.log_prob),
        "radius2": jnp.mean(jnp.sum(draws.displacement**2, axis=-1)),
        "virial": -jnp.mean(jnp.sum(draws.displacement * grad, axis=-1)) / draws.displacement.shape[-1],
    }


def _scaled(updates, factors, rate):
    """Multiply each update by the learning rate and its factor."""

    def one(factor, update):
        return scale(update, jnp.asarray(rate * factor).astype(update.dtype))

    return jax.tree_util.tree_map(one, factors, updates)


def _objective_value(family, value, draws):
    return jnp.mean(value - family.entropy_weight * draws.log_prob)


def _at_step(family, config: VIConfig, step):
    return dataclasses.replace(family, annealed=annealed(config, step)) if config.anneals else family


def _pruned(family, params, opt_state, config: VIConfig, due):
    """Prune where it is due."""
    return jax.lax.cond(
        due,
        lambda p, o: prune(p, o, jnp.exp(family.log_weights(p)), config),
        lambda p, o: (p, o),
        params,
        opt_state,
    )
