"""A walk that begins at the localizer: no fit, no pass over the data.

Where the localizer decides most directions, the posterior is nearly round in the coordinates
`sqrt(gamma + nbeta curvature)`, one number for each array of parameters. A few gradient differences
on small batches measure this curvature, the *stiffness* (the largest eigenvalue of the Hessian of
nbeta L_n in these coordinates) and the noise of a gradient. They choose the coordinates, the step
and the batch. Then walkers step on fresh minibatches, and what the noise adds to llc, its *heat*,
is bounded by a batch large enough, and half of it taken off.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._typing import Array, Float, Keys
from fastvi.families.moments import LinearMap
from fastvi.sampling.averages import SURPRISE, Analysis, analyse, furthest_off, standard_error
from fastvi.sampling.dynamics import State
from fastvi.sampling.minibatches import (
    AbstractReader,
    AbstractSource,
    MinibatchPrograms,
    Observed,
    Steps,
    blank_state,
)
from fastvi.sampling.run import CHECK_GROWTH, ERROR, HEAT_SHARE, Check, Unmet, unmet_by
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
# Standard deviation of the share of a quadratic loss's heat that a loss has, which may be anything
# from 0.3 to 1; `HEAT_SHARE` of it is taken off.
HEAT_DOUBT = 0.2
# What the doubt of a heat as large as llc has beside: with it, a third of llc is the error.
LARGE_HEAT_DOUBT = 0.3
# Part of the budget that measurements and burn-in may take together.
PREPARATION_SHARE = 0.5
# Steps that are averaged, at least, where the budget has to choose between steps and batches.
LEAST_STEPS = 24
# Times the fewest bins that a walk has before it may end by itself. Half of it stops at chance, as
# an error that is read from few bins is small now and then; double costs as much again.
PATIENCE = 2
# Step number from which on batches are those of measurements; no walk makes as many steps.
PROBE_STEPS = 2**20
# Share of steps taken back at which the step size is halved. Half of it halves after one in a
# hundred, double lets walkers stand still for a part of the time.
RETURNED = 0.02
# Step size at which halving ends: a target that takes back shorter steps has no finite region.
SHORTEST_STEP = 1e-3 * LARGEST_STEP
# Halvings of the distance from w* of a walker where the loss is not finite. Half of them do where
# a millionth of the width is finite, double look for less.
MOST_HALVINGS = 20
# Quantile of the walkers' stiffnesses: the largest of few would be that of one odd batch.
STIFFNESS_QUANTILE = 0.75
# Parts of a raw batch from which on it is measured whether anchored ones do with fewer.
MOST_RAW_PARTS = 8
# Standard errors from which on the gradient at w* is not taken for zero.
CERTAIN = 3.0
# Parts of the budget that the gradient on all data may take, and a sample of it in its place.
FULL_ANCHOR_SHARE, ANCHOR_SHARE = 0.35, 0.15
# Batches of that sample, at most.
MOST_DECREMENT_BATCHES = 64
# Numbers of the first batch of each measurement, which has none of another's.
CURVATURE_PROBES, HEAT_PROBES, DECREMENT_PROBES = 0, 2, 16
# Share of the wanted error that the doubt of the heat may take: at half, batches are twice as
# large; at double, the doubt alone is the error that was asked for.
DOUBT_SHARE = 0.5
TINY = 1e-30
SLICE = 2**16  # numbers of a vector that are doubled at once


@dataclasses.dataclass(frozen=True)
class WalkSetup:
    """What a walk shares from beginning to end.

    Attributes:
        programs: The compiled round.
        posterior: The target.
        leaf_sizes: Lengths of the arrays of parameters, in order.
        reader: Gives the batches.
        keys: One key for each walker.
        seed: Of the directions that curvature is measured along, and of the start.
        settings: The sampler's.
        error: Standard error that is wanted, relative to llc.
        budget: Sample gradients that the walk never exceeds.
        must_walk: Whether to walk however stiff the posterior is, as nothing else is possible.
        report: Receives the work so far and llc.
        num_data: Examples of all data.
        full_gradient: Returns the gradient of L_n at w*; None where not all data are at hand.
    """

    programs: MinibatchPrograms
    posterior: LocalPosterior
    leaf_sizes: tuple[int, ...]
    reader: AbstractReader
    keys: Keys
    seed: np.random.SeedSequence
    settings: SamplerSettings
    error: float
    budget: float
    must_walk: bool
    report: Callable[[float, float], None]
    num_data: int
    full_gradient: Callable[[], Float[Array, " dim"]] | None = None

    @property
    def dtype(self) -> np.dtype:
        """Return the type of the parameters."""
        return self.posterior.center.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Return walkers and dimensions."""
        return self.keys.shape[0], self.posterior.center.size

    def cost(self, steps: int, parts: int, is_anchored: bool = False) -> float:
        """Price steps of all walkers: of each example a gradient, and at w* a loss or another."""
        return (GRADIENT + (GRADIENT if is_anchored else LOSS)) * self.examples(steps, parts)

    def examples(self, steps: int, parts: int) -> int:
        """Count the examples of some steps of all walkers."""
        return steps * parts * self.keys.shape[0] * self.reader.part_size


