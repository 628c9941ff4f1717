"""A run of the sampler: from walkers at draws of q to the posterior's own llc.

A run is a fold: every function below takes a `RunState` and returns the next one, and nothing is
changed in place. `RunSetup` is what the whole run shares. What the host has decided besides is in
`BurningIn` and `Averaging`, so that a run can be kept after any round and go on in another process.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._devices import on_host
from fastvi._typing import Float, Int, Scalar
from fastvi.fitting.protocols import never
from fastvi.sampling.averages import DRIFT_BOUND, Analysis, analyse
from fastvi.sampling.costs import anchor_cost, run_cost, step_cost
from fastvi.sampling.dynamics import Evaluation
from fastvi.sampling.gradients import (
    NONE,
    PAIR,
    Anchor,
    Blocks,
    block_counts,
    blocks_left_out,
    split_data,
)
from fastvi.sampling.keeping import NO_KEEPER, AbstractWalkKeeper
from fastvi.sampling.programs import Observed, Record, SamplerPrograms, blank_evaluation
from fastvi.sampling.settings import SamplerSettings
from fastvi.sampling.tuning import (
    LESS_NOISE,
    USUAL_ERROR,
    Fidelity,
    Heat,
    StepSize,
    effective_dimensions,
    fresh_step_size,
    is_rounding,
    max_blocks_within,
    most_balanced_variance,
    noise_bias,
    plan_energy_error,
    plan_friction_time,
    plan_heat,
    plan_walkers,
    refine,
    step_size_after,
)
from fastvi.sampling.walkers import Walkers, collect_walkers, deal_walkers
from fastvi.target.data import Problem

# Bound of a settled run on split R-hat of llc. At half the distance from where chains agree (1),
# runs go on about four times as long; at double, they end that soon.
RHAT_BOUND = 1.1
# Growth of a run between looks at its averages. Closer looks cost the host more than they save.
CHECK_GROWTH = 1.15
# Systematic error over the wanted one at which the dynamics are refined. Half refines runs that
# meet their error; double leaves the systematic part above it.
REFINE_AT = 0.75
# On the noise that is allowed: what walkers say of it differs by some 10 % by itself.
NOISE_SLACK = 1.5
# Rounds that the mean of the noise covers. Half follows walkers that move in sooner, and is noisier
# by 1.4; double, the reverse.
NOISE_MEMORY = 32
# Examples, at most, that the noise is measured on before a run; the run itself then says how large
# it is. Half misses rarer examples, double costs as much more.
NOISE_EXAMPLES = 2**16
# Examples that are looked at one by one, at most, and of these the most that are kept in all
# gradients. Half finds and keeps half as many, double costs a step twice as much beside its blocks.
MOST_SUSPECTS, MOST_KEPT = 512, 64
# Part in the noise, over that of a usual block, from which on a block or an example is suspect. At
# half, a few of many like ones are; at double, examples are missed that are six times as steep.
HEAVY = 16.0
# How much cheaper a step has to become for examples to be kept. At half, a second measurement of
# the noise costs what is saved; at double, steps stay up to twice as dear.
KEPT_GAIN = 2.0
# Part of the heat that is not balanced which is taken off llc where the control variates have
# not, and the standard deviation of the rest: a quadratic loss has all of it, one whose curvature
# falls with the distance a half, and where the noise grows with the distance it is more.
HEAT_SHARE, HEAT_DOUBT = 0.65, 0.4
# Standard deviation of what friction along the noise leaves of the heat, over the heat. On a linear
# network 10-10-10 of rank 3 (n = 1e4; exact llc by Gibbs sampling) it left 0.03 to 0.13 of it.
BALANCE_DOUBT = 0.1
# What finite steps may add to llc, relative to it, over the cube root of their energy error. Steps
# of twice the usual length add 0.7 and 1.7 % on a digits and on a linear network.
STEP_BIAS = 0.04
# Rounds that a budget has to pay for, with as many walkers as it can: the fewest that are averaged.
LEAST_ROUNDS = 3
# Share of steps taken back in the last half of a run from which on the virial columns are left out:
# a step that is taken back has not felt the wall that it met, whose force the mean of the columns
# needs to be zero. In a box (three dimensions) a share of 1.2 % moved llc by 12 %. Half of it gives
# up columns that are off by half a per cent, double believes those that are off by two.
MOST_RETURNED = 1e-3
# Step size, over the longest so far, at which rounding is looked for, and the energy error, over
# the one in use, that shortens every step of a round by the most that one may be. At 0.7, rounds
# are spent where the posterior merely narrows; at 0.25, walkers are slow for longer.
ROUNDING_FALL, ROUNDING_TARGET = 0.5, 1e-6
ERROR, RHAT = "relative error", "R-hat of llc"
DRIFT, LENGTH, GRADIENT_NOISE = "drift in standard errors", "steps", "gradient noise over llc"
TAKEN_BACK = "share of steps taken back"


class Unmet(NamedTuple):
    """A criterion that a run has not met, and what it asks for."""

    criterion: str
    value: float
    bound: float


class Check(NamedTuple):
    """A look at the averages of a run: what they say, and which criteria they do not meet.

    `analysis.llc` is NaN where a record is not finite. `radius2` is |w - w*|^2, as `llc`.
    """

    analysis: Analysis
    llc: Float[np.ndarray, "walkers bins"]
    radius2: Float[np.ndarray, "walkers bins"]
    unmet: tuple[Unmet, ...]


class SamplerResult(NamedTuple):
    """A finished run.

    Attributes:
        check: Its last look; it has settled where that leaves nothing unmet.
        least_budget: Of the shortest exact run, in sample gradients, all walkers together.
        end: Where it ended.
        setup: By what.
        records: What `check` has averaged.
    """

    check: Check
    least_budget: float
    end: "RunState"
    setup: "RunSetup"
    records: tuple[Record, ...]


class Estimate(NamedTuple):
    """The gradient estimate in use, and what it has told the walkers where they are.

    Without an anchor it is all data at once, or nothing yet where `num_blocks` is zero. The anchor
    is at `center`, in round coordinates: made there again, it has the same bits.
    """

    fidelity: Fidelity
    anchor: Anchor | None
    here: Evaluation
    center: Float[np.ndarray, " dim"] | None = None


class RunState(NamedTuple):
    """A run between two rounds.

    Attributes:
        walkers: Where they are.
        llc: The latest value of llc, by which bias is judged.
        estimate: The gradient estimate, of no blocks until a fidelity has been chosen.
        block_noise: Variance of the gradient over all directions, for each block of data that a
            step does not see: a mean over the latest rounds.
        noise_rounds: How many rounds that mean is of.
        allowed_bias: What noise may add to llc.
        width: Root mean square of the positions, 1 before the first step.
        heat: What noise would add to llc by the latest friction time.
        work: Sample gradients spent.
        steps: Steps made.
        returned: Steps taken back, all walkers together.
        refinements: Times that the dynamics were made more exact.
        rounding: Mean square of the energy errors that steps may make beside those of their
            length, in nats^2, where short steps have shown that rounding makes them.
        longest_step: The longest step size since rounding was last looked for.
    """

    walkers: Walkers
    llc: float
    estimate: Estimate
    block_noise: float = 0.0
    noise_rounds: int = 0
    allowed_bias: float = 0.0
    width: float = 1.0
    heat: Heat = Heat()
    work: float = 0.0
    steps: int = 0
    returned: float = 0.0
    refinements: int = 0
    rounding: float = 0.0
    longest_step: float = 0.0

    @property
    def num_walkers(self) -> int:
        """Count the walkers."""
        return self.walkers.position.shape[0]

    @property
    def step_size(self) -> float:
        """Return the step size, in standard deviations of q."""
        return float(self.walkers.step_size.step)

    @property
    def fidelity(self) -> Fidelity:
        """Return the fidelity in use."""
        return self.estimate.fidelity

    @property
    def variance(self) -> float:
        """Return the variance of the gradient in use, over all round directions."""
        anchor = self.estimate.anchor
        return 0.0 if anchor is None else self.block_noise * blocks_left_out(anchor.rows.shape[0])


@dataclasses.dataclass(frozen=True)
class RunSetup:
    """What a run shares from beginning to end.

    Attributes:
        programs: The compiled stages.
        problem: The target with its data.
        reference_loss: L_n(w*).
        settings: The sampler's.
        error: Standard error that is wanted, relative to llc.
        budget: Sample gradients that the run never exceeds.
        report: Receives the work so far, llc and its error.
        chains: Fits that the walkers began at; a multiple of them stays.
        fewest: Walkers, at least.
        agreed_before: Whether walkers come from a settled run on the same posterior.
        kept: Examples that every step has beside its blocks.
        ends: Asked between rounds whether to end there.
    """

    programs: SamplerPrograms
    problem: Problem
    reference_loss: Scalar
    settings: SamplerSettings
    error: float
    budget: float
    report: Callable[[float, float, float], None]
    chains: int = 1
    fewest: int = 1
    agreed_before: bool = False
    kept: Int[np.ndarray, " kept"] = dataclasses.field(default_factory=lambda: NONE)
    ends: Callable[[], bool] = never

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the numbers of blocks to choose from, most first."""
        dim = self.problem.posterior.center.size
        return block_counts(self.problem.num_data, dim, self.settings)

    def noise_cost(self, state: RunState) -> float:
        """Price the measurement of the noise, which all data at once do not need."""
        points = min(self.settings.noise_points, state.num_walkers)
        examples = min(self.problem.num_data, NOISE_EXAMPLES)
        return (1 + points) * anchor_cost(examples, self.counts[0])

    @property
    def most_suspects(self) -> int:
        """Count the examples that are looked at one by one, at most."""
        dim = self.problem.posterior.center.size
        return min(MOST_SUSPECTS, self.settings.table_floats // dim, self.problem.num_data)

    def suspects_cost(self, state: RunState) -> float:
        """Price a look at single examples."""
        points = min(self.settings.noise_points, state.num_walkers)
        return (1 + points) * anchor_cost(self.most_suspects, self.most_suspects)

    def run_cost(self, num_blocks: int, walkers: int, rounds: int = LEAST_ROUNDS) -> float:
        """Price a run of some rounds that begins with blocks."""
        steps = rounds * self.settings.round_length
        return run_cost(self.problem.num_data, num_blocks, walkers, steps, self.kept.size)

    def round_cost(self, state: RunState) -> float:
        """Price another round."""
        blocks, walkers = state.fidelity.num_blocks, state.num_walkers
        step = step_cost(self.problem.num_data, blocks, walkers, self.kept.size)
        return self.settings.round_length * step

    def split(self, num_blocks: int) -> Blocks:
        """Split the data into about so many blocks."""
        return split_data(self.problem.num_data, num_blocks, self.kept)

    def can_pay(self, state: RunState, cost: float) -> bool:
        """Whether what is left of the budget covers a cost."""
        return state.work + cost <= self.budget

    def is_spent(self, state: RunState) -> bool:
        """Whether another round would exceed the budget, or the numbers that walkers may move.

        So is what is asked to end.
        """
        if self.ends():
            return True
        moved = (state.steps + self.settings.round_length) * state.walkers.position.size
        most = self.settings.coordinates_per_fge * self.budget / self.problem.num_data
        return moved > most or not self.can_pay(state, self.round_cost(state))

    def pays(self, state: RunState) -> bool:
        """Whether the budget pays for any run, on blocks as noisy as they may be."""
        return self.noise_cost(state) + self.run_cost(self.counts[0], self.fewest) <= self.budget

    def least_budget(self, state: RunState, blocks: int) -> float:
        """Return the sample gradients of the shortest run on these blocks by the fewest walkers.

        Where the numbers that walkers move are what counts, it is the budget that allows as many.
        """
        moved = LEAST_ROUNDS * self.settings.round_length * state.walkers.position.size
        allows = moved / self.settings.coordinates_per_fge * self.problem.num_data
        return max(self.noise_cost(state) + self.run_cost(blocks, self.fewest), allows)

    def allowed_bias(self, llc: float) -> float:
        """Return what noise might add to the llc of steps that are averaged."""
        return self.settings.noise_share * self.error * abs(llc)

    def bias(self, state: RunState, num_blocks: int) -> float:
        """Return what noise would add to llc, were it not balanced."""
        variance = state.block_noise * blocks_left_out(num_blocks)
        return noise_bias(variance, state.step_size, self.settings.friction_time)

    def max_blocks(self, state: RunState, bias: float, slack: float = 1.0) -> int:
        """Return the most blocks whose noise is balanced and would add no more than `bias`."""
        variance = min(self.variance_of(state, bias), most_balanced_variance(state.step_size))
        return max_blocks_within(slack * variance, state.block_noise, self.counts)

    def is_quiet(self, state: RunState, num_blocks: int) -> bool:
        """Whether so many blocks are no noisier than `allowed_bias` says, but for chance."""
        return self.max_blocks(state, state.allowed_bias, NOISE_SLACK) >= num_blocks

    def variance_of(self, state: RunState, bias: float) -> float:
        """Return the variance of gradients that would add `bias` to llc, were it not balanced."""
        return abs(bias) / noise_bias(1.0, state.step_size, self.settings.friction_time)


class BurningIn(NamedTuple):
    """A run that burns in.

    Attributes:
        state: The run.
        reserve: Sample gradients that are left for the run that follows.
        means: Mean llc of each round so far.
    """

    state: RunState
    reserve: float
    means: tuple[float, ...] = ()


class Averaging(NamedTuple):
    """A run that gathers records.

    Attributes:
        state: The run.
        noise_unmet: The criterion of the noise, where the budget pays for no larger blocks.
        least_budget: As in `SamplerResult`.
        records: What the rounds on these dynamics have kept.
        checked: How many of them had been made at the last look.
    """

    state: RunState
    noise_unmet: tuple[Unmet, ...]
    least_budget: float
    records: tuple[Record, ...] = ()
    checked: int = 0


class KeptRun(NamedTuple):
    """A run after a round, less what is made anew.

    Attributes:
        stage: The run, without the anchor's table of gradients and the walkers' coordinates.
        kept: As in `RunSetup`.
    """

    stage: BurningIn | Averaging
    kept: Int[np.ndarray, " kept"]


# What a run that is kept is made of.
KEPT_OF_RUNS = (
    *(KeptRun, BurningIn, Averaging, RunState, Walkers, StepSize, Estimate, Fidelity, Evaluation),
    *(Observed, Heat, Record, Unmet),
)


def run_walkers(
    setup: RunSetup, walkers: Walkers, keeper: AbstractWalkKeeper = NO_KEEPER
) -> SamplerResult:
    """Run the walkers until the error of llc is small and they agree, or the budget is spent.

    Gradients come from blocks of the data as small as their noise allows. Friction along draws of
    this noise takes off what it heats, but for a doubtful part: unbalanced, it might add
    `burn_in_noise` to llc while the walkers burn in, and `noise_share` of the wanted error
    afterwards. What the virial columns take off llc measures what noise and step size have added to
    it. Where that is too much, blocks are made larger and steps shorter.

    The budget must pay for a run: `setup.pays(begin(setup, walkers))`. A run that was kept goes on,
    and then the walkers only say in which coordinates they are.
    """
    kept = keeper.restore()
    if kept is not None:
        setup, stage = restored(setup, walkers, kept)
    else:
        setup, state = measure_noise(setup, begin(setup, walkers))
        # walkers that agreed are near, and what is left is left out of the averages
        burning = None if setup.agreed_before else begin_burn_in(setup, state)
        stage = begin_average(setup, state) if burning is None else burning
    if isinstance(stage, BurningIn):
        stage = begin_average(setup, burn_in(setup, stage, keeper))
    return finish(setup, stage, keeper)


def finish(
    setup: RunSetup, stage: Averaging, keeper: AbstractWalkKeeper = NO_KEEPER
) -> SamplerResult:
    """Average to the end, and take the walkers off the devices that they were divided over."""
    check, stage = average(setup, stage, keeper)
    walkers = collect_walkers(stage.state.walkers, setup.programs.layout)
    end = stage.state._replace(walkers=walkers)
    return SamplerResult(check, stage.least_budget, end, setup, stage.records)


def stripped(setup: RunSetup, stage: BurningIn | Averaging) -> KeptRun:
    """Return a run less what is made anew: the anchor, and the walkers' coordinates."""
    state = stage.state
    words = jax.random.key_data(state.walkers.keys)
    walkers = state.walkers._replace(linear_map=None, keys=words)
    state = state._replace(walkers=walkers, estimate=state.estimate._replace(anchor=None))
    return KeptRun(stage._replace(state=state), setup.kept)


def restored(
    setup: RunSetup, walkers: Walkers, kept: KeptRun
) -> tuple[RunSetup, BurningIn | Averaging]:
    """Return a run that was kept, in the coordinates of the walkers that it began with."""
    setup, state = dataclasses.replace(setup, kept=kept.kept), kept.stage.state
    keys = jax.random.wrap_key_data(state.walkers.keys, impl=jax.random.key_impl(walkers.keys))
    moved = state.walkers._replace(linear_map=walkers.linear_map, keys=keys)
    state = state._replace(walkers=deal_walkers(moved, setup.programs.layout))
    if state.estimate.center is not None:
        anchor = _anchor_at(setup, state, state.estimate.center)
        state = state._replace(estimate=state.estimate._replace(anchor=anchor))
    return setup, kept.stage._replace(state=state)


def begin_average(setup: RunSetup, state: RunState) -> Averaging:
    """Choose blocks and walkers for the steps that are averaged, within the budget."""
    share = setup.settings.noise_share * setup.error
    # llc of walkers that have burnt in, by which the bias of what is averaged is judged
    state = state._replace(allowed_bias=setup.allowed_bias(state.llc))
    blocks = setup.max_blocks(state, state.allowed_bias)
    wanted = Fidelity(blocks, plan_energy_error(setup.error, setup.settings))
    paid, number = _within_budget(setup, state, wanted)
    if number < state.num_walkers:
        kept = setup.programs.keep(state.walkers, number=number, chains=setup.chains)
        # What all walkers were told is of another shape: these are told anew.
        told = Estimate(state.fidelity._replace(num_blocks=0), None, state.estimate.here)
        state = state._replace(walkers=deal_walkers(kept, setup.programs.layout), estimate=told)
    state = switch_fidelity(setup, state, paid)
    noise = setup.bias(state, paid.num_blocks) / max(abs(state.llc), 1e-300)
    unmet = (Unmet(GRADIENT_NOISE, noise, share),) if noise > share else ()
    return Averaging(state, unmet, setup.least_budget(state, blocks))


def begin(setup: RunSetup, walkers: Walkers) -> RunState:
    """Return the run before its first round, by what llc is at the walkers."""
    excess = float(np.mean(on_host(walkers.excess)))  # in numpy, which compiles nothing
    walkers = deal_walkers(walkers, setup.programs.layout)
    # The first step size is that of the energy error of a burn-in.
    untold = Estimate(
        Fidelity(0, setup.settings.energy_error),
        None,
        blank_evaluation(walkers, setup.programs.columns, is_noisy=False),
    )
    state = RunState(walkers, float(setup.problem.posterior.nbeta) * excess, untold)
    return state._replace(longest_step=state.step_size)


def measure_noise(setup: RunSetup, state: RunState) -> tuple[RunSetup, RunState]:
    """Measure the noise of gradients at the walkers, on the smallest blocks.

    Where a few examples make most of it, they are kept in all gradients from here on, and the noise
    of the others is what counts.
    """
    if setup.counts[0] == 1:
        return setup, state
    blocks = setup.split(setup.counts[0])
    variances = _block_variances(setup, state, blocks)
    state = state._replace(work=state.work + setup.noise_cost(state))
    state = _with_noise(setup, state, float(np.sum(variances)), blocks.rows.shape[0])
    again = setup.noise_cost(state) + setup.run_cost(setup.counts[0], setup.fewest)
    if not setup.kept.size and setup.can_pay(state, again + setup.suspects_cost(state)):
        heavy, state = find_heavy(setup, state, blocks, variances)
        if heavy.size:
            return measure_noise(dataclasses.replace(setup, kept=heavy), state)
    return setup, state


def _with_noise(setup: RunSetup, state: RunState, total: float, count: int) -> RunState:
    """Take over the variance of the gradient that so many blocks have, the smallest."""
    # the mean of a pair has half the variance of a block, and 1 - PAIR / count of that
    noise = total / (PAIR * count)
    # gradients of the blocks weigh what their examples do in all data
    share = setup.kept.size / setup.problem.num_data
    return state._replace(block_noise=(1 - share) ** 2 * noise, noise_rounds=1)


def _block_variances(
    setup: RunSetup, state: RunState, blocks: Blocks, *, is_about_mean: bool = True
) -> Float[np.ndarray, " blocks"]:
    """Return each block's part in the variance of the gradient, a mean over some walkers."""
    # of as many blocks as may be: what a few heavy examples do is in few of them
    most = max(PAIR, NOISE_EXAMPLES // blocks.rows.shape[1])
    some = Blocks(blocks.rows[:most], NONE, NONE)
    linear_map = state.walkers.linear_map
    points = on_host(state.walkers.position)[: setup.settings.noise_points]

    def gradients(position):
        return setup.programs.anchor(
            setup.problem, linear_map, position, setup.reference_loss, some
        ).block_gradient

    # position zero is the mean of q, the anchor that blocks would have
    at_anchor, nbeta = gradients(np.zeros_like(points[0])), setup.problem.posterior.nbeta
    parts = [
        setup.programs.noise(
            linear_map, nbeta, at_anchor, gradients(one), is_about_mean=is_about_mean
        )
        for one in points
    ]
    return np.mean(np.asarray(parts, float), axis=0)


def find_heavy(
    setup: RunSetup, state: RunState, blocks: Blocks, variances: Float[np.ndarray, " blocks"]
) -> tuple[Int[np.ndarray, " heavy"], RunState]:
    """Find the few examples without which steps cost much less, even if each evaluates them.

    They are looked for in the noisiest blocks, one by one.
    """
    usual, size = float(np.median(variances)), blocks.rows.shape[1]
    suspects = np.argsort(-variances)[: setup.most_suspects // size]
    suspects = suspects[variances[suspects] > HEAVY * usual]
    if not suspects.size:
        return NONE, state
    rows = blocks.rows[: variances.size][suspects].ravel()
    parts = _block_variances(setup, state, Blocks(rows[:, None], NONE, NONE), is_about_mean=False)
    state = state._replace(work=state.work + setup.suspects_cost(state))
    # from the variance of single examples to what each of them does to its block's mean
    parts *= (rows.size - 1) / (size**2 * (variances.size - 1))
    heavy = np.argsort(-parts)[:MOST_KEPT]
    heavy = heavy[parts[heavy] > HEAVY * usual]
    # suspects without their heavy examples are usual blocks: a difference would be of two large
    # numbers
    others = np.sum(np.delete(variances, suspects)) + usual * suspects.size
    left = others + np.cumsum([0.0, *parts[heavy][::-1]])[::-1]

    def cost(kept):
        quiet = _with_noise(setup, state, float(left[kept]), blocks.rows.shape[0])
        wanted = setup.max_blocks(quiet, setup.allowed_bias(state.llc))
        return step_cost(setup.problem.num_data, wanted, 1, kept)

    best = min(range(len(left)), key=cost)
    pays = KEPT_GAIN * cost(best) < cost(0)
    return (np.sort(rows[heavy[:best]]) if pays else NONE), state


def switch_fidelity(setup: RunSetup, state: RunState, fidelity: Fidelity) -> RunState:
    """Go on by another number of blocks or energy error."""
    walkers, before = state.walkers, state.fidelity
    if fidelity.energy_error != before.energy_error:
        change = fidelity.energy_error / before.energy_error
        walkers = walkers._replace(step_size=step_size_after(change, walkers.step_size))
        # a step that is made shorter here is not one that has become so
        longest = state.longest_step * float(walkers.step_size.step) / state.step_size
        state = state._replace(longest_step=longest)
    if fidelity.num_blocks == before.num_blocks:
        estimate = state.estimate._replace(fidelity=fidelity)
        return state._replace(walkers=walkers, estimate=estimate)
    has_anchor = fidelity.num_blocks > 1
    # the gradients so far are those of another estimate: step -1 asks for those of this one
    blank = blank_evaluation(walkers, setup.programs.columns, is_noisy=has_anchor)
    state = state._replace(walkers=walkers, estimate=Estimate(fidelity, None, blank))
    if has_anchor:
        center = np.mean(on_host(walkers.position), axis=0)
        told = state.estimate._replace(anchor=_anchor_at(setup, state, center), center=center)
        state = state._replace(estimate=told)
    state, _ = _call(setup, state, -1, 0)
    spent = setup.run_cost(fidelity.num_blocks, state.num_walkers, rounds=0)
    return state._replace(work=state.work + spent)


def _anchor_at(setup: RunSetup, state: RunState, center: Float[np.ndarray, " dim"]) -> Anchor:
    """Evaluate the blocks of the state's fidelity at a point of round coordinates."""
    blocks, linear_map = setup.split(state.fidelity.num_blocks), state.walkers.linear_map
    return setup.programs.anchor(setup.problem, linear_map, center, setup.reference_loss, blocks)


def advance(
    setup: RunSetup, state: RunState, reserve: float | None = None
) -> tuple[RunState, Record]:
    """Run one round; look for rounding where steps have become much shorter.

    The look is left out where it would not leave the `reserve` of the budget, by default what the
    fewest rounds cost.
    """
    state, record = _run_round(setup, state)
    state = state._replace(longest_step=max(state.longest_step, state.step_size))
    has_fallen = state.step_size < ROUNDING_FALL * state.longest_step
    cost = setup.round_cost(state)
    left = LEAST_ROUNDS * cost if reserve is None else reserve
    if has_fallen and not setup.is_spent(state) and setup.can_pay(state, cost + left):
        state = tell_rounding(setup, state, _last_error(record))
    return state, record


def go_on(setup: RunSetup, state: RunState, steps: int) -> RunState:
    """Move walkers by so many steps, and count them; what they say is not kept."""
    while steps > 0:
        now = min(steps, setup.settings.round_length)
        state, _ = _call(setup, state, 0, now)
        work = state.work + setup.round_cost(state) * now / setup.settings.round_length
        state, steps = state._replace(work=work, steps=state.steps + now), steps - now
    return state


def _run_round(setup: RunSetup, state: RunState) -> tuple[RunState, Record]:
    """Run the steps of a round, and count them."""
    length = setup.settings.round_length
    state, record = _call(setup, state, 0, length)
    record = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, float), jax.device_get(record))
    moved = state.num_walkers * setup.settings.bin_length
    noise, rounds = state.block_noise, state.noise_rounds
    if state.estimate.anchor is not None:
        rounds = min(rounds + 1, NOISE_MEMORY)
        left_out = blocks_left_out(state.estimate.anchor.rows.shape[0])
        noise += (float(record.noise.mean()) / max(left_out, 1) - noise) / rounds
    return state._replace(
        block_noise=noise,
        noise_rounds=rounds,
        width=float(record.width),
        work=state.work + setup.round_cost(state),
        steps=state.steps + length,
        returned=state.returned + float(record.returned.sum()) * moved,
    ), record


def tell_rounding(setup: RunSetup, state: RunState, error: float) -> RunState:
    """Let steps be long again where it is rounding that makes the energy error of short ones.

    Steps of a round that shrink all the way say so. The walkers stay where they are.
    """
    exact = state.fidelity.energy_error * ROUNDING_TARGET
    estimate = state.estimate._replace(fidelity=state.fidelity._replace(energy_error=exact))
    after, record = _run_round(setup, state._replace(estimate=estimate, rounding=0.0))
    state = state._replace(work=after.work, steps=after.steps)
    if not is_rounding(error, _last_error(record), after.step_size / state.step_size):
        return state._replace(longest_step=state.step_size)
    longest = jnp.asarray(state.longest_step, state.walkers.step_size.step.dtype)
    walkers = state.walkers._replace(step_size=fresh_step_size(longest))
    # longer steps round more often: what was too little once is doubled
    return state._replace(walkers=walkers, rounding=max(error, 2 * state.rounding))


def _last_error(record: Record) -> float:
    """Return the mean square of the energy errors of the last bin that has any."""
    errors = record.energy_error[np.isfinite(record.energy_error)]
    return float(errors[-1]) if errors.size else math.nan


def _call(setup: RunSetup, state: RunState, start: int, stop: int) -> tuple[RunState, Record]:
    """Call the compiled program that moves walkers."""
    fidelity, anchor, here, _ = state.estimate
    assert fidelity.num_blocks, "a fidelity is chosen before the first round"
    dimensions = effective_dimensions(state.llc, setup.problem.posterior.center.size)
    per_time = noise_bias(state.variance, state.step_size, 1.0)
    time = plan_friction_time(state.width, state.allowed_bias, per_time, setup.settings)
    walkers, here, record = setup.programs.advance(
        setup.problem,
        anchor,
        state.walkers,
        here,
        setup.reference_loss,
        np.float32(fidelity.energy_error * dimensions + state.rounding),
        np.float32(time),
        *map(np.int32, (state.steps, start, stop)),
    )
    estimate = state.estimate._replace(here=here)
    heat = plan_heat(state.variance, state.step_size, time)
    return state._replace(walkers=walkers, estimate=estimate, heat=heat), record


def begin_burn_in(setup: RunSetup, state: RunState) -> BurningIn | None:
    """Plan to run on noisier blocks than the error allows, where the budget pays for both."""
    settings, walkers = setup.settings, state.num_walkers
    # what is left of the heat is no more than that, and is not averaged
    variance = setup.variance_of(state, settings.burn_in_noise * state.llc)
    rough = max_blocks_within(variance, state.block_noise, setup.counts)
    wanted = setup.max_blocks(state, setup.allowed_bias(state.llc))
    reserve = setup.run_cost(wanted, walkers)  # burn-in must leave what the run after it takes
    first = setup.run_cost(rough, walkers, rounds=1)
    if wanted >= rough or not setup.can_pay(state, reserve + first):
        return None
    state = state._replace(allowed_bias=settings.burn_in_noise * abs(state.llc))
    state = switch_fidelity(setup, state, Fidelity(rough, settings.energy_error))
    return BurningIn(state, reserve)


def burn_in(setup: RunSetup, stage: BurningIn, keeper: AbstractWalkKeeper) -> RunState:
    """Run until llc has stopped moving much, or the rest is needed for the run that follows."""
    settings = setup.settings
    while (
        len(stage.means) < settings.max_burn_in
        and not setup.is_spent(stage.state)
        and setup.can_pay(stage.state, setup.round_cost(stage.state) + stage.reserve)
        and not has_arrived(stage.means, settings.burn_in_change)
    ):
        state, record = advance(setup, stage.state, stage.reserve)
        mean = float(record.llc.mean())
        stage = stage._replace(state=state, means=(*stage.means, mean))
        keeper.save(stripped, setup, stage)
        setup.report(state.work, mean, math.nan)
    state, means = stage.state, stage.means
    return state._replace(llc=means[-1] if means else state.llc)


def has_arrived(means: Sequence[float], change: float) -> bool:
    """Say whether the means of rounds have stopped moving between thirds, or are not finite.

    The first third is where walkers come from: compared with it, they would never arrive.
    """
    if not means or not math.isfinite(means[-1]):
        return bool(means)
    third = len(means) // 3
    if third == 0:
        return False
    moved = abs(np.mean(means[-2 * third : -third]) - np.mean(means[-third:]))
    return bool(moved < change * abs(means[-1]))


def _within_budget(setup: RunSetup, state: RunState, wanted: Fidelity) -> tuple[Fidelity, int]:
    """Return a fidelity and a number of walkers that the budget pays for.

    Walkers are let go first; then blocks become smaller than noise allows.
    """
    left = setup.budget - state.work
    # larger blocks first: their noise is what the error allows
    for count in sorted(count for count in setup.counts if count >= wanted.num_blocks):
        fixed = setup.run_cost(count, 0)
        each = setup.run_cost(count, 1) - fixed
        number = plan_walkers(left, fixed, each, state.num_walkers, setup.fewest)
        if number:
            return wanted._replace(num_blocks=count), number
    raise AssertionError("the least budget pays for the fewest walkers on the smallest blocks")


def average(
    setup: RunSetup, stage: Averaging, keeper: AbstractWalkKeeper
) -> tuple[Check, Averaging]:
    """Gather records until they meet the criteria, at more exact fidelities where need be.

    They are looked at where they have grown by `CHECK_GROWTH`, and where the budget is spent.
    """
    while True:
        state, made = stage.state, len(stage.records)
        if made == stage.checked or (
            made < CHECK_GROWTH * stage.checked and not setup.is_spent(state)
        ):
            state, record = advance(setup, state)
            stage = stage._replace(state=state, records=(*stage.records, record))
            keeper.save(stripped, setup, stage)
            continue
        check = check_records(setup, stage.records, state.heat, state.fidelity.energy_error)
        if not math.isfinite(check.analysis.llc):
            break
        setup.report(state.work, check.analysis.llc, check.analysis.llc_sem)
        # walkers that begin too hot have too large a llc at first, and would allow too much noise
        allowed = min(state.allowed_bias, setup.allowed_bias(check.analysis.llc))
        state = state._replace(llc=check.analysis.llc, allowed_bias=allowed)
        state, fidelity = _choose_fidelity(setup, state, check.analysis)
        if fidelity != state.fidelity:  # records of other dynamics are not averaged with these
            state = switch_fidelity(setup, state, fidelity)
            stage = stage._replace(state=state, records=(), checked=0)
            continue
        check = check._replace(unmet=(*stage.noise_unmet, *check.unmet))
        if not check.unmet or setup.is_spent(state):
            break
        stage = stage._replace(state=state, checked=made)
    # as it was before this look, which a run that goes on from here takes again
    keeper.save(stripped, setup, stage, is_last=True)
    return check, stage._replace(state=state)


def check_records(
    setup: RunSetup, records: tuple[Record, ...], heat: Heat, energy_error: float
) -> Check:
    """Average records, and compare them with the criteria.

    Args:
        setup: Of the run.
        records: What its rounds have kept.
        heat: What the noise of gradients would add to llc, by its measured variance.
        energy_error: Mean square of a step's energy error, in nats^2 per effective dimension.
    """
    llc, virial, radius2, core_radius2 = parts = tuple(
        np.concatenate([getattr(record, name) for record in records], axis=1)
        for name in ("llc", "virial", "radius2", "core_radius2")
    )
    if not all(np.all(np.isfinite(part)) for part in parts):
        broken = Analysis.broken(llc.shape[0])
        return Check(broken, llc, radius2, (Unmet(ERROR, math.nan, setup.error),))
    returned = np.concatenate([np.asarray(record.returned) for record in records])
    if np.mean(returned[returned.size // 2 :]) > MOST_RETURNED:
        virial = virial[..., :0]
    analysis = without_heat(analyse(llc, virial, radius2, core_radius2), heat)
    bias = step_bias(energy_error) * abs(analysis.llc)
    analysis = dataclasses.replace(analysis, parts=analysis.parts.plus(dynamics=bias))
    # walkers that agreed before may differ by more, where a larger error is asked for
    patience = max(1.0, setup.error / USUAL_ERROR) if setup.agreed_before else 1.0
    unmet = unmet_by(analysis, setup.error, patience, llc.shape[1], setup.settings)
    return Check(analysis, llc, radius2, unmet)


def step_bias(energy_error: float) -> float:
    """Return what finite steps may add to llc, relative to it."""
    return STEP_BIAS * energy_error ** (1 / 3)


def without_heat(analysis: Analysis, heat: Heat) -> Analysis:
    """Take off llc a part of the heat that nothing else has taken off, and add its doubt."""
    left = max(0.0, heat.left - max(0.0, analysis.added))
    doubt = math.hypot(HEAT_DOUBT * left, BALANCE_DOUBT * heat.balanced)
    return dataclasses.replace(
        analysis,
        adjusted=analysis.adjusted - HEAT_SHARE * left,
        parts=analysis.parts.plus(dynamics=doubt),
    )


def unmet_by(
    analysis: Analysis,
    relative_error: float,
    patience: float,
    bins: int,
    settings: SamplerSettings,
) -> tuple[Unmet, ...]:
    """Return which criteria of a settled run the averages do not meet."""
    error = analysis.llc_sem / max(abs(analysis.llc), 1e-300)
    bounds = (
        Unmet(ERROR, error, relative_error),
        Unmet(RHAT, analysis.rhat, 1 + patience * (RHAT_BOUND - 1)),
        Unmet(DRIFT, abs(analysis.drift_z), DRIFT_BOUND),
    )
    # not "above": NaN meets no bound
    missed = tuple(bound for bound in bounds if not bound.value <= bound.bound)
    if bins >= settings.min_bins:
        return missed
    lengths = (count * settings.bin_length for count in (bins, settings.min_bins))
    return (*missed, Unmet(LENGTH, *lengths))


def _choose_fidelity(
    setup: RunSetup, state: RunState, analysis: Analysis
) -> tuple[RunState, Fidelity]:
    """Return the fidelity to go on with: a more exact one where averages or noise ask for it."""
    fidelity, dynamics = state.fidelity, analysis.parts.dynamics
    is_biased = analysis.added > 0 and dynamics > REFINE_AT * setup.error * abs(analysis.llc)
    may_refine = state.refinements < setup.settings.max_refinements
    if is_biased and may_refine and not setup.is_spent(state):
        # noise may leave a part of the bias that was seen, whichever of the two has made it
        allowed = min(state.allowed_bias, analysis.added / (LESS_NOISE * BALANCE_DOUBT))
        state = state._replace(allowed_bias=allowed)
        finer = refine(fidelity, setup.max_blocks(state, allowed))
        if setup.can_pay(state, setup.run_cost(finer.num_blocks, state.num_walkers)):
            return state._replace(refinements=state.refinements + 1), finer
    # walkers that have moved away from the anchor are noisier
    is_quiet = setup.is_quiet(state, fidelity.num_blocks)
    blocks = setup.max_blocks(state, state.allowed_bias)
    if is_quiet or not setup.can_pay(state, setup.run_cost(blocks, state.num_walkers)):
        return state, fidelity
    return state, fidelity._replace(num_blocks=blocks)
