"""Samplers of the local posterior that start at w*, with the work of every gradient counted.

`sgld` and `rmsprop_sgld` follow devinterp (https://github.com/timaeus-research/devinterp):
minibatches, no rejection. `hmc` has the identity as metric; `mclmc` is blackjax's with its own
tuning. All report nbeta (L - L*) along the way.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bench.truth.hmc import Recipe, draw, start_tuning, target_of, tune
from bench.truth.problem import Problem
from fastvi.target.data import hold
from fastvi.target.posterior import LocalPosterior
from fastvi.target.ravel import ravel_loss
from fastvi.target.work import LOSS

CHAINS = 4
BATCH = 256
BINS = 400  # averages kept of each chain of a Langevin run
DECAY, FLOOR = 0.99, 0.1  # devinterp's alpha and eps of RMSProp-SGLD
TUNED_SHARE = 0.3  # of the draws of HMC that move its step size
MCLMC_STEP_COST = 2  # gradients of the minimal-norm integrator
ALL_LANES = 300  # largest dimension at which a whole grid of step sizes runs side by side


@dataclasses.dataclass(frozen=True)
class Course:
    """What one run, all chains together, had seen after how much work.

    Attributes:
        fge: Full-gradient equivalents spent at the end of each bin, increasing.
        energy: Mean nbeta (L - L*) in each bin, by chain; NaN where the method was tuning and kept
            nothing.
        seconds: Share of the wall time of the call, which may have run several seeds and step sizes
            at once.
    """

    fge: np.ndarray
    energy: np.ndarray
    seconds: float


def sgld(
    problem: Problem, steps: Sequence[float], seeds: Sequence[int], budget: float, *, rmsprop=False
):
    """Run (RMSProp-)SGLD for every step size and seed.

        v <- v - eps/2 G (nbeta grad L_b + gamma v) + sqrt(eps G) noise

    with G = 1, or 1 / (rms of the gradients + eps) in each coordinate.

    Returns:
        Courses by (step size, seed). The energy is that of the minibatch before the step less the
        full L(w*).

    Cost:
        One minibatch gradient for each step of each chain, and one loss for L(w*).
    """
    grid = [(step, seed) for step in steps for seed in seeds]
    parts = [grid] if problem.dim <= ALL_LANES else [[pair] for pair in grid]
    batch = min(BATCH, problem.n_data)
    share = CHAINS * batch / problem.n_data
    per_bin = max(1, int((budget - LOSS) / share / BINS))
    bins = int((budget - LOSS) / share / per_bin)
    run = _langevin(problem, batch, bins, per_bin, rmsprop)
    fge = LOSS + share * per_bin * np.arange(1, bins + 1)
    courses = {}
    for part in parts:
        keys = jnp.stack([jax.random.split(jax.random.key(seed), CHAINS) for _, seed in part])
        began = time.perf_counter()
        energy = np.asarray(run(jnp.asarray([step for step, _ in part], jnp.float32), keys))
        elapsed = (time.perf_counter() - began) / len(part)
        courses |= {pair: Course(fge, energy[i].T, elapsed) for i, pair in enumerate(part)}
    return courses


def _langevin(problem: Problem, batch: int, bins: int, per_bin: int, rmsprop: bool):
    """Compile `(steps, keys[steps, chains]) -> energy[steps, chains, bins]`."""
    objective, center = ravel_loss(problem.loss_fn, problem.params)
    data = jax.tree_util.tree_map(jnp.asarray, problem.batch())
    posterior = LocalPosterior(center, jnp.float32(problem.nbeta), jnp.float32(problem.gamma))

    def chain(data, least, step, key):
        def move(carry, key):
            v, square, total = carry
            key_batch, key_noise = jax.random.split(key)
            chosen = jax.random.randint(key_batch, (batch,), 0, problem.n_data)
            examples = jax.tree_util.tree_map(lambda leaf: leaf[chosen], data)
            loss, grad = objective.value_and_grad(center + v, examples)
            square = DECAY * square + (1 - DECAY) * grad**2
            scale = step / (jnp.sqrt(square) + FLOOR) if rmsprop else step
            drift = 0.5 * scale * posterior.log_density_grad(v, grad)
            noise = jax.random.normal(key_noise, v.shape, v.dtype)
            return (v + drift + jnp.sqrt(scale) * noise, square, total + (loss - least)), None

        def average(carry, key):
            v, square = carry
            (v, square, total), _ = jax.lax.scan(
                move, (v, square, 0.0), jax.random.split(key, per_bin)
            )
            return (v, square), posterior.learning_coefficient(total / per_bin)

        zero = jnp.zeros_like(center)
        return jax.lax.scan(average, (zero, zero), jax.random.split(key, bins))[1]

    @jax.jit
    def run(data, steps, keys):
        least = hold(data).mean(lambda batch: objective.loss(center, batch))
        one = functools.partial(chain, data, least)
        return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(steps, keys)

    return functools.partial(run, data)


def hmc(problem: Problem, leapfrogs: Sequence[int], seeds: Sequence[int], budget: float) -> dict:
    """Run HMC with the identity as metric, its step by dual averaging to acceptance 0.8, jittered.

    Returns:
        Courses by (leapfrog steps, seed).

    Cost:
        One full gradient for each leapfrog step of each chain, and one at w*.
    """
    courses = {}
    for longest in leapfrogs:
        draws = int((budget - 1 - LOSS) / (CHAINS * longest))
        run = _hmc_chains(problem, longest, draws)
        fge = 1 + LOSS + CHAINS * longest * np.arange(1, draws + 1)
        for seed in seeds:
            began = time.perf_counter()
            energy = np.asarray(run(jax.random.key(seed)))
            courses[longest, seed] = Course(fge, energy, time.perf_counter() - began)
    return courses


def _hmc_chains(problem: Problem, longest: int, draws: int):
    evaluate, context, dim = target_of(problem)
    recipe = Recipe(trajectory=1e9, least_step=0.8)  # every trajectory has `longest` steps
    first_step = dim**-0.25 / (problem.nbeta + problem.gamma) ** 0.5

    @jax.jit
    def run(context, key):
        def one(carry, inputs):
            point, tuning = carry
            index, key = inputs
            is_tuning = index < TUNED_SHARE * draws
            step = jnp.exp(jnp.where(is_tuning, tuning.log_step, tuning.average))
            metric = jnp.ones(dim)
            point, accept, _ = draw(evaluate, context, point, key, step, metric, recipe, longest)
            tuned = tune(tuning, accept, recipe.target_accept)
            tuning = jax.tree_util.tree_map(
                lambda new, old: jnp.where(is_tuning, new, old), tuned, tuning
            )
            return (point, tuning), point.energy

        start = evaluate(jnp.zeros((CHAINS, dim)), context)
        inputs = (jnp.arange(draws), jax.random.split(key, draws))
        return jax.lax.scan(one, (start, start_tuning(first_step)), inputs)[1]

    return functools.partial(run, context)


def mclmc(problem: Problem, seeds: Sequence[int], budget: float) -> dict:
    """Run blackjax's microcanonical Langevin dynamics, one chain, tuned on its first 30 %.

    Returns:
        Courses by ("default", seed).

    Cost:
        Two full gradients for each step, tuning included, and one at w*.
    """
    total = int((budget - 1 - LOSS) / MCLMC_STEP_COST)
    run, tuned = _mclmc_chain(problem, total)
    fge = 1 + LOSS + MCLMC_STEP_COST * np.arange(1, total + 1)
    courses = {}
    for seed in seeds:
        began = time.perf_counter()
        energy = np.full((total, 1), np.nan)
        energy[tuned:, 0] = np.asarray(run(jax.random.key(seed)))
        courses["default", seed] = Course(fge, energy, time.perf_counter() - began)
    return courses


def _mclmc_chain(problem: Problem, total: int):
    import blackjax
    from blackjax.adaptation.mclmc_adaptation import MCLMCAdaptationState

    evaluate, context, dim = target_of(problem)
    tuned = 3 * round(0.1 * total)
    scale = dim**0.5 / (problem.nbeta + problem.gamma) ** 0.5

    @jax.jit
    def run(context, key):
        def log_density(v):
            return -evaluate(v[None], context).potential[0]

        kernel = blackjax.mcmc.mclmc.build_kernel()
        key_start, key_tune, key_run = jax.random.split(key, 3)
        state = blackjax.mcmc.mclmc.init(jnp.zeros(dim), log_density, key_start)
        state, params, _ = blackjax.mclmc_find_L_and_step_size(
            mclmc_kernel=kernel,
            num_steps=total,
            state=state,
            rng_key=key_tune,
            logdensity_fn=log_density,
            diagonal_preconditioning=False,
            params=MCLMCAdaptationState(scale, 0.25 * scale, jnp.ones(dim)),
        )

        def one(state, key):
            state, _ = kernel(
                key, state, log_density, params.inverse_mass_matrix, params.L, params.step_size
            )
            return state, -state.logdensity - 0.5 * problem.gamma * jnp.sum(state.position**2)

        return jax.lax.scan(one, state, jax.random.split(key_run, total - tuned))[1]

    return functools.partial(run, context), tuned