class Measured(NamedTuple):
    """What a few gradients say of the posterior.

    Attributes:
        curvature: nbeta times the mean curvature of L_n in each array of parameters, at least 0.
        stiffness: Largest eigenvalue of the Hessian of nbeta L_n that was met, in round
            coordinates.
        decrement: Nats of log posterior that a step from w* along the gradient would gain.
        decrement_error: Its standard error.
        noise: Variance of the gradient of nbeta L on a part of a batch at w*, summed over
            directions in round coordinates.
        anchored_noise: The same at draws of the start, less what the same examples say at w*;
            infinite where it was not measured.
    """

    curvature: Float[np.ndarray, " leaves"]
    stiffness: float
    decrement: float
    decrement_error: float
    noise: float
    anchored_noise: float


class Walk(NamedTuple):
    """A finished walk.

    Attributes:
        check: Averages and criteria that are not met; `check.llc` are means over bins.
        measured: What was measured before.
        reference_loss: Mean of L_B(w*) over the batches.
        heat: What the noise of the gradients adds to llc, were the loss quadratic.
        batch: Examples of a walker's batch.
        step_size: The step.
        returned: Steps taken back, all walkers together.
        examples: Examples read.
        work: Sample gradients.
        least_budget: Sample gradients of a walk of the fewest bins.
        ended_early: Whether the data ended before the walk.
    """

    check: Check
    measured: Measured
    reference_loss: float
    heat: float
    batch: int
    step_size: float
    returned: float
    examples: int
    work: float
    least_budget: float
    ended_early: bool


class TooStiff(NamedTuple):
    """What was found where these coordinates are of no use: the stiffness, and the work it took."""

    stiffness: float
    work: float


class Course(NamedTuple):
    """A walk between two rounds.

    Attributes:
        state: The walkers.
        linear_map: Their coordinates.
        step_size: The step.
        anchor: Gradient of L_n at w*, where batches are anchored there; None where they are not.
        parts: Parts of a batch.
        heat: As in `Walk`, for this batch.
        gradient_doubt: Nats that llc may be off for a gradient at w* that was taken for zero.
        said: What the steps that are averaged say.
        done: Number of the next step.
        work: Sample gradients spent.
        examples: Examples read.
        is_fed: Whether there are more examples.
    """

    state: State
    linear_map: LinearMap
    step_size: float
    anchor: Float[Array, " dim"] | None = None
    parts: int = 1
    heat: float = 0.0
    gradient_doubt: float = 0.0
    said: Steps | None = None
    done: int = 0
    work: float = 0.0
    examples: int = 0
    is_fed: bool = True

    @property
    def is_anchored(self) -> bool:
        """Whether batches are anchored at w*."""
        return self.anchor is not None


