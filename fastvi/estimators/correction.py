"""From a fitted q to the posterior's own number: underdamped Langevin dynamics from draws of q."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Int, Key, Keys, Scalar
from fastvi.compilation import cache_key, from_cache_key, quick_compilation
from fastvi.estimators.analysis import Analysis, analyse
from fastvi.estimators.blocks import Anchor, block_counts, gradient_noise, make_anchor, split_data
from fastvi.estimators.langevin import (
    Record,
    Tuning,
    Walker,
    heat,
    make_potential,
    refresh,
    run_steps,
    start_tuning,
)
from fastvi.estimators.llc import EVALUATION_BLOCK
from fastvi.families.base import AbstractFamily, LinearMap
from fastvi.inference.loop import Problem
from fastvi.objective import FlatObjective

BINS, BIN_LENGTH = 4, 4  # records of a round, and the steps averaged in each
ROUND = BINS * BIN_LENGTH
MIN_BINS = 8
FRICTION_TIME, WIDEST = 2.0, 8.0  # for a posterior as wide as q; for a wider one up to so many times as long
RHAT_SETTLED, RHAT_RADIUS_SETTLED, DRIFT_SIGMAS = 1.1, 1.2, 2.5
FULL_AGREEMENT_ERROR = 0.02  # of walkers that start at q; others are known to agree, and may at larger errors less
EFFECTIVE_SHARE = 0.5  # part of q's draws that must count when walkers are chosen among them
MAX_COLUMNS = 12  # parameter blocks with a virial column of their own
WALK_BLOCK = 2**31 + 2**17  # counters of a chain's key beyond those of its evaluation
NOISE_POINTS = 4  # walkers at which the noise of the gradients is measured
BURN_IN_NOISE = 0.6  # share of llc that this noise may add while walkers move in from q
BURN_IN_CHANGE = 0.1  # of llc from one half of a run to the next, at which they have moved in
MAX_BURN_IN = 20  # rounds
ENERGY_ERROR = 5e-4  # of the first steps, in nats^2 per effective dimension
PRECISE_ENERGY_ERROR = 2e-4  # at a relative error of 2 %; the bias grows as the cube root
LEAST_DIMENSIONS = 0.1  # effective dimensions, at least, of each dimension
REFINEMENTS = 3  # how many times the dynamics are made more exact
FEWER_BLOCKS, LESS_ENERGY_ERROR = 4, 8
NOISE_SHARE = 1.0  # of relative_error that noise of the gradients may add to llc, before control variates
NOISE_SLACK = 1.5  # on what a new measurement of the noise allows
REFINE_AT = 0.75  # systematic error over the wanted one
NUMBERS_PER_FGE = 2e5  # coordinates that walkers may move for each FGE of the budget: ten minutes at d = 1e5
CHECK_GROWTH = 1.15  # of a run between looks at its averages


class Walk(NamedTuple):
    """Where the walkers are, and how they move."""

    linear_map: LinearMap
    walkers: Walker
    tuning: Tuning
    keys: Keys


def start_walk(
    family: AbstractFamily,
    problem: Problem,
    params: Any,
    keys: Keys,
    log_weight: Float[Array, "chains draws"],
    excess: Float[Array, "chains draws"],
    num_walkers: int,
) -> Walk:
    """Place walkers at the evaluation's draws from the q of every chain, the likelier ones under the posterior.

    Cost:
        None: the draws have been evaluated.
    """
    chains, num_draws = log_weight.shape
    per_chain = num_walkers // chains
    linear_map = family.linear_map(jax.tree_util.tree_map(lambda leaf: leaf[0], params))

    def chain(inputs):
        chain_params, key, weights, energies = inputs
        draws = family.sample(chain_params, key, num_draws, antithetic=True, block=EVALUATION_BLOCK)
        chosen = resample(jax.random.fold_in(key, WALK_BLOCK - 1), weights, per_chain)
        return jax.vmap(linear_map.round)(draws.displacement[chosen]), energies[chosen]

    x, energies = jax.lax.map(chain, (params, keys, log_weight, excess))
    x, energies = x.reshape(num_walkers, -1), energies.reshape(-1)
    walk_keys = jax.random.split(jax.random.fold_in(keys[0], WALK_BLOCK), num_walkers)
    momentum = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, WALK_BLOCK), x.shape[1:], x.dtype))(
        walk_keys
    )
    walkers = Walker(x, momentum, jnp.zeros_like(x), jnp.zeros_like(energies), energies)
    return Walk(linear_map, walkers, start_tuning(x.shape[1], x.dtype), walk_keys)


def move_walk(
    family: AbstractFamily,
    problem: Problem,
    params: Any,
    walk: Walk,
    center: Float[Array, " dim"],
    shift: Int[Array, ""],
) -> Walk:
    """Take walkers over to another posterior: to the coordinates of its q, at the points where they are.

    Args:
        family: That of the new q.
        problem: The new target.
        params: The new q's, with a leading axis of chains.
        walk: The walkers.
        center: The w* that they were about.
        shift: Distinguishes their keys from the old ones.
    """
    linear_map = family.linear_map(jax.tree_util.tree_map(lambda leaf: leaf[0], params))
    moved = jax.vmap(walk.linear_map.displacement)(walk.walkers.x) + (center - problem.posterior.center)
    x = jax.vmap(linear_map.round)(moved)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(walk.keys, shift)
    momentum = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, WALK_BLOCK), x.shape[1:], x.dtype))(keys)
    tuning = start_tuning(x.shape[1], x.dtype)._replace(step=walk.tuning.step)
    return Walk(linear_map, walk.walkers._replace(x=x, momentum=momentum), tuning, keys)


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


def virial_columns(blocks: tuple[int, ...]) -> Callable[..., Float[Array, " columns"]]:
    """Return functions of mean zero under the posterior: `tr G - (G v) . grad(-log p)` for a few fixed G.

    G is the identity on each parameter block, and the projection on the span of q's low-rank directions; one more
    column is the slope along q's mean.

    Args:
        blocks: Lengths of the blocks, in order.
    """

    def columns(linear_map: LinearMap, displacement, gradient, x, pulled):
        own = block_virials(displacement * gradient, blocks)
        along = linear_map.basis.shape[0] - (linear_map.basis @ x) @ (linear_map.basis @ pulled)
        return jnp.stack([*own, along, linear_map.center @ gradient])

    return columns


def block_virials(work, blocks: tuple[int, ...]) -> list:
    """Return `length - sum of v * grad(-log p)` of each block, for v * grad(-log p) of shape (..., dim)."""
    ends = np.cumsum(blocks)
    return [length - work[..., end - length : end].sum(axis=-1) for length, end in zip(blocks, ends, strict=True)]


def parameter_blocks(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Merge neighbouring leaves until at most `MAX_COLUMNS` are left."""
    merged = list(sizes)
    while len(merged) > MAX_COLUMNS:
        pairs = [a + b for a, b in zip(merged, merged[1:], strict=False)]
        at = int(np.argmin(pairs))
        merged[at : at + 2] = [pairs[at]]
    return tuple(merged)


