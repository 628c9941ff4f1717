"""From a fitted q to the posterior's own number: underdamped Langevin dynamics from draws of q."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Float, Scalar
from fastvi.sampling.averages import Analysis, analyse
from fastvi.sampling.dynamics import Record, heat, start_tuning
from fastvi.sampling.gradients import block_counts, block_size, split_data
from fastvi.sampling.walkers import BIN_LENGTH, ROUND, Walk, WalkPrograms
from fastvi.target.data import Problem

MIN_BINS = 8
FRICTION_TIME, WIDEST = (
    2.0,
    8.0,
)  # for a posterior as wide as q; for a wider one up to so many times as long
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
NOISE_SHARE = (
    1.0  # of relative_error that noise of the gradients may add to llc, before control variates
)
NOISE_SLACK = 1.5  # on what a new measurement of the noise allows
REFINE_AT = 0.75  # systematic error over the wanted one
NUMBERS_PER_FGE = (
    2e5  # coordinates that walkers may move for each FGE of the budget: ten minutes at d = 1e5
)
CHECK_GROWTH = 1.15  # of a run between looks at its averages
LEAST_ROUNDS = 3  # that a budget has to pay for, with as many walkers as it can
ANCHOR_COST = 2  # full gradients: on all data at once, and block by block
ERROR, RHAT, RHAT_RADIUS = "relative error", "R-hat of llc", "R-hat of |w - w*|^2"
DRIFT, LENGTH, GRADIENT_NOISE = "drift in standard errors", "steps", "gradient noise over llc"


class Level(NamedTuple):
    """How exact the dynamics are."""

    num_blocks: int
    energy_error: float


class Unmet(NamedTuple):
    """A criterion that a run has not met, and what it asks for."""

    criterion: str
    value: float
    bound: float


class Sampled(NamedTuple):
    """A finished run.

    `work` is in full-data gradients, all walkers together. Settled where nothing is unmet.
    """

    analysis: Analysis
    llc: Float[np.ndarray, "walkers bins"]
    level: Level
    step_size: float
    returned: float
    work: float
    unmet: tuple[Unmet, ...]
    least_budget: float


class Sampler:
    """The walkers of one run, with what they have spent: never more than the budget."""

    def __init__(
        self,
        programs: WalkPrograms,
        problem: Problem,
        walk: Walk,
        reference_loss: Scalar,
        budget: float,
        *,
        chains: int = 1,
        fewest: int = 1,
        has_moved_in: bool = False,
    ):
        self.has_moved_in, self.chains, self.fewest = has_moved_in, chains, fewest
        self.programs, self.problem, self.walk = programs, problem, walk
        self.reference_loss, self.budget = reference_loss, budget
        self.counts = block_counts(problem.num_data, problem.posterior.center.size)
        self.work, self.steps, self.returned = 0.0, 0, 0.0
        self.level, self.anchor, self.exact_blocks = Level(0, ENERGY_ERROR), None, self.counts[0]
        self.block_noise, self.allowed_heat = 0.0, 0.0
        self.llc = float(problem.posterior.learning_coefficient(jnp.mean(walk.walkers.excess)))

    @property
    def num_walkers(self) -> int:
        """Count the walkers."""
        return self.walk.walkers.x.shape[0]

    @property
    def noise_cost(self) -> int:
        """Full gradients that a measurement of the noise takes."""
        return ANCHOR_COST + min(NOISE_POINTS, self.num_walkers) if len(self.counts) > 1 else 0

    def walk_cost(
        self, num_blocks: int, walkers: int | None = None, rounds: int = LEAST_ROUNDS
    ) -> float:
        """Full gradients that it takes to begin with blocks and run some rounds."""
        count = self.num_walkers if walkers is None else walkers
        share = block_size(self.problem.num_data, num_blocks) / self.problem.num_data
        return (ANCHOR_COST if num_blocks > 1 else 0) + count * share * (1 + rounds * ROUND)

    @property
    def cost(self) -> float:
        """Full gradients of a step of all walkers."""
        blocks = self.level.num_blocks
        return (
            self.num_walkers * block_size(self.problem.num_data, blocks) / self.problem.num_data
            if blocks
            else 0.0
        )

    @property
    def pays(self) -> bool:
        """Whether the budget pays for any walk, on blocks as noisy as they may be."""
        return self.can_pay(self.noise_cost + self.walk_cost(self.counts[0], self.fewest))

    @property
    def least_budget(self) -> float:
        """Full gradients of the shortest run by the fewest walkers.

        On the smallest blocks, until the noise is known.

        Where the numbers that walkers move are what counts, the FGE that allow as many.
        """
        numbers = LEAST_ROUNDS * ROUND * self.walk.walkers.x.size / NUMBERS_PER_FGE
        return max(self.noise_cost + self.walk_cost(self.exact_blocks, self.fewest), numbers)

    def can_pay(self, cost: float) -> bool:
        """Whether what is left of the budget covers a cost."""
        return self.work + cost <= self.budget

    def measure_noise(self) -> None:
        """Measure the noise of gradients on the smallest blocks, per block of data left out."""
        if len(self.counts) == 1:
            return
        index = split_data(self.problem.num_data, self.counts[0])
        points = self.walk.walkers.x[: min(NOISE_POINTS, self.num_walkers)]
        value = self.programs.noise(
            self.problem, self.walk.linear_map, points, self.reference_loss, index
        )
        self.work += self.noise_cost
        self.block_noise = float(value) / (index.shape[0] - 1)

    def within_budget(self, level: Level) -> Level:
        """Let go of walkers, then take smaller blocks than noise allows, until the budget pays for a short run."""
        for count in sorted(count for count in self.counts if count >= level.num_blocks):
            fixed = self.walk_cost(count, 0)
            payable = int(
                (self.budget - self.work - fixed) / (self.walk_cost(count, 1) - fixed) + 1e-9
            )
            if payable >= self.fewest:
                self._keep(min(self.num_walkers, payable - payable % self.fewest))
                return level._replace(num_blocks=count)
        raise AssertionError("the least budget pays for the fewest walkers on the smallest blocks")

    def _keep(self, number: int) -> None:
        """Go on with fewer walkers, as many from each chain."""
        if number == self.num_walkers:
            return

        def first(leaf):
            parts = leaf.reshape(self.chains, -1, *leaf.shape[1:])[:, : number // self.chains]
            return parts.reshape(number, *leaf.shape[1:])

        kept = jax.tree_util.tree_map(first, self.walk.walkers)
        self.walk = self.walk._replace(walkers=kept, keys=first(self.walk.keys))

    def affordable(self, llc: float) -> int:
        """Return the most blocks with which noise adds no more than this to llc.

        Noise of variance V held for HOLD steps heats a direction by `HOLD * step * V * friction
        time / 2`, and half of that is llc.
        """
        return next((count for count in self.counts if self.heat(count) <= abs(llc)), 1)

    def enter(self, level: Level) -> None:
        """Go on by another number of blocks or energy error."""
        if level.num_blocks != self.level.num_blocks:
            index = split_data(self.problem.num_data, level.num_blocks)
            first = jnp.int32(self.steps)
            self.anchor, self.walk = self.programs.enter(
                self.problem, self.walk, self.reference_loss, index, first
            )
            self.work += self.walk_cost(level.num_blocks, rounds=0)
        if level.energy_error != self.level.energy_error:
            fresh = start_tuning(self.walk.walkers.x.shape[1], self.walk.tuning.step.dtype)
            factor = (level.energy_error / self.level.energy_error) ** (1 / 6)
            self.walk = self.walk._replace(
                tuning=fresh._replace(step=factor * self.walk.tuning.step)
            )
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
        record = jax.tree_util.tree_map(
            lambda leaf: np.asarray(leaf, float), jax.device_get(record)
        )
        self.steps += ROUND
        self.work += ROUND * self.cost
        self.returned += float(record.returned.sum())
        return record

    @property
    def friction_time(self) -> float:
        """Time after which momentum is forgotten.

        What it takes to cross the posterior as wide as it has been seen, or as much less as the
        noise asks for.
        """
        x = self.walk.walkers.x
        width = math.sqrt(float(jnp.mean(x**2))) if self.steps else 1.0
        cool = self.allowed_heat / max(self._heat(1.0) * (self.level.num_blocks - 1), 1e-30)
        return FRICTION_TIME * max(1.0, min(width, WIDEST, cool / FRICTION_TIME))

    def heat(self, num_blocks: int) -> float:
        """Return what gradient noise of so many blocks adds to llc."""
        return self._heat(FRICTION_TIME) * (num_blocks - 1)

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
        return not self.can_pay(ROUND * self.cost) or numbers > NUMBERS_PER_FGE * self.budget


def sample_posterior(
    sampler: Sampler, *, relative_error: float, report: Callable[[float, float], None]
) -> Sampled:
    """Run the walkers until the error of llc is small and they agree, or the budget is spent.

    Gradients come from blocks of the data as small as their noise allows: it may add
    `BURN_IN_NOISE` to llc while the walkers move in from q, and `relative_error` afterwards. What
    the virial columns take off llc measures what noise and step size have added to it; where that
    is too much, blocks are made larger and steps shorter.

    The budget must pay for a walk: `sampler.pays`.
    """
    sampler.measure_noise()
    precise = min(ENERGY_ERROR, PRECISE_ENERGY_ERROR * (relative_error / USUAL_ERROR) ** 3)
    share = NOISE_SHARE * relative_error
    rough, wanted = (sampler.affordable(s * sampler.llc) for s in (BURN_IN_NOISE, share))
    after = sampler.noise_cost + sampler.walk_cost(wanted)
    if wanted < rough and sampler.can_pay(after + sampler.walk_cost(rough, rounds=1)):
        sampler.allowed_heat = BURN_IN_NOISE * abs(sampler.llc)
        sampler.llc = _move_in(sampler, Level(rough, ENERGY_ERROR), after, report)
        sampler.measure_noise()
    sampler.allowed_heat = share * abs(sampler.llc)
    level = Level(sampler.affordable(sampler.allowed_heat), precise)
    sampler.exact_blocks = level.num_blocks
    paid = sampler.within_budget(level)
    sampler.enter(paid)
    noise = sampler.heat(paid.num_blocks) / max(abs(sampler.llc), 1e-300)
    unmet = () if paid == level else (Unmet(GRADIENT_NOISE, noise, share),)
    return _produce(sampler, relative_error, unmet, report)


def _move_in(sampler: Sampler, level: Level, reserve: float, report) -> float:
    """Run until llc has stopped moving much, or what is left is the reserve; return it."""
    sampler.enter(level)
    means: list[float] = []
    while (
        len(means) < MAX_BURN_IN
        and not sampler.is_spent
        and sampler.can_pay(ROUND * sampler.cost + reserve)
    ):
        means.append(float(sampler.advance().llc.mean()))
        report(sampler.work, means[-1])
        if not math.isfinite(means[-1]):
            break
        half = len(means) // 2
        if half and abs(np.mean(means[:half]) - np.mean(means[half:])) < BURN_IN_CHANGE * abs(
            means[-1]
        ):
            break
    return means[-1] if means else sampler.llc


def _produce(sampler: Sampler, relative_error: float, unmet: tuple[Unmet, ...], report) -> Sampled:
    """Gather records until they settle, at more exact levels where need be."""
    records: list[Record] = []
    refinements, looked, measured = 0, 0, 1
    missed, llc = None, np.zeros((sampler.num_walkers, 0))
    analysis = Analysis.broken(sampler.num_walkers)
    while missed is None or (missed and not sampler.is_spent):
        records.append(sampler.advance())
        if len(records) < CHECK_GROWTH * looked and not sampler.is_spent:
            continue
        looked = len(records)
        llc, virial, radius2 = (
            np.concatenate([getattr(r, name) for r in records], axis=1)
            for name in ("llc", "virial", "radius2")
        )
        if not all(np.all(np.isfinite(part)) for part in (llc, virial, radius2)):
            analysis, missed = (
                Analysis.broken(sampler.num_walkers),
                (Unmet(ERROR, math.nan, relative_error),),
            )
            break
        analysis = analyse(llc, virial, radius2)
        report(sampler.work, analysis.llc)
        sampler.llc, wanted = analysis.llc, relative_error * abs(analysis.llc)
        heated = analysis.added > 0 and analysis.systematic > REFINE_AT * wanted
        if heated and refinements < REFINEMENTS and not sampler.is_spent:
            finer = _finer(sampler, analysis.added)
            if sampler.can_pay(sampler.walk_cost(finer.num_blocks)):
                refinements += 1
                sampler.enter(finer)
                records, looked, missed = [], 0, None
                continue
        if sampler.level.num_blocks > 1 and looked >= 2 * measured:
            measured = looked
            blocks = _blocks_by_noise_here(sampler)
            if blocks < sampler.level.num_blocks:
                sampler.enter(sampler.level._replace(num_blocks=blocks))
                records, looked, measured, missed = [], 0, 1, None
                continue
        missed = (
            *unmet,
            *unmet_by(analysis, relative_error, _patience(sampler, relative_error), llc.shape[1]),
        )
    step = float(sampler.walk.tuning.step)
    returned = sampler.returned * sampler.num_walkers * BIN_LENGTH
    return Sampled(
        analysis,
        llc,
        sampler.level,
        step,
        returned,
        sampler.work,
        tuple(missed or ()),
        sampler.least_budget,
    )


def _patience(sampler: Sampler, relative_error: float) -> float:
    """Return by how much more walkers may differ that agreed before, where a larger error is asked for."""
    return max(1.0, relative_error / USUAL_ERROR) if sampler.has_moved_in else 1.0


def unmet_by(
    analysis: Analysis, relative_error: float, patience: float, bins: int
) -> tuple[Unmet, ...]:
    """Return which criteria of a settled run the averages do not meet."""
    error = analysis.llc_sem / max(abs(analysis.llc), 1e-300)
    bounds = (
        Unmet(ERROR, error, relative_error),
        Unmet(RHAT, analysis.rhat, 1 + patience * (RHAT_SETTLED - 1)),
        Unmet(RHAT_RADIUS, analysis.rhat_radius, 1 + patience * (RHAT_RADIUS_SETTLED - 1)),
        Unmet(DRIFT, abs(analysis.drift_z), DRIFT_SIGMAS),
    )
    missed = tuple(bound for bound in bounds if not bound.value <= bound.bound)
    short = bins < MIN_BINS
    return (*missed, Unmet(LENGTH, bins * BIN_LENGTH, MIN_BINS * BIN_LENGTH)) if short else missed


def _blocks_by_noise_here(sampler: Sampler) -> int:
    """Measure the noise anew.

    Return fewer blocks where it is larger than where the walkers came from.
    """
    now = sampler.level.num_blocks
    if not sampler.can_pay(sampler.noise_cost + ROUND * sampler.cost):
        return now
    sampler.measure_noise()
    if sampler.affordable(NOISE_SLACK * sampler.allowed_heat) >= now:
        return now
    blocks = sampler.affordable(sampler.allowed_heat)
    return blocks if sampler.can_pay(sampler.walk_cost(blocks)) else now


def _finer(sampler: Sampler, added: float) -> Level:
    """Return the next level.

    Larger blocks where noise can be to blame for what was added, and shorter steps.
    """
    level = sampler.level
    sampler.allowed_heat = min(sampler.allowed_heat, added / FEWER_BLOCKS)
    blocks = sampler.affordable(sampler.allowed_heat)
    return Level(min(level.num_blocks, blocks), level.energy_error / LESS_ENERGY_ERROR)