def walk_from_localizer(setup: WalkSetup) -> Walk | TooStiff:
    """Walk until the error of llc is small, or the budget or the data are spent.

    Raises:
        DataError: If the data end before a walk can begin.
    """
    rng = np.random.default_rng(setup.seed)
    measured, work, examples = measure_curvature(setup, rng)
    if not measured.stiffness <= MOST_STIFFNESS and not setup.must_walk:
        return TooStiff(measured.stiffness, work)
    course = Course(
        draw_start(setup, rng),
        round_map(setup, measured.curvature),
        plan_step(measured.stiffness),
        work=work,
        examples=examples,
    )
    course = plan_anchor(setup, measured, course)
    course = plan_batch(setup, burn_in(setup, course, rng))
    check, checked = None, 0
    while course.is_fed and (steps := affordable_steps(setup, course, setup.programs.length)):
        course = advance(setup, course, steps)
        made = 0 if course.said is None else course.said.returned.shape[0]
        goes_on = course.is_fed and affordable_steps(setup, course, 1)
        if made == 0 or (goes_on and made < CHECK_GROWTH * checked):
            continue
        check, checked = check_steps(setup, course), made
        setup.report(course.work, check.analysis.llc)
        # the first look that says good enough is lucky more often than not
        is_long = check.llc.shape[1] >= PATIENCE * setup.settings.min_bins
        if (is_long and not check.unmet) or not math.isfinite(check.analysis.llc):
            break
    if course.said is None or check is None:
        raise _cannot_begin(setup, course)
    return Walk(
        check,
        measured,
        float(np.mean(course.said.observed.reference)),
        course.heat,
        course.parts * setup.reader.part_size,
        course.step_size,
        float(course.said.returned.sum()),
        course.examples,
        course.work,
        least_budget(setup, course),
        not course.is_fed,
    )


def _cannot_begin(setup: WalkSetup, course: Course) -> DataError | ConfigError:
    """Say what was missing for a single step that counts."""
    if course.is_fed:
        return ConfigError(
            f"budget={setup.budget:.4g} sample gradients pay for no walk: what is measured before "
            f"took {course.work:.0f}. Give {2 * course.work + setup.cost(LEAST_STEPS, 1):.0f} or "
            "more."
        )
    return DataError(
        f"the data ended after {course.examples} examples, before the walk could begin. Give more "
        "examples, or hold them in memory as arrays."
    )


class _Probe:
    """Evaluates gradients at positions of the measurements' choosing, and counts the work."""

    def __init__(self, setup: WalkSetup, number: int):
        self.setup, self.number, self.work, self.examples = setup, number, 0.0, 0

    def batch(self) -> tuple[int, AbstractSource]:
        """Return a batch of one part, to evaluate at as many positions as need be.

        Raises:
            DataError: If the data have ended.
        """
        step, self.number = PROBE_STEPS + self.number, self.number + 1
        source = self.setup.reader.read(step, 1, 1)
        if source is None:
            raise DataError(
                "the data ended before a walk could begin: it takes some thousand examples. Hold "
                "them in memory as arrays, or give an object that can be iterated over again."
            )
        self.examples += self.setup.examples(1, 1)
        return step, source

    def gradient(
        self,
        linear_map: LinearMap,
        position: Float[np.ndarray, "walkers dim"],
        batch: tuple[int, AbstractSource],
        anchor: Float[Array, " dim"] | None = None,
    ) -> Float[np.ndarray, "walkers dim"]:
        """Return the estimate of the gradient of nbeta L_n of each walker in round coordinates."""
        return self.evaluate(linear_map, blank_state(position), batch, anchor)[1]

    def evaluate(
        self,
        linear_map: LinearMap,
        state: State,
        batch: tuple[int, AbstractSource],
        anchor: Float[Array, " dim"] | None = None,
    ) -> tuple[State, Float[np.ndarray, "walkers dim"]]:
        """Evaluate walkers where they are, whose state is used up; return the gradient too."""
        step, source = batch
        course = Course(state, linear_map, 0.0, anchor, done=step)
        state, _ = _call(self.setup, course, source, -1, 0)
        self.work += self.setup.cost(1, 1, course.is_anchored)
        of_localizer = np.square(np.asarray(linear_map.scale)) * float(self.setup.posterior.gamma)
        gradient, position = np.array(state.here.gradient), np.asarray(state.position)
        for mine, at in zip(gradient, position, strict=True):  # one row after the other, in place
            mine -= of_localizer * at
        return state, gradient


