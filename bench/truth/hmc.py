"""Long Hamiltonian Monte Carlo on the exact local posterior.

Many chains, full data, judged by R-hat.

Chains start between w* and a draw of the localizer, so that they close in on the posterior's energy
from both sides. In warm-up all of them share one step size (dual averaging) and one metric (the
pooled covariance).
"""

import dataclasses
import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.truth.convergence import effective_sample_size, split_r_hat
from bench.truth.problem import Problem
from fastvi.target.posterior import LocalPosterior
from fastvi.target.ravel import ravel_loss

SHORT = 32  # leapfrog steps of the longest trajectory before the first metric
RELIABLE_R_HAT = 1.01
BALANCED = 3.0  # standard errors that the virial may be off 1
LONGEST_RECORD = 1_000_000  # draws of all chains after which the run stops


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a run.

    Attributes:
        chains: Parallel chains.
        seed: Seed of everything random.
        target_accept: Acceptance that the step size is tuned to.
        trajectory: Mean length of a trajectory in units of the metric; pi/2 turns a Gaussian by a
            quarter.
        least_step: Each draw's step is a random fraction of the tuned one, from this to 1: narrow
            valleys need it.
        max_leapfrogs: Longest trajectory in steps.
        block: Draws between two looks at convergence.
        windows: Blocks of each warm-up window; the metric is renewed after each but the last.
        dense_dim: Largest dimension with a dense metric.
        min_draws: Draws of each chain before the run may stop.
        relative_sem: Standard error, over the value, at which the run may stop.
        seconds: Time after which the run stops, converged or not; warm-up counts.
    """

    chains: int = 32
    seed: int = 0
    target_accept: float = 0.8
    trajectory: float = math.pi / 2
    least_step: float = 0.5
    max_leapfrogs: int = 512
    block: int = 50
    windows: tuple[int, ...] = (1, 1, 1, 2, 1)
    dense_dim: int = 300
    min_draws: int = 200
    relative_sem: float = 0.01
    seconds: float = 300.0


class Point(NamedTuple):
    """Where the chains are.

    Displacements from w*, nbeta (L - L*), minus log density and its gradient.
    """

    v: jax.Array
    energy: jax.Array
    potential: jax.Array
    grad: jax.Array


class Tuning(NamedTuple):
    """State of dual averaging on the log of the step size (Hoffman & Gelman 2014, section 3.2)."""

    log_step: jax.Array
    average: jax.Array
    error: jax.Array
    count: jax.Array
    anchor: jax.Array


class Draws(NamedTuple):
    """Of each draw, by chain.

    Nbeta (L - L*), v . grad(potential), acceptance; and leapfrog steps.
    """

    energy: jax.Array
    virial: jax.Array
    accept: jax.Array
    leapfrogs: jax.Array


class Moments(NamedTuple):
    """Sums over draws and chains of v and of v^2, or of v v^T."""

    count: jax.Array
    first: jax.Array
    second: jax.Array


def target_of(problem: Problem):
    """Return the batched potential of the displacement, with its gradient, and the dimension."""
    objective, center = ravel_loss(problem.loss_fn, problem.params)
    data = jax.tree_util.tree_map(jnp.asarray, problem.batch())
    posterior = LocalPosterior(center, jnp.float32(problem.nbeta), jnp.float32(problem.gamma))

    def potential(v, data, posterior):
        excess = objective.loss(posterior.center + v, data) - objective.loss(posterior.center, data)
        return -posterior.log_density(v, excess), posterior.learning_coefficient(excess)

    batched = jax.vmap(jax.value_and_grad(potential, has_aux=True), in_axes=(0, None, None))

    def evaluate(v, context):
        (value, energy), grad = batched(v, *context)
        return Point(v, energy, value, grad)

    return evaluate, (data, posterior), center.size


def along(metric, vectors, *, transpose=False):
    """Multiply each row by the metric's root: a diagonal, or a lower triangle."""
    if metric.ndim == 1:
        return vectors * metric
    return vectors @ (metric if transpose else metric.T)


