"""From a fitted q to the posterior's own number: underdamped Langevin dynamics from draws of q."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Float, Scalar
from fastvi.estimators.analysis import Analysis, analyse
from fastvi.estimators.blocks import block_counts, split_data
from fastvi.estimators.langevin import Record, heat, start_tuning
from fastvi.estimators.walk import BIN_LENGTH, ROUND, Walk, WalkPrograms
from fastvi.inference.loop import Problem

MIN_BINS = 8
FRICTION_TIME, WIDEST = 2.0, 8.0  # for a posterior as wide as q; for a wider one up to so many times as long
RHAT_SETTLED, RHAT_RADIUS_SETTLED, DRIFT_SIGMAS = 1.1, 1.2, 2.5
USUAL_ERROR = 0.02  # relative error that these numbers, and the number of walkers, are made for
NOISE_POINTS = 4  # walkers at which the noise of the gradients is measured
BURN_IN_NOISE = 0.6  # share of llc that this noise may add while walkers move in from q
BURN_IN_CHANGE = 0.1  # of llc from one half of a run to the next, at which they have moved in
MAX_BURN_IN = 20  # rounds
ENERGY_ERROR = 5e-4  # of the first steps, in nats^2 per effective dimension
PRECISE_ENERGY_ERROR = 2e-4  # at the usual relative error; the bias grows as the cube root
LEAST_DIMENSIONS = 0.1  # effective dimensions, at least, of each dimension
REFINEMENTS = 3  # how many times the dynamics are made more exact
FEWER_BLOCKS, LESS_ENERGY_ERROR = 4, 8
NOISE_SHARE = 1.0  # of relative_error that noise of the gradients may add to llc, before control variates
NOISE_SLACK = 1.5  # on what a new measurement of the noise allows
REFINE_AT = 0.75  # systematic error over the wanted one
NUMBERS_PER_FGE = 2e5  # coordinates that walkers may move for each FGE of the budget: ten minutes at d = 1e5
CHECK_GROWTH = 1.15  # of a run between looks at its averages


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
    precise = min(ENERGY_ERROR, PRECISE_ENERGY_ERROR * (relative_error / USUAL_ERROR) ** 3)
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
    # Walkers that agreed before need not agree as closely for a larger error.
    patience = max(1.0, relative_error / USUAL_ERROR) if sampler.has_moved_in else 1.0
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