class WalkPrograms(NamedTuple):
    """Compiled stages of a walk.

    Attributes:
        start: `(family, problem, params, keys, log_weight, excess, num_walkers) -> Walk`.
        move: `(family, problem, params, walk, center, shift) -> Walk`.
        noise: `(problem, linear_map, x of some walkers, reference_loss, index) -> noise of the gradients`.
        enter: `(problem, walk, reference_loss, index, first) -> (Anchor, Walk)`: from now on by these blocks.
        advance: `(problem, anchor, walk, reference_loss, energy_error, friction_time, first) ->
            (Walk, Record)`.
    """

    start: Callable[..., Walk]
    move: Callable[..., Walk]
    noise: Callable[..., Scalar]
    enter: Callable[..., tuple[Anchor, Walk]]
    advance: Callable[..., tuple[Walk, Record]]


def walk_programs(objective: FlatObjective, blocks: tuple[int, ...]) -> WalkPrograms:
    """Return the stages for an objective; the same arguments share them."""
    return _walk_programs(cache_key(objective), blocks)


@functools.lru_cache(maxsize=32)
def _walk_programs(key: Any, blocks: tuple[int, ...]) -> WalkPrograms:
    objective, column_fn = from_cache_key(key), virial_columns(blocks)
    jit = functools.partial(jax.jit, compiler_options=quick_compilation())

    def noise(problem, linear_map, x, reference_loss, index):
        anchor = make_anchor(objective, problem, linear_map.center, reference_loss, index)
        return gradient_noise(objective, problem, anchor, jax.vmap(linear_map.displacement)(x), linear_map.pull_back)

    def enter(problem, walk: Walk, reference_loss, index, first):
        center = walk.linear_map.displacement(jnp.mean(walk.walkers.x, axis=0))
        anchor = make_anchor(objective, problem, center, reference_loss, index)
        evaluate = make_potential(objective, problem, walk.linear_map, reference_loss)
        return anchor, walk._replace(walkers=refresh(evaluate, anchor, walk.walkers, walk.keys, first))

    def advance(problem, anchor, walk: Walk, reference_loss, energy_error, friction_time, first):
        walkers, tuning, record = run_steps(
            make_potential(objective, problem, walk.linear_map, reference_loss),
            walk.linear_map,
            anchor,
            walk.walkers,
            walk.tuning,
            walk.keys,
            first,
            functools.partial(column_fn, walk.linear_map),
            friction_time=friction_time,
            energy_error=energy_error,
            bins=BINS,
            bin_length=BIN_LENGTH,
        )
        llc = problem.posterior.learning_coefficient(record.llc)
        return walk._replace(walkers=walkers, tuning=tuning), record._replace(llc=llc)

    start = jit(start_walk, static_argnames=("num_walkers",))
    return WalkPrograms(start, jit(move_walk), jit(noise), jit(enter), jit(advance))