def measure_curvature(setup: WalkSetup, rng: np.random.Generator) -> tuple[Measured, float, int]:
    """Measure the curvature of each array, the stiffness, and the gradient at w*.

    Returns:
        What was measured, the sample gradients that it took, and the examples that it read.

    Cost:
        Five evaluations of all walkers on a part of a batch.
    """
    # arrays of all walkers are changed in place and let go as soon as may be: they are what bounds
    # the parameters that fit the memory
    probe, at_first = _Probe(setup, CURVATURE_PROBES), copy.deepcopy(rng)
    localizer = round_map(setup, np.zeros(len(setup.leaf_sizes)))
    first, second = probe.batch(), probe.batch()
    zero, direction = np.zeros(setup.shape, setup.dtype), standard_normal(setup, rng)
    here = probe.gradient(localizer, zero, first)
    bent = probe.gradient(localizer, direction, first)
    bent -= here
    curvature = leaf_curvature(direction, bent, setup.leaf_sizes) * float(setup.posterior.gamma)
    del bent, direction
    noise = probe.gradient(localizer, zero, second)
    # the coordinates of the walk, in which stiffness is what limits its step
    linear_map = round_map(setup, curvature)
    change = np.asarray(linear_map.scale) / np.asarray(localizer.scale)
    here *= change
    noise *= change  # so far the gradient on the second batch
    noise += here
    noise /= 2
    decrement, error = mean_square_gradient(noise)
    noise -= here
    noise *= -math.sqrt(2)
    measured = Measured(
        curvature,
        _largest_eigenvalue(probe, linear_map, here, noise, first),
        0.5 * decrement,
        0.5 * error,
        mean_square(noise),
        math.inf,
    )
    del here
    if wanted_parts(setup, measured) > MOST_RAW_PARTS:
        # noise that is left where the gradient at w* on the same examples is taken off
        direction = standard_normal(setup, at_first)
        there = probe.gradient(linear_map, direction, first)
        there -= probe.gradient(linear_map, direction, second)
        there /= math.sqrt(2)
        there -= noise
        measured = measured._replace(anchored_noise=mean_square(there))
    return measured, probe.work, probe.examples


def _largest_eigenvalue(
    probe: _Probe,
    linear_map: LinearMap,
    here: Float[np.ndarray, "walkers dim"],
    noise: Float[np.ndarray, "walkers dim"],
    batch: tuple[int, AbstractSource],
) -> float:
    """Return the largest eigenvalue of the Hessian that products with it find, from `noise` on.

    `here` is the gradient at w* on the batch.
    """
    image, stiffness = noise, 0.0
    for _ in range(STIFFNESS_PRODUCTS):
        sizes = np.maximum(np.linalg.norm(image, axis=1, keepdims=True), TINY)
        start = blank_state(jnp.asarray(image / sizes))
        del image
        image = probe.evaluate(linear_map, start, batch)[1]
        image -= here
        sizes = np.linalg.norm(image, axis=1)
        stiffness = max(stiffness, float(np.quantile(sizes, STIFFNESS_QUANTILE)))
    return stiffness


def standard_normal(setup: WalkSetup, rng: np.random.Generator) -> Float[np.ndarray, "walkers dim"]:
    """Draw a direction for each walker."""
    return rng.standard_normal(setup.shape, np.float32).astype(setup.dtype, copy=False)