def draw(evaluate, context, point, key, step, metric, recipe, longest):
    """Move all chains by one trajectory of a common, random length and step."""
    key_momentum, key_length, key_step, key_accept = jax.random.split(key, 4)
    momentum = jax.random.normal(key_momentum, point.v.shape)
    length = recipe.trajectory * jax.random.uniform(key_length, minval=0.5, maxval=1.5)
    step = step * recipe.least_step ** jax.random.uniform(key_step)
    leapfrogs = jnp.clip(jnp.round(length / step), 1, longest).astype(jnp.int32)

    def leapfrog(_, state):
        point, momentum = state
        momentum = momentum - 0.5 * step * along(metric, point.grad, transpose=True)
        point = evaluate(point.v + step * along(metric, momentum), context)
        return point, momentum - 0.5 * step * along(metric, point.grad, transpose=True)

    moved, end = jax.lax.fori_loop(0, leapfrogs, leapfrog, (point, momentum))
    gain = point.potential - moved.potential + 0.5 * jnp.sum(momentum**2 - end**2, axis=1)
    gain = jnp.where(
        jnp.isnan(gain), -jnp.inf, gain
    )  # a trajectory that left the floats is refused
    accepted = jnp.log(jax.random.uniform(key_accept, gain.shape)) < gain
    point = jax.tree_util.tree_map(
        lambda new, old: jnp.where(accepted.reshape(-1, *[1] * (new.ndim - 1)), new, old),
        moved,
        point,
    )
    return point, jnp.exp(jnp.minimum(gain, 0.0)), leapfrogs


def tune(tuning: Tuning, accept, target) -> Tuning:
    """Take one step of dual averaging."""
    count = tuning.count + 1
    weight = 1 / (count + 10)
    error = (1 - weight) * tuning.error + weight * (target - jnp.mean(accept))
    log_step = tuning.anchor - jnp.sqrt(count) / 0.05 * error
    decay = count**-0.75
    return Tuning(
        log_step, decay * log_step + (1 - decay) * tuning.average, error, count, tuning.anchor
    )


def start_tuning(step: float) -> Tuning:
    """Begin dual averaging at a step size."""
    zero, log_step = jnp.float32(0), jnp.float32(math.log(step))
    return Tuning(log_step, log_step, zero, zero, log_step + math.log(2.0))


def make_block(evaluate, recipe: Recipe, *, is_dense: bool):
    """Compile the chains.

    `(context, point, keys, tuning, metric, longest, is_tuning) -> point, tuning, moments, draws`.
    """

    @jax.jit
    def block(context, point, keys, tuning, metric, longest, is_tuning):
        def body(carry, key):
            point, tuning, moments = carry
            step = jnp.exp(jnp.where(is_tuning, tuning.log_step, tuning.average))
            point, accept, leapfrogs = draw(
                evaluate, context, point, key, step, metric, recipe, longest
            )
            tuned = tune(tuning, accept, recipe.target_accept)
            tuning = jax.tree_util.tree_map(
                lambda new, old: jnp.where(is_tuning, new, old), tuned, tuning
            )
            second = point.v.T @ point.v if is_dense else jnp.sum(point.v**2, axis=0)
            sums = Moments(jnp.float32(len(point.v)), point.v.sum(axis=0), second)
            draws = Draws(point.energy, jnp.sum(point.v * point.grad, axis=1), accept, leapfrogs)
            return (point, tuning, jax.tree_util.tree_map(jnp.add, moments, sums)), draws

        dim = point.v.shape[1]
        moments = Moments(
            jnp.float32(0), jnp.zeros(dim), jnp.zeros((dim, dim) if is_dense else dim)
        )
        (point, tuning, moments), draws = jax.lax.scan(body, (point, tuning, moments), keys)
        return point, tuning, moments, draws

    return block


def metric_of(moments: Moments, *, is_dense: bool):
    """Return the root of the pooled covariance, shrunk a little towards the identity."""
    count, first, second = (np.asarray(part, np.float64) for part in moments)
    mean, weight = first / count, 20.0 / (count + 20.0)
    if not is_dense:
        variance = np.maximum(second / count - mean**2, 0.0)
        return jnp.asarray(np.sqrt((1 - weight) * variance + weight * variance.mean()), jnp.float32)
    covariance = second / count - np.outer(mean, mean)
    ridge = np.trace(covariance) / len(mean)
    spectrum, basis = np.linalg.eigh(covariance)
    spectrum = (1 - weight) * np.maximum(spectrum, 1e-7 * spectrum[-1]) + 0.1 * weight * ridge
    return jnp.asarray(np.linalg.cholesky((basis * spectrum) @ basis.T), jnp.float32)