class Level(NamedTuple):
    """How exact the dynamics are."""

    num_blocks: int
    energy_error: float


class Sampled(NamedTuple):
    """A finished run; `work` is in full-data gradients, all walkers together."""

    analysis: Analysis
    llc: Float[np.ndarray, "walkers bins"]
    level: Level
    step_size: float
    returned: float
    work: float
    settled: bool


class Sampler:
    """The walkers of one run, with what they have spent."""

    def __init__(
        self,
        programs: WalkPrograms,
        problem: Problem,
        walk: Walk,
        reference_loss: Scalar,
        budget: float,
        *,
        has_moved_in: bool = False,
    ):
        self.has_moved_in = has_moved_in
        self.programs, self.problem, self.walk = programs, problem, walk
        self.reference_loss, self.budget = reference_loss, budget
        self.counts = block_counts(problem.num_data, problem.posterior.center.size)
        self.work, self.steps, self.returned = 0.0, 0, 0.0
        self.level, self.anchor, self.cost = Level(0, ENERGY_ERROR), None, 0.0
        self.block_noise, self.allowed_heat = 0.0, 0.0
        self.llc = float(problem.posterior.learning_coefficient(jnp.mean(walk.walkers.excess)))

    @property
    def num_walkers(self) -> int:
        """Count the walkers."""
        return self.walk.walkers.x.shape[0]

    def measure_noise(self) -> None:
        """Measure the noise of gradients on the smallest blocks, per block of data left out."""
        if len(self.counts) == 1:
            return
        index = split_data(self.problem.num_data, self.counts[0])
        points = self.walk.walkers.x[: min(NOISE_POINTS, self.num_walkers)]
        value = self.programs.noise(self.problem, self.walk.linear_map, points, self.reference_loss, index)
        self.work += 2 + points.shape[0]
        self.block_noise = float(value) / (index.shape[0] - 1)

    def affordable(self, llc: float) -> int:
        """Return the most blocks with which noise adds no more than this to llc.

        Noise of variance V held for HOLD steps heats a direction by `HOLD * step * V * friction time / 2`, and half of
        that is llc.
        """
        added = self._heat(FRICTION_TIME)
        return next((count for count in self.counts if added * (count - 1) <= abs(llc)), 1)

    def enter(self, level: Level) -> None:
        """Go on by another number of blocks or energy error."""
        if level.num_blocks != self.level.num_blocks:
            index = split_data(self.problem.num_data, level.num_blocks)
            first = jnp.int32(self.steps)
            self.anchor, self.walk = self.programs.enter(self.problem, self.walk, self.reference_loss, index, first)
            self.cost = self.num_walkers * index.shape[1] / self.problem.num_data
            self.work += self.cost + (2 if level.num_blocks > 1 else 0)
        if level.energy_error != self.level.energy_error:
            fresh = start_tuning(self.walk.walkers.x.shape[1], self.walk.tuning.step.dtype)
            factor = (level.energy_error / self.level.energy_error) ** (1 / 6)
            self.walk = self.walk._replace(tuning=fresh._replace(step=factor * self.walk.tuning.step))
        self.level = level

    def advance(self) -> Record:
        """Run one round."""
        self.walk, record = self.programs.advance(
            self.problem,
            self.anchor,
            self.walk,
            self.reference_loss,
            jnp.float32(self.level.energy_error * self.effective_dimensions),
            jnp.float32(self.friction_time),
            jnp.int32(self.steps),
        )
        record = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, float), jax.device_get(record))
        self.steps += ROUND
        self.work += ROUND * self.cost
        self.returned += float(record.returned.sum())
        return record

    @property
    def friction_time(self) -> float:
        """Time after which momentum is forgotten.

        What it takes to cross the posterior as wide as it has been seen, or as much less as the noise asks for.
        """
        x = self.walk.walkers.x
        width = math.sqrt(float(jnp.mean(x**2))) if self.steps else 1.0
        cool = self.allowed_heat / max(self._heat(1.0) * (self.level.num_blocks - 1), 1e-30)
        return FRICTION_TIME * max(1.0, min(width, WIDEST, cool / FRICTION_TIME))

    def _heat(self, friction_time: float) -> float:
        """Return what gradient noise adds to llc, for each block of data but one."""
        return heat(self.block_noise, float(self.walk.tuning.step), friction_time)

    @property
    def effective_dimensions(self) -> float:
        """Twice the llc, which is what a quadratic loss has in as many dimensions, within bounds."""
        dim = self.problem.posterior.center.size
        return float(np.clip(2 * self.llc, LEAST_DIMENSIONS * dim, dim))

    @property
    def is_spent(self) -> bool:
        """Whether another round would exceed the budget."""
        numbers = (self.steps + ROUND) * self.walk.walkers.x.size
        return self.work + ROUND * self.cost > self.budget or numbers > NUMBERS_PER_FGE * self.budget