def wanted_parts(setup: WalkSetup, measured: Measured) -> float:
    """Return the parts that a raw batch should have, by its noise at w* and the curvatures."""
    sizes, gamma = np.asarray(setup.leaf_sizes), float(setup.posterior.gamma)
    llc = 0.5 * float(np.sum(sizes * measured.curvature / (gamma + measured.curvature)))
    step_size = plan_step(measured.stiffness)
    heat = noise_heat(measured.noise, step_size)
    return HEAT_DOUBT * heat / max(DOUBT_SHARE * setup.error * llc, TINY)


def mean_square(vectors: Float[np.ndarray, "walkers dim"]) -> float:
    """Return the mean of |x|^2."""
    return float(np.mean(np.diagonal(inner_products(vectors))))


def inner_products(
    vectors: Float[np.ndarray, "walkers dim"],
) -> Float[np.ndarray, "walkers walkers"]:
    """Return the products of all pairs in double precision, without a copy of all in it."""
    total = np.zeros((vectors.shape[0],) * 2)
    for start in range(0, vectors.shape[1], SLICE):
        part = vectors[:, start : start + SLICE].astype(float)
        total += part @ part.T
    return total


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
    return np.maximum(products / np.maximum(squares, TINY), 0.0)


def mean_square_gradient(gradients: Float[np.ndarray, "walkers dim"]) -> tuple[float, float]:
    """Return |E g|^2 without the noise of g, from independent draws of g, and its error.

    It is the mean product of two different draws, and the error that of the jackknife.
    """
    count = gradients.shape[0]
    if count < 3:
        return 0.0, math.inf
    products = inner_products(gradients)
    np.fill_diagonal(products, 0.0)
    others = (products.sum() - 2 * products.sum(axis=0)) / ((count - 1) * (count - 2))
    error = math.sqrt((count - 1) * float(np.var(others)))
    return float(products.sum() / (count * (count - 1))), error