def warm_up(recipe, block, point, metric, key):
    """Tune the step size and the metric.

    Return what sampling needs and the leapfrog steps spent.
    """
    tuning, leapfrogs = start_tuning(0.1), 0
    for index, (window, key_window) in enumerate(
        zip(recipe.windows, jax.random.split(key, len(recipe.windows)), strict=True)
    ):
        longest = SHORT if index == 0 else recipe.max_leapfrogs
        sums = []
        for key_block in jax.random.split(key_window, window):
            keys = jax.random.split(key_block, recipe.block)
            point, tuning, moments, draws = block(point, keys, tuning, metric, longest, True)
            sums.append(moments)
            leapfrogs += int(draws.leapfrogs.sum())
        if index < len(recipe.windows) - 1:
            metric = metric_of(
                jax.tree_util.tree_map(lambda *parts: sum(parts), *sums), is_dense=metric.ndim == 2
            )
            tuning = start_tuning(math.exp(tuning.average))
    return point, tuning, metric, leapfrogs


def first_point(problem, recipe, evaluate, dim, key):
    """Start the chains between w* and draws of the localizer; its spread is the first metric."""
    scale = 1 / math.sqrt(problem.gamma)
    spread = scale * jnp.linspace(0.0, 1.0, recipe.chains)[:, None]
    metric = jnp.full(dim, scale)
    metric = jnp.diag(metric) if dim <= recipe.dense_dim else metric
    return evaluate(spread * jax.random.normal(key, (recipe.chains, dim))), metric


def sample(problem: Problem, recipe: Recipe) -> dict[str, Any]:
    """Sample until R-hat < 1.01, the error is small and the virial 1, or time is up.

    Returns:
        The mean of nbeta (L - L*), its standard error, R-hat, effective draws, and the course of
        the run. `virial` is the mean of v . grad(-log p) over the dimension, 1 under the exact
        posterior, with its error.
    """
    began = time.monotonic()
    evaluate, context, dim = target_of(problem)
    key_start, key_warm, key = jax.random.split(jax.random.key(recipe.seed), 3)
    point, metric = first_point(problem, recipe, lambda v: evaluate(v, context), dim, key_start)
    block = functools.partial(make_block(evaluate, recipe, is_dense=metric.ndim == 2), context)
    point, tuning, metric, leapfrogs = warm_up(recipe, block, point, metric, key_warm)
    record: list[Draws] = []
    while True:
        key, key_block = jax.random.split(key)
        keys = jax.random.split(key_block, recipe.block)
        point, _, _, draws = block(point, keys, tuning, metric, recipe.max_leapfrogs, False)
        record.append(jax.tree_util.tree_map(np.asarray, draws))
        summary = _summary(record, dim, recipe)
        summary["gradients"] = recipe.chains * (leapfrogs + summary.pop("leapfrogs"))
        summary["seconds"] = time.monotonic() - began
        is_long_enough = summary["draws"] >= recipe.min_draws
        if is_long_enough and summary["converged"]:
            break
        if summary["seconds"] > recipe.seconds or summary["draws"] * recipe.chains > LONGEST_RECORD:
            break
    return {**summary, "step": math.exp(tuning.average)}


def _summary(record: list[Draws], dim: int, recipe: Recipe) -> dict[str, Any]:
    energy, virial, accept, leapfrogs = (
        np.concatenate(parts) for parts in zip(*record, strict=True)
    )
    value, effective = float(np.mean(energy, dtype=np.float64)), effective_sample_size(energy)
    sem, r_hat = float(np.std(energy) / math.sqrt(effective)), split_r_hat(energy)
    virial = virial / dim
    virial_mean = float(np.mean(virial, dtype=np.float64))
    virial_sem = float(np.std(virial) / math.sqrt(effective_sample_size(virial)))
    is_balanced = abs(virial_mean - 1) < BALANCED * virial_sem
    return {
        "value": value,
        "sem": sem,
        "r_hat": r_hat,
        "ess": effective,
        "virial": virial_mean,
        "virial_sem": virial_sem,
        "accept": float(accept.mean()),
        "least_accept": float(accept.mean(axis=0).min()),
        "draws": len(energy),
        "leapfrogs": int(leapfrogs.sum()),
        "converged": bool(
            r_hat < RELIABLE_R_HAT and sem < recipe.relative_sem * abs(value) and is_balanced
        ),
    }