def sample_posterior(sampler: Sampler, *, relative_error: float, report: Callable[[float, float], None]) -> Sampled:
    """Run the walkers until the error of llc is small and they agree, or the budget is spent.

    Gradients come from blocks of the data as small as their noise allows: it may add `BURN_IN_NOISE` to llc while the
    walkers move in from q, and `relative_error` afterwards. What the virial columns take off llc measures what noise
    and step size have added to it; where that is too much, blocks are made larger and steps shorter.
    """
    sampler.measure_noise()
    precise = min(ENERGY_ERROR, PRECISE_ENERGY_ERROR * (relative_error / 0.02) ** 3)
    share = NOISE_SHARE * relative_error
    rough = sampler.affordable(BURN_IN_NOISE * sampler.llc)
    if sampler.affordable(share * sampler.llc) < rough:
        sampler.allowed_heat = BURN_IN_NOISE * abs(sampler.llc)
        sampler.llc = _move_in(sampler, Level(rough, ENERGY_ERROR), report)
        sampler.measure_noise()
    sampler.allowed_heat = share * abs(sampler.llc)
    sampler.enter(Level(sampler.affordable(sampler.allowed_heat), precise))
    return _produce(sampler, relative_error, report)


def _move_in(sampler: Sampler, level: Level, report) -> float:
    """Run until llc has stopped moving much; return it."""
    sampler.enter(level)
    means: list[float] = []
    while len(means) < MAX_BURN_IN and not sampler.is_spent:
        means.append(float(sampler.advance().llc.mean()))
        report(sampler.work, means[-1])
        if not math.isfinite(means[-1]):
            break
        half = len(means) // 2
        if half and abs(np.mean(means[:half]) - np.mean(means[half:])) < BURN_IN_CHANGE * abs(means[-1]):
            break
    return means[-1] if means else sampler.llc