def round_map(setup: WalkSetup, curvature: Float[np.ndarray, " leaves"]) -> LinearMap:
    """Return the coordinates `sqrt(gamma + curvature)`, one number for each array."""
    posterior, dtype = setup.posterior, setup.posterior.center.dtype
    numbers = np.repeat(1 / np.sqrt(float(posterior.gamma) + curvature), setup.leaf_sizes)
    scale, dim = jnp.asarray(numbers, dtype), posterior.center.size
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
    draws the noise anew: `step^2 coth(step / (2 friction_time)) / 4` as the curvature goes to zero.
    """
    kept = math.exp(-step_size / friction_time)
    slow = step_size**2 * (1 + kept) / (4 * (1 - kept))
    return slow / (1 - np.minimum(step_size**2 * curvature / 4, 0.5))


def measure_heat(setup: WalkSetup, course: Course) -> Course:
    """Measure what the noise of batches of one part adds to llc, were the loss quadratic.

    Noise along a direction where data have the curvature c, and data and localizer a, raises the
    variance there by `position_heat / a`, and llc by half of c times that.

    Cost:
        Four evaluations of all walkers on a part of a batch.
    """
    probe, linear_map, state = _Probe(setup, HEAT_PROBES), course.linear_map, course.state
    # the walkers' own state is what is evaluated, since a second one may not fit the memory
    state, noise = probe.evaluate(linear_map, state, probe.batch(), course.anchor)
    state, other = probe.evaluate(linear_map, state, probe.batch(), course.anchor)
    noise -= other
    noise /= math.sqrt(2)
    del other
    size = np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), TINY)
    square, batch = size[:, 0] ** 2, probe.batch()
    position = np.array(state.position)
    state, bent = probe.evaluate(
        linear_map,
        state._replace(position=jnp.asarray(position + noise / size)),
        batch,
        course.anchor,
    )
    state, there = probe.evaluate(linear_map, state._replace(position=jnp.asarray(position)), batch)
    bent -= there
    del there
    curvature = np.einsum("ij,ij->i", noise, bent, dtype=float) / size[:, 0]
    scale2 = np.square(np.asarray(linear_map.scale))
    localizer = np.einsum("ij,ij,j->i", noise, noise, scale2, dtype=float) / square
    localizer *= float(setup.posterior.gamma)
    total = localizer + np.abs(curvature)
    raised = square * position_heat(course.step_size, FRICTION_TIME, total)
    return course._replace(
        state=state,
        heat=float(np.mean(0.5 * raised * curvature / total)),
        work=course.work + probe.work,
        examples=course.examples + probe.examples,
    )


def plan_parts(heat_of_one: float, wanted: float, most: int) -> int:
    """Return the parts of a batch: as few as keep the doubt of the heat within what is wanted."""
    doubtful = HEAT_DOUBT * max(heat_of_one, 0.0)
    return int(np.clip(math.ceil(doubtful / max(wanted, TINY)), 1, most))


def plan_anchor(setup: WalkSetup, measured: Measured, course: Course) -> Course:
    """Anchor batches at w* where that takes off more noise than the second gradient costs.

    The anchor is the gradient on all data where the budget pays for it. Else it is zero, as at a
    minimum, and a measurement says how far llc may be off for that.
    """
    is_raw = measured.anchored_noise * setup.cost(1, 1, True) >= measured.noise * setup.cost(1, 1)
    course = course._replace(
        heat=noise_heat(measured.noise if is_raw else measured.anchored_noise, course.step_size)
    )
    if is_raw:
        return course
    if setup.full_gradient is not None and setup.num_data <= FULL_ANCHOR_SHARE * setup.budget:
        work = course.work + GRADIENT * setup.num_data
        return course._replace(anchor=setup.full_gradient(), work=work)
    decrement, error, work, examples = measure_decrement(setup, course)
    course = course._replace(work=course.work + work, examples=course.examples + examples)
    if decrement > CERTAIN * error:
        return course._replace(heat=noise_heat(measured.noise, course.step_size))
    anchor = jnp.zeros_like(setup.posterior.center)
    return course._replace(anchor=anchor, gradient_doubt=max(decrement, 0.0) + error)


def measure_decrement(setup: WalkSetup, course: Course) -> tuple[float, float, float, int]:
    """Measure what a step from w* along the gradient would gain, on `ANCHOR_SHARE` of the budget.

    Returns:
        Nats of log posterior, their standard error, the sample gradients, and the examples.
    """
    probe, zero = _Probe(setup, DECREMENT_PROBES), np.zeros(setup.shape, setup.dtype)
    count = int(np.clip(ANCHOR_SHARE * setup.budget / setup.cost(1, 1), 1, MOST_DECREMENT_BATCHES))
    total = zero
    for _ in range(count):
        total = total + probe.gradient(course.linear_map, zero, probe.batch())
    square, error = mean_square_gradient(total / count)
    return 0.5 * square, 0.5 * error, probe.work, probe.examples


def noise_heat(noise: float, step_size: float) -> float:
    """Return the most that noise of this variance, summed over directions, adds to llc."""
    return 0.5 * noise * float(position_heat(step_size, FRICTION_TIME, np.ones(1))[0])


def draw_start(setup: WalkSetup, rng: np.random.Generator) -> State:
    """Draw positions and momenta, and leave the generator as it is: they can be drawn again."""
    rng = copy.deepcopy(rng)
    return blank_state(standard_normal(setup, rng), standard_normal(setup, rng))


def burn_in(setup: WalkSetup, course: Course, rng: np.random.Generator) -> Course:
    """Let walkers forget where they began, with steps short enough that none is taken back.

    They begin anew, at what `rng` draws, where steps have to be shorter.
    """
    while True:
        course = _evaluate(setup, course)
        steps = math.ceil(BURN_IN_TIME / course.step_size)
        steps = affordable_steps(setup, course, steps, PREPARATION_SHARE)
        while steps and course.is_fed:
            now = min(steps, setup.programs.length)
            before, course = course.done, advance(setup, course, now)
            steps -= course.done - before
        said = course.said
        is_stable = said is None or float(np.mean(said.returned)) <= RETURNED
        if is_stable or course.step_size < SHORTEST_STEP:
            return course
        # a state that a program has used up cannot be used again
        course = course._replace(
            state=draw_start(setup, rng), step_size=course.step_size / 2, said=None
        )


def plan_batch(setup: WalkSetup, course: Course) -> Course:
    """Choose the batch by its heat, and drop what the burn-in said."""
    said = course.said
    course = course._replace(said=None)
    if said is None:
        return course
    half = said.observed.excess.shape[0] // 2
    llc = float(setup.posterior.nbeta) * float(np.mean(said.observed.excess[half:]))
    if course.work + setup.cost(4, 1, course.is_anchored) <= PREPARATION_SHARE * setup.budget:
        course = measure_heat(setup, course)
    most = affordable_steps(setup, course, setup.reader.most * LEAST_STEPS) // LEAST_STEPS
    wanted = DOUBT_SHARE * setup.error * abs(llc - course.heat)
    parts = plan_parts(course.heat, wanted, max(1, most))
    return course._replace(parts=parts, heat=course.heat / parts)


def affordable_steps(setup: WalkSetup, course: Course, steps: int, share: float = 1.0) -> int:
    """Return how many of these steps a share of the budget pays for."""
    left = share * setup.budget - course.work
    return max(0, min(steps, int(left / setup.cost(1, course.parts, course.is_anchored))))


def least_budget(setup: WalkSetup, course: Course) -> float:
    """Return the sample gradients of a walk with the fewest bins on these batches."""
    made = 0 if course.said is None else course.said.returned.shape[0]
    missing = max(0, setup.settings.min_bins * setup.settings.bin_length - made)
    return course.work + setup.cost(missing, course.parts, course.is_anchored)


def advance(setup: WalkSetup, course: Course, steps: int) -> Course:
    """Make so many steps of a round, or as many as one source serves."""
    steps = min(steps, max(1, setup.reader.most // course.parts))
    source = setup.reader.read(course.done, steps, course.parts)
    while source is None:  # the examples that are left may do for fewer steps, or smaller batches
        parts = course.parts if steps > 1 or course.said is not None else course.parts // 2
        steps = steps // 2 if steps > 1 else 1 if parts < course.parts else 0
        if steps * parts == 0:
            return course._replace(is_fed=False)
        course = course._replace(parts=parts, heat=course.heat * course.parts / parts)
        source = setup.reader.read(course.done, steps, parts)
    course, said = _made(setup, course, source, 0, steps)
    said = _on_host(said, steps)
    return course._replace(said=said if course.said is None else _concatenate(course.said, said))


def _evaluate(setup: WalkSetup, course: Course) -> Course:
    """Evaluate the walkers where they are, nearer to w* where the loss is not finite there."""
    for halved in range(MOST_HALVINGS + 1):
        source = setup.reader.read(course.done, 1, course.parts)
        if source is None:
            return course._replace(is_fed=False)
        course = _made(setup, course, source, -1, 0)[0]
        state, observed = course.state, course.state.here.observed
        is_inside = np.isfinite(np.asarray(observed.virial) + np.asarray(observed.excess))
        if is_inside.all() or halved == MOST_HALVINGS:
            break
        position = np.array(state.position)
        position[~is_inside] /= 2
        # what was evaluated goes: a gradient that is not finite would be one in the next step
        course = course._replace(state=blank_state(position, np.array(state.momentum)))
    return course


def _made(
    setup: WalkSetup, course: Course, source: AbstractSource, start: int, stop: int
) -> tuple[Course, Steps]:
    """Make steps, and count what they take."""
    state, said = _call(setup, course, source, start, stop)
    steps = stop - start
    return course._replace(
        state=state,
        done=course.done + steps,
        work=course.work + setup.cost(steps, course.parts, course.is_anchored),
        examples=course.examples + setup.examples(steps, course.parts),
    ), said


def _call(
    setup: WalkSetup, course: Course, source: AbstractSource, start: int, stop: int
) -> tuple[State, Steps]:
    """Call the compiled round."""
    dtype = course.state.position.dtype
    return setup.programs.advance(
        setup.posterior,
        course.linear_map,
        source,
        course.anchor,
        course.state,
        setup.keys,
        jnp.int32(course.parts),
        *(jnp.asarray(value, dtype) for value in (course.step_size, FRICTION_TIME)),
        *(jnp.int32(value) for value in (course.done, start, stop)),
    )


def _on_host(steps: Steps, count: int) -> Steps:
    observed = Observed(*(np.asarray(leaf, float)[:count] for leaf in steps.observed))
    return Steps(observed, np.asarray(steps.returned, float)[:count])


def _concatenate(first: Steps, second: Steps) -> Steps:
    pairs = zip(first.observed, second.observed, strict=True)
    observed = Observed(*(np.concatenate(pair) for pair in pairs))
    return Steps(observed, np.concatenate([first.returned, second.returned]))


def check_steps(setup: WalkSetup, course: Course) -> Check:
    """Average what the steps say, less a share of the heat, and hold it against the criteria."""
    assert course.said is not None, "a step has been made"
    observed, settings = course.said.observed, setup.settings
    length, nbeta = settings.bin_length, float(setup.posterior.nbeta)
    bins = max(1, observed.excess.shape[0] // length)
    first = max(0, observed.excess.shape[0] - bins * length)  # the first steps are left out first
    excess, radius2, virial = (
        np.asarray(leaf)[first:].reshape(bins, -1, leaf.shape[1]).mean(axis=1).T
        for leaf in (observed.excess, observed.radius2, observed.virial)
    )
    llc = nbeta * excess
    if not np.all(np.isfinite(llc)):
        broken = Analysis.broken(llc.shape[0])
        return Check(broken, llc, (Unmet(ERROR, math.nan, setup.error),))
    analysis = analyse(llc, np.zeros((*llc.shape, 0)), radius2)
    column = setup.posterior.center.size - virial[:, analysis.burn_in :, None]
    share, doubt = heat_share(course.heat, analysis.llc)
    # two errors of few walkers hold less than those of a Gaussian: 1.2 / nu is the second term of
    # Student's quantile; and fewer bins than asked for have not shown how long walkers remember
    spread = analysis.llc_sem * (1 + 1.2 / max(llc.shape[0] - 1, 1))
    spread *= math.sqrt(max(1.0, settings.min_bins / bins))
    systematic = math.hypot(doubt, course.gradient_doubt, missing_width(column))
    analysis = dataclasses.replace(
        analysis,
        llc=analysis.llc - share,
        llc_sem=math.hypot(spread, systematic),
        added=share,
        systematic=systematic,
        virial_z=furthest_off(column),
        per_walker=analysis.per_walker - share,
    )
    return Check(analysis, llc, unmet_by(analysis, setup.error, 1.0, bins, settings))


def missing_width(column: Float[np.ndarray, "walkers bins 1"]) -> float:
    """Return the nats that directions may lack which the walkers have not yet filled.

    The virial column `d - v . grad(-log p)` has mean zero under the posterior, and a direction that
    is too narrow by a share of its variance adds that share. It lacks half of it in llc, at most.
    """
    surplus = float(column.mean()) - SURPRISE * standard_error(column[:, :, 0])
    return 0.5 * max(0.0, surplus)


def heat_share(heat: float, llc: float) -> tuple[float, float]:
    """Return what the average takes off llc for the heat, and the standard deviation of the rest.

    A heat is part of the llc that was seen, so that one near it or above is known no better than to
    be between nothing and all of it.
    """
    seen = abs(llc)
    share = -math.expm1(-max(heat, 0.0) / seen) if seen > 0 else 0.0
    doubt = HEAT_DOUBT + share**2 * LARGE_HEAT_DOUBT
    return HEAT_SHARE * share * seen, doubt * share * seen
