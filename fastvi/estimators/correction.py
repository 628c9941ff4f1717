"""From a fitted q to the posterior's own number: Hamiltonian Monte Carlo from draws of q."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Int, Key, Keys, Scalar
from fastvi.compilation import cache_key, from_cache_key
from fastvi.estimators.analysis import Analysis, analyse
from fastvi.estimators.hmc import FIRST_STEP, TRAJECTORY, Record, Tuning, Walker, make_potential, run_trajectories
from fastvi.estimators.llc import make_excess_fn
from fastvi.families.base import AbstractFamily, LinearMap
from fastvi.inference.loop import Problem
from fastvi.objective import FlatObjective

ROUND = 10  # trajectories between looks
MIN_ROUNDS = 2
RHAT_SETTLED, VIRIAL_SIGMAS, DRIFT_SIGMAS = 1.05, 3.0, 2.0
LENGTHEN_AT = (4, 8, 16, 32)  # rounds after which walkers that are not settled get trajectories twice as long
CANDIDATES, EFFECTIVE_SHARE = 4, 0.5  # draws of q for each walker, and how many of them must count
MAX_BLOCKS = 12  # parameter blocks with a virial column of their own
WALK_BLOCK = 2**31 + 2**17  # counters of a chain's key beyond those of its evaluation


class Walk(NamedTuple):
    """Where the walkers are."""

    maps: LinearMap
    walkers: Walker
    tuning: Tuning
    keys: Keys


def start_walk(
    family: AbstractFamily,
    objective: FlatObjective,
    problem: Problem,
    params: Any,
    keys: Keys,
    reference_loss: Scalar,
    per_chain: int,
) -> Walk:
    """Place `per_chain` walkers at draws from the q of every chain, the likelier ones under the posterior."""
    evaluate = make_potential(objective, problem, reference_loss)
    posterior, candidates = problem.posterior, CANDIDATES * per_chain
    excess_fn = make_excess_fn(objective, problem)

    def chain(chain_params, key):
        linear_map = family.linear_map(chain_params)
        draws = family.sample(chain_params, key, candidates, antithetic=False, block=WALK_BLOCK)
        excess = jax.lax.map(lambda v: excess_fn(posterior.center + v), draws.displacement, batch_size=per_chain)
        log_weight = jax.vmap(posterior.log_density)(draws.displacement, excess) - draws.log_prob
        chosen = resample(jax.random.fold_in(key, WALK_BLOCK - 1), log_weight, per_chain)
        return jax.vmap(lambda v: evaluate(linear_map, linear_map.round(v)))(draws.displacement[chosen]), linear_map

    walkers, maps = jax.lax.map(lambda pair: chain(*pair), (params, keys))
    flat = jax.tree_util.tree_map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), walkers)
    repeated = jax.tree_util.tree_map(lambda leaf: jnp.repeat(leaf, per_chain, axis=0), maps)
    walk_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, WALK_BLOCK), per_chain))(keys)
    dim, dtype = posterior.center.size, posterior.center.dtype
    step = jnp.log(FIRST_STEP * dim**-0.25).astype(dtype)
    return Walk(repeated, flat, Tuning(step, jnp.asarray(0), jnp.asarray(TRAJECTORY, dtype)), walk_keys.reshape(-1))


def resample(key: Key, log_weight: Float[Array, " candidates"], num: int) -> Int[Array, " num"]:
    """Choose `num` candidates by importance weights, flattened until a good part of the candidates counts."""
    log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
    log_weight = log_weight - jnp.max(log_weight)
    powers = jnp.append(2.0 ** -jnp.arange(10), 0.0).astype(log_weight.dtype)
    flattened = jnp.where(jnp.isfinite(log_weight), powers[:, None] * log_weight, -jnp.inf)
    weights = jax.nn.softmax(flattened, axis=-1)
    effective = 1 / jnp.sum(weights**2, axis=-1)
    enough = effective >= EFFECTIVE_SHARE * log_weight.size
    level = jnp.argmax(enough.at[-1].set(True))
    return jax.random.categorical(key, flattened[level], shape=(num,))


def walk_round(
    objective: FlatObjective,
    problem: Problem,
    blocks: tuple[int, ...],
    walk: Walk,
    reference_loss,
    first: Int[Array, ""],
) -> tuple[Walk, Record, Int[Array, ""]]:
    """Run `ROUND` trajectories of every walker."""
    evaluate = make_potential(objective, problem, reference_loss)
    walkers, tuning, record, spent = run_trajectories(
        evaluate, walk.maps, walk.walkers, walk.tuning, walk.keys, first, virial_columns(blocks), ROUND
    )
    llc = problem.posterior.learning_coefficient(record.llc)
    return Walk(walk.maps, walkers, tuning, walk.keys), record._replace(llc=llc), spent


def virial_columns(blocks: tuple[int, ...]) -> Callable[..., Float[Array, " columns"]]:
    """Return functions of mean zero under the posterior: `tr G - (G v) . grad(-log p)` for a few fixed G.

    G is the identity on each parameter block, and the projection on the span of q's low-rank directions; one more
    column is the slope along q's mean.

    Args:
        blocks: Lengths of the blocks, in order.
    """
    ends = np.cumsum(blocks)
    starts = ends - np.asarray(blocks)

    def columns(displacement, walker: Walker, pulled, linear_map: LinearMap):
        work = displacement * walker.gradient
        own = [stop - start - jnp.sum(work[start:stop]) for start, stop in zip(starts, ends, strict=True)]
        along = linear_map.basis.shape[0] - (linear_map.basis @ walker.x) @ (linear_map.basis @ pulled)
        return jnp.stack([*own, along, linear_map.center @ walker.gradient])

    return columns


def parameter_blocks(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Merge neighbouring leaves until at most `MAX_BLOCKS` are left."""
    merged = list(sizes)
    while len(merged) > MAX_BLOCKS:
        pairs = [a + b for a, b in zip(merged, merged[1:], strict=False)]
        at = int(np.argmin(pairs))
        merged[at : at + 2] = [pairs[at]]
    return tuple(merged)