def _produce(sampler: Sampler, relative_error: float, report) -> Sampled:
    """Gather records until they settle, at more exact levels where need be."""
    records: list[Record] = []
    refinements, looked, measured, settled = 0, 0, 1, False
    analysis, llc = None, np.zeros((sampler.num_walkers, 0))
    patience = max(1.0, relative_error / FULL_AGREEMENT_ERROR) if sampler.has_moved_in else 1.0
    while analysis is None or not (settled or sampler.is_spent):
        records.append(sampler.advance())
        if len(records) < CHECK_GROWTH * looked and not sampler.is_spent:
            continue
        looked = len(records)
        llc, virial, radius2 = (
            np.concatenate([getattr(r, name) for r in records], axis=1) for name in ("llc", "virial", "radius2")
        )
        analysis = analyse(llc, virial, radius2)
        report(sampler.work, analysis.llc)
        if not np.all(np.isfinite(llc)):
            break
        wanted = relative_error * abs(analysis.llc)
        sampler.llc = analysis.llc
        if analysis.added > 0 and analysis.systematic > REFINE_AT * wanted and refinements < REFINEMENTS:
            refinements += 1
            sampler.enter(_finer(sampler, analysis.added))
            records, looked = [], 0
            continue
        if sampler.level.num_blocks > 1 and looked >= 2 * measured:
            measured = looked
            sampler.measure_noise()
            blocks = sampler.affordable(NOISE_SLACK * sampler.allowed_heat)
            if blocks < sampler.level.num_blocks:  # noisier here than where the walkers came from
                sampler.enter(sampler.level._replace(num_blocks=sampler.affordable(sampler.allowed_heat)))
                records, looked, measured = [], 0, 1
                continue
        settled = (
            analysis.llc_sem <= wanted
            and analysis.rhat < 1 + patience * (RHAT_SETTLED - 1)
            and analysis.rhat_radius < 1 + patience * (RHAT_RADIUS_SETTLED - 1)
            and abs(analysis.drift_z) < DRIFT_SIGMAS
            and llc.shape[1] >= MIN_BINS
        )
    step = float(sampler.walk.tuning.step)
    returned = sampler.returned * sampler.num_walkers * BIN_LENGTH
    return Sampled(analysis, llc, sampler.level, step, returned, sampler.work, settled)


def _finer(sampler: Sampler, added: float) -> Level:
    """Return the next level: larger blocks where noise can be to blame for what was added, and shorter steps."""
    level = sampler.level
    sampler.allowed_heat = min(sampler.allowed_heat, added / FEWER_BLOCKS)
    blocks = sampler.affordable(sampler.allowed_heat)
    return Level(min(level.num_blocks, blocks), level.energy_error / LESS_ENERGY_ERROR)
