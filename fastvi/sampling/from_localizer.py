"""A walk that begins at the localizer: no fit, no pass over the data.

Where the localizer decides most directions, the posterior is nearly round in the coordinates
`sqrt(gamma + nbeta curvature)`, one number for each array of parameters. A few gradient differences
on small batches measure this curvature, the *stiffness* (the largest eigenvalue of the Hessian of
nbeta L_n in these coordinates) and the noise of a gradient. They choose the coordinates, the step
and the batch. Then walkers step on fresh minibatches, and what the noise adds to llc, its *heat*,
is bounded by a batch large enough, and half of it taken off.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._typing import Float, Keys
from fastvi.families.moments import LinearMap
from fastvi.sampling.averages import Analysis, analyse, furthest_off
from fastvi.sampling.dynamics import State
from fastvi.sampling.minibatches import (
    AbstractSource,
    MinibatchPrograms,
    Observed,
    Steps,
    blank_state,
)
from fastvi.sampling.run import Check, Unmet, unmet_by
from fastvi.sampling.settings import SamplerSettings
from fastvi.target.posterior import LocalPosterior
from fastvi.target.work import GRADIENT, LOSS

# Step size, in standard deviations of the posterior, at most: four steps a radian. At half, the
# same time costs twice as much; at double, the walk is unstable from a stiffness of 10 on.
LARGEST_STEP = 0.3
# Step size times the square root of one plus the stiffness; the walk is unstable at 2. At half,
# stiff walks cost twice as much; at double, rounding and curvature that varies may end them.
LARGEST_ANGLE = 1.1
# Time after which a momentum is forgotten: half of it is critical damping in round directions, and
# heat is proportional to it. At half, walkers diffuse; at double, heat is double.
FRICTION_TIME = 0.5
# Time that walkers take to forget where they began, in the same unit. At half, llc still falls or
# rises by a few per cent afterwards; at double, a short budget buys nothing else.
BURN_IN_TIME = 3.0
# Stiffness from which on the coordinates of a fitted q pay for their fit.
MOST_STIFFNESS = 100.0
# Products with the Hessian that look for its largest eigenvalue, from the noise of a gradient on.
STIFFNESS_PRODUCTS = 2
# Part of the heat of a quadratic loss that is taken off llc. A quadratic loss has all of it, and a
# transformer half of it, since curvature falls with the distance from w*. The doubt is the standard
# deviation of a share that may be anything from 0.3 to 1.
HEAT_SHARE = 0.65
HEAT_DOUBT = 0.2
# Part of the budget that measurements and burn-in may take together.
PREPARATION_SHARE = 0.4
# Steps that are averaged, at least; a walk of fewer has no error to speak of.
LEAST_STEPS = 32
# Step number from which on batches are those of measurements.
PROBE_STEPS = 2**20
# Share of steps taken back at which the step size is halved.
RETURNED = 0.02


@dataclasses.dataclass(frozen=True)
class WalkSetup:
    """What a walk shares from beginning to end.

    Attributes:
        programs: The compiled round.
        posterior: The target.
        leaf_sizes: Lengths of the arrays of parameters, in order.
        source: `(step, steps, parts) -> source` of the batches of these steps, None where there
            are no more examples.
        part_size: Examples of a part.
        keys: One key for each walker.
        seed: Of the directions that curvature is measured along.
        settings: The sampler's.
        error: Standard error that is wanted, relative to llc.
        budget: Sample gradients that the walk never exceeds.
        must_walk: Whether to walk however stiff the posterior is, as nothing else is possible.
        report: Receives the work so far and llc.
    """

    programs: MinibatchPrograms
    posterior: LocalPosterior
    leaf_sizes: tuple[int, ...]
    source: Callable[[int, int, int], AbstractSource | None]
    part_size: int
    keys: Keys
    seed: np.random.SeedSequence
    settings: SamplerSettings
    error: float
    budget: float
    must_walk: bool
    report: Callable[[float, float], None]

    def cost(self, steps: int, parts: int) -> float:
        """Price steps of all walkers: a gradient, and the loss at w*, of each example."""
        return (GRADIENT + LOSS) * steps * parts * self.keys.shape[0] * self.part_size


class Measured(NamedTuple):
    """What a few gradients say of the posterior.

    Attributes:
        curvature: nbeta times the mean curvature of L_n in each array of parameters, at least 0.
        stiffness: Largest eigenvalue of the Hessian of nbeta L_n that was met, in round
            coordinates.
        decrement: Nats of log posterior that a step from w* along the gradient would gain.
        decrement_error: Its standard error.
    """

    curvature: Float[np.ndarray, " leaves"]
    stiffness: float
    decrement: float
    decrement_error: float


class Walk(NamedTuple):
    """A finished walk.

    Attributes:
        check: Averages and criteria that are not met; `check.llc` are means over bins.
        measured: What was measured before.
        reference_loss: Mean of L_B(w*) over the batches.
        heat: What the noise of the gradients adds to llc, were the loss quadratic.
        batch: Examples of a walker's batch.
        step_size: The step.
        steps: Steps that were averaged, burn-in included.
        returned: Steps taken back, all walkers together.
        examples: Examples read.
        work: Sample gradients.
        ended_early: Whether the data ended before the walk.
    """

    check: Check
    measured: Measured
    reference_loss: float
    heat: float
    batch: int
    step_size: float
    steps: int
    returned: float
    examples: int
    work: float
    ended_early: bool


class TooStiff(NamedTuple):
    """What was found where these coordinates are of no use: the stiffness, and the work it took."""

    stiffness: float
    work: float


class OutOfData(Exception):
    """The source has no more examples."""


class _Walker:
    """Calls the compiled round and counts what it costs."""

    def __init__(self, setup: WalkSetup):
        self.setup, self.work, self.examples, self.done = setup, 0.0, 0, 0

    def source(self, step: int, steps: int, parts: int) -> AbstractSource:
        """Return the batches of some steps."""
        found = self.setup.source(step, steps, parts)
        if found is None:
            raise OutOfData
        self.examples += steps * parts * self.setup.keys.shape[0] * self.setup.part_size
        return found

    def call(
        self,
        linear_map: LinearMap,
        source: AbstractSource,
        state: State,
        parts: int,
        step_size: float,
        first: int,
        start: int,
        stop: int,
    ) -> tuple[State, Steps]:
        """Run one round."""
        setup = self.setup
        self.work += setup.cost(stop - start, parts)
        dtype = state.position.dtype
        numbers = (jnp.asarray(value, dtype) for value in (step_size, FRICTION_TIME))
        counts = (jnp.int32(value) for value in (first, start, stop))
        return setup.programs.advance(
            setup.posterior,
            linear_map,
            source,
            state,
            setup.keys,
            jnp.int32(parts),
            *numbers,
            *counts,
        )

    def gradient(
        self, linear_map: LinearMap, position: Float[np.ndarray, "walkers dim"], batch: tuple
    ) -> Float[np.ndarray, "walkers dim"]:
        """Return the gradient of nbeta L_B of each walker in round coordinates."""
        number, source = batch
        state, _ = self.call(linear_map, source, blank_state(position), 1, 0.0, number, -1, 0)
        pulled = np.square(np.asarray(linear_map.scale)) * float(self.setup.posterior.gamma)
        return np.asarray(state.here.gradient) - pulled * position

    def batch(self, number: int) -> tuple[int, AbstractSource]:
        """Return a batch of a measurement, to evaluate at as many positions as need be."""
        step = PROBE_STEPS + number
        return step, self.source(step, 1, 1)


def walk_from_localizer(setup: WalkSetup) -> Walk | TooStiff:
    """Walk until the error of llc is small, or the budget or the data are spent."""
    walker = _Walker(setup)
    rng = np.random.default_rng(setup.seed)
    measured = measure_curvature(walker, rng)
    if not measured.stiffness <= MOST_STIFFNESS and not setup.must_walk:
        return TooStiff(measured.stiffness, walker.work)
    linear_map = round_map(setup, measured.curvature)
    step_size = plan_step(measured.stiffness)
    shape, dtype = (setup.keys.shape[0], setup.posterior.center.size), setup.posterior.center.dtype
    position, momentum = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
    return _run(walker, linear_map, measured, step_size, position, momentum)


def measure_curvature(walker: _Walker, rng: np.random.Generator) -> Measured:
    """Measure the curvature of each array, the stiffness, and the gradient at w*."""
    setup = walker.setup
    dim, dtype = setup.posterior.center.size, setup.posterior.center.dtype
    walkers = setup.keys.shape[0]
    localizer = round_map(setup, np.zeros(len(setup.leaf_sizes)))
    first, second = walker.batch(0), walker.batch(1)
    zero = np.zeros((walkers, dim), dtype)
    direction = rng.standard_normal((walkers, dim), np.float32).astype(dtype)
    at_center = walker.gradient(localizer, zero, first)
    bent = walker.gradient(localizer, direction, first) - at_center
    curvature = leaf_curvature(direction, bent, setup.leaf_sizes) * float(setup.posterior.gamma)
    again = walker.gradient(localizer, zero, second)
    # the coordinates of the walk, in which stiffness is what limits its step
    linear_map = round_map(setup, curvature)
    change = np.asarray(linear_map.scale) / np.asarray(localizer.scale)
    noise, stiffness = (at_center - again) * change, 0.0
    del direction, bent
    here = at_center * change
    for _ in range(STIFFNESS_PRODUCTS):
        unit = noise / np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), 1e-30)
        noise = walker.gradient(linear_map, unit, first) - here
        stiffness = max(stiffness, float(np.quantile(np.linalg.norm(noise, axis=1), 0.75)))
    decrement, error = mean_square_gradient((at_center + again) / 2)
    return Measured(curvature, stiffness, 0.5 * decrement, 0.5 * error)


def leaf_curvature(
    direction: Float[np.ndarray, "walkers dim"],
    bent: Float[np.ndarray, "walkers dim"],
    sizes: tuple[int, ...],
) -> Float[np.ndarray, " leaves"]:
    """Return the mean Rayleigh quotient of each array of parameters, at least 0."""
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    products, squares = (
        np.array([np.vdot(direction[:, part], other[:, part]) for part in parts])
        for other in (bent, direction)
    )
    return np.maximum(products / np.maximum(squares, 1e-30), 0.0)


def mean_square_gradient(gradients: Float[np.ndarray, "walkers dim"]) -> tuple[float, float]:
    """Return |E g|^2 without the noise of g, from independent draws of g, and its error."""
    count = gradients.shape[0]
    if count < 2:
        return 0.0, math.inf
    products = gradients.astype(float) @ gradients.T.astype(float)
    pairs = products[np.triu_indices(count, 1)]
    return float(pairs.mean()), float(pairs.std() / math.sqrt(pairs.size))


def round_map(setup: WalkSetup, curvature: Float[np.ndarray, " leaves"]) -> LinearMap:
    """Return the coordinates `sqrt(gamma + curvature)`, one number for each array."""
    posterior, dtype = setup.posterior, setup.posterior.center.dtype
    scale = np.repeat(1 / np.sqrt(float(posterior.gamma) + curvature), setup.leaf_sizes)
    scale, dim = jnp.asarray(scale, dtype), posterior.center.size
    return LinearMap(
        jnp.zeros(dim, dtype), scale, jnp.zeros((0, dim), dtype), jnp.zeros((0, 0), dtype)
    )


def plan_step(stiffness: float) -> float:
    """Return the step size: stable in the stiffest direction that was met."""
    return min(LARGEST_STEP, LARGEST_ANGLE / math.sqrt(1 + stiffness))


def position_heat(
    step_size: float, friction_time: float, curvature: Float[np.ndarray, " directions"]
) -> Float[np.ndarray, " directions"]:
    """Return what gradient noise of unit variance adds to the mean square of a position.

    In units of its variance without noise, in directions of this total curvature, when every step
    draws the noise anew: `step^2 coth(step / (2 friction_time)) / 4` as the step goes to zero.
    """
    kept = math.exp(-step_size / friction_time)
    slow = step_size**2 * (1 + kept) / (4 * (1 - kept))
    return slow / (1 - np.minimum(step_size**2 * curvature / 4, 0.5))


def measure_heat(
    walker: _Walker,
    linear_map: LinearMap,
    step_size: float,
    position: Float[np.ndarray, "walkers dim"],
    number: int,
) -> float:
    """Return what the noise of batches of one part adds to llc, were the loss quadratic.

    Noise along a direction where data have the curvature c, and data and localizer a, raises the
    variance there by `position_heat / a`, and llc by half of c times that.
    """
    one, two, three = (walker.batch(number + index) for index in range(3))
    noise = walker.gradient(linear_map, position, one)
    noise = (noise - walker.gradient(linear_map, position, two)) / math.sqrt(2)
    size = np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), 1e-30)
    bent = walker.gradient(linear_map, position + noise / size, three)
    bent -= walker.gradient(linear_map, position, three)
    square = size[:, 0] ** 2
    curvature = np.sum(noise * bent, axis=1) / size[:, 0]
    scale2 = np.square(np.asarray(linear_map.scale))
    localizer = float(walker.setup.posterior.gamma) * (noise**2 @ scale2) / square
    total = localizer + np.abs(curvature)
    raised = square * position_heat(step_size, FRICTION_TIME, total)
    return float(np.mean(0.5 * raised * curvature / total))


def plan_parts(heat_of_one: float, wanted: float, most: int) -> int:
    """Return the parts of a batch: as few as keep the doubt of the heat within what is wanted."""
    doubtful = HEAT_DOUBT * max(heat_of_one, 0.0)
    return int(np.clip(math.ceil(doubtful / max(wanted, 1e-300)), 1, most))


def _run(
    walker: _Walker,
    linear_map: LinearMap,
    measured: Measured,
    step_size: float,
    position: Float[np.ndarray, "walkers dim"],
    momentum: Float[np.ndarray, "walkers dim"],
) -> Walk:
    """Burn in, measure the noise, and average."""
    setup, settings, nbeta = (
        walker.setup,
        walker.setup.settings,
        float(walker.setup.posterior.nbeta),
    )
    rounds, parts, heat, returned, done, ended = [], 1, 0.0, 0.0, 0, False
    state = blank_state(position, momentum)
    try:
        state, _ = walker.call(linear_map, walker.source(0, 1, 1), state, 1, 0.0, 0, -1, 0)
        burn = _affordable(walker, math.ceil(BURN_IN_TIME / step_size), 1, PREPARATION_SHARE)
        state, kept, done = _advance(walker, linear_map, state, parts, step_size, done, burn)
        while _returned(kept) > RETURNED and step_size > 1e-3 * LARGEST_STEP:
            step_size /= 2
            state = blank_state(position, momentum)
            state, _ = walker.call(
                linear_map, walker.source(done, 1, 1), state, 1, 0.0, done, -1, 0
            )
            state, kept, done = _advance(walker, linear_map, state, parts, step_size, done, burn)
        rounds = [kept]
        llc = nbeta * float(np.mean(kept.observed.excess[len(kept.observed.excess) // 2 :]))
        if walker.work + setup.cost(4, 1) < PREPARATION_SHARE * setup.budget:
            of_one = measure_heat(walker, linear_map, step_size, np.array(state.position), 2)
            left = setup.budget - walker.work
            most = max(1, int(left / setup.cost(LEAST_STEPS, 1)))
            parts = plan_parts(of_one, 0.5 * setup.error * abs(llc), most)
            heat = of_one / parts
        rounds = []
        while True:
            steps = _affordable(walker, setup.programs.length, parts, 1.0)
            if steps == 0:
                break
            state, kept, done = _advance(walker, linear_map, state, parts, step_size, done, steps)
            rounds.append(kept)
            returned += float(kept.returned.sum())
            check = _check(setup, rounds, heat)
            setup.report(walker.work, check.analysis.llc)
            if not check.unmet or not math.isfinite(check.analysis.llc):
                break
    except OutOfData:
        ended = True
    check = _check(setup, rounds, heat)
    observed = _joined(rounds)
    return Walk(
        check,
        measured,
        float(np.mean(observed.reference)) if rounds else math.nan,
        heat,
        parts * setup.part_size,
        step_size,
        observed.excess.shape[0] if rounds else 0,
        returned,
        walker.examples,
        walker.work,
        ended,
    )


def _affordable(walker: _Walker, steps: int, parts: int, share: float) -> int:
    """Return how many of these steps a share of the budget pays for."""
    left = share * walker.setup.budget - walker.work
    return max(0, min(steps, int(left / walker.setup.cost(1, parts))))


def _advance(
    walker: _Walker,
    linear_map: LinearMap,
    state: State,
    parts: int,
    step_size: float,
    done: int,
    steps: int,
) -> tuple[State, Steps, int]:
    """Make so many steps, in rounds, and return what they say."""
    kept, length = [], walker.setup.programs.length
    while steps:
        now = min(steps, length)
        source = walker.source(done + 1, now, parts)
        state, said = walker.call(linear_map, source, state, parts, step_size, done + 1, 0, now)
        kept.append(_on_host(said, now))
        done, steps = done + now, steps - now
    return state, _concatenate(kept), done


def _on_host(steps: Steps, count: int) -> Steps:
    observed = Observed(*(np.asarray(leaf, float)[:count] for leaf in steps.observed))
    return Steps(observed, np.asarray(steps.returned, float)[:count])


def _concatenate(kept: list[Steps]) -> Steps:
    observed = Observed(
        *(np.concatenate(leaves) for leaves in zip(*(one.observed for one in kept), strict=True))
    )
    return Steps(observed, np.concatenate([one.returned for one in kept]))


def _joined(rounds: list[Steps]) -> Observed:
    return _concatenate(rounds).observed


def _returned(kept: Steps) -> float:
    return float(np.mean(kept.returned))


def _check(setup: WalkSetup, rounds: list[Steps], heat: float) -> Check:
    """Average what the steps say, less half of the heat."""
    settings = setup.settings
    observed = _joined(rounds)
    nbeta, bins = float(setup.posterior.nbeta), observed.excess.shape[0] // settings.bin_length
    binned = Observed(
        *(
            leaf[: bins * settings.bin_length].reshape(bins, settings.bin_length, -1).mean(axis=1).T
            for leaf in observed
        )
    )
    llc = nbeta * binned.excess
    if not np.all(np.isfinite(llc)):
        return Check(Analysis.broken(llc.shape[0]), llc, (Unmet("relative error", math.nan, 0),))
    none = np.zeros((*llc.shape, 0))
    analysis = analyse(llc, none, binned.radius2)
    virial = setup.posterior.center.size - binned.virial[:, analysis.burn_in :, None]
    doubt = HEAT_DOUBT * heat
    analysis = dataclasses.replace(
        analysis,
        llc=analysis.llc - HEAT_SHARE * heat,
        llc_sem=math.hypot(analysis.llc_sem, doubt),
        added=HEAT_SHARE * heat,
        systematic=doubt,
        virial_z=furthest_off(virial),
        per_walker=analysis.per_walker - HEAT_SHARE * heat,
    )
    return Check(analysis, llc, unmet_by(analysis, setup.error, 1.0, bins, settings))