class WalkPrograms(NamedTuple):
    """Compiled stages: `start(family, problem, params, keys, reference_loss)`, `advance(problem, walk, ...)`."""

    start: Callable[..., Walk]
    advance: Callable[..., tuple[Walk, Record, Int[Array, ""]]]


def walk_programs(objective: FlatObjective, blocks: tuple[int, ...], per_chain: int) -> WalkPrograms:
    """Return the stages for an objective; the same arguments share them."""
    return _walk_programs(cache_key(objective), blocks, per_chain)


@functools.lru_cache(maxsize=32)
def _walk_programs(key: Any, blocks: tuple[int, ...], per_chain: int) -> WalkPrograms:
    objective = from_cache_key(key)

    @jax.jit
    def start(family, problem, params, keys, reference_loss):
        return start_walk(family, objective, problem, params, keys, reference_loss, per_chain)

    @functools.partial(jax.jit, donate_argnames=("walk",))
    def advance(problem, walk, reference_loss, first):
        return walk_round(objective, problem, blocks, walk, reference_loss, first)

    return WalkPrograms(start, advance)


class Sampled(NamedTuple):
    """A finished run of the walkers; `gradients` counts full-data gradients of all walkers."""

    analysis: Analysis
    llc: Float[np.ndarray, "walkers trajectories"]
    acceptance: float
    step_size: float
    gradients: int
    settled: bool


def sample_posterior(
    programs: WalkPrograms,
    family: AbstractFamily,
    problem: Problem,
    params: Any,
    keys: Keys,
    reference_loss: Scalar,
    *,
    relative_error: float,
    max_trajectories: int,
    report: Callable[[int, float], None],
) -> Sampled:
    """Run the walkers until the error of llc is small and they agree, or to the most trajectories."""
    walk = programs.start(family, problem, params, keys, reference_loss)
    num_walkers = walk.walkers.x.shape[0]
    records, gradients, settled = [], num_walkers, False
    while not settled and len(records) * ROUND < max_trajectories:
        walk, record, leaps = programs.advance(problem, walk, reference_loss, jnp.int32(len(records) * ROUND))
        records.append(jax.device_get(record))
        gradients += num_walkers * int(leaps)
        columns = zip(*records, strict=True)
        llc, virial, acceptance = (np.concatenate(parts, axis=1).astype(float) for parts in columns)
        if not np.all(np.isfinite(llc)):
            break
        analysis = analyse(llc, virial)
        report(len(records) * ROUND, analysis.llc)
        settled = (
            analysis.llc_sem <= relative_error * abs(analysis.llc)
            and analysis.rhat < RHAT_SETTLED
            and abs(analysis.virial_z) < VIRIAL_SIGMAS
            and abs(analysis.drift_z) < DRIFT_SIGMAS
            and len(records) >= MIN_ROUNDS
        )
        if not settled and len(records) in LENGTHEN_AT:
            walk = walk._replace(tuning=walk.tuning._replace(length=2 * walk.tuning.length))
    analysis = analyse(llc, virial)
    step = float(jnp.exp(walk.tuning.log_step))
    return Sampled(analysis, llc, float(acceptance[:, analysis.burn_in :].mean()), step, gradients, settled)
