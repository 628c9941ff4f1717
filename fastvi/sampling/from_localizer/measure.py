"""Measurements before a walk: curvature, stiffness, and the noise of a gradient."""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from fastvi._devices import host_blocks, host_rows
from fastvi._errors import DataError
from fastvi._typing import Float, Vector, Vectors
from fastvi._vectors import Leaves, shape_of
from fastvi.sampling.dynamics import State
from fastvi.sampling.from_localizer.batches import AbstractSource
from fastvi.sampling.from_localizer.plan import (
    TINY,
    Measured,
    position_heat,
    round_scale,
    wanted_parts,
)
from fastvi.sampling.from_localizer.setup import FRICTION_TIME, Course, WalkSetup, call_round
from fastvi.sampling.from_localizer.steps import add_multiples, blank, fill

# Products with the Hessian that look for its largest eigenvalue, from the noise of a gradient on.
STIFFNESS_PRODUCTS = 2
# Step number from which on batches are those of measurements; no walk makes as many steps.
PROBE_STEPS = 2**20
# Times that curvature may differ from the one over whose width it is measured, as the geometric
# mean over coordinates. At half, chance asks for looks; at double, the width may be half of itself.
CONSISTENT = 4.0
# Looks at the curvature beside the first: bisection of 1e6 down to `CONSISTENT` takes five.
MOST_LOOKS = 8
# Part of the budget after which there are no more of them.
LOOKS_SHARE = 0.1
# Rise of the curvature where the loss is not finite over the width.
NON_FINITE_RISE = 100.0
# Quantile of the walkers' stiffnesses: the largest of few would be that of one odd batch.
STIFFNESS_QUANTILE = 0.75
# Parts of a raw batch from which on it is measured whether anchored ones do with fewer.
MOST_RAW_PARTS = 8
# Part of the budget that a sample of the gradient on all data may take in its place, and its
# batches at most.
ANCHOR_SHARE = 0.15
MOST_DECREMENT_BATCHES = 64
# Numbers of the first batch of each measurement, which has none of another's.
CURVATURE_PROBES, HEAT_PROBES, DECREMENT_PROBES = 0, 2, 16
SLICE = 2**16  # numbers of a vector that are in double precision at once
MOMENTA = 1  # child of the seed that momenta are drawn from anew


class Probe:
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

    def evaluate(
        self,
        scale: Vector,
        state: State,
        batch: tuple[int, AbstractSource],
        anchor: Vector | None = None,
    ) -> State:
        """Evaluate walkers where they are; a gradient that was finite leaves their momenta."""
        step, source = batch
        course = Course(state, scale, 0.0, anchor, done=step)
        self.work += self.setup.cost(1, 1, course.is_anchored)
        # what is made while it runs would be held beside its temporaries
        return jax.block_until_ready(call_round(self.setup, course, source, -1, 0)[0])


def measure_curvature(
    setup: WalkSetup, state: State, rng: np.random.Generator
) -> tuple[Measured, State, float, int]:
    """Measure the curvature of each array, the stiffness, and the gradient at w*.

    The walkers begin at w*, and end anywhere: all that is held of a measurement is in their state.

    Returns:
        What was measured, the state, the sample gradients that it took, and the examples read.

    Cost:
        Five evaluations of all walkers on a part of a batch, up to `MOST_LOOKS` more where data
        leave much less width than the localizer, and three more where it is measured what anchored
        batches save. No memory beside the state and a few vectors.
    """
    probe, at_first = Probe(_of_loss(setup), CURVATURE_PROBES), copy.deepcopy(rng)
    first, second = probe.batch(), probe.batch()
    state, curvature = _consistent_curvature(setup, probe, state, first, rng)
    # the coordinates of the walk, in which stiffness is what limits its step
    scale = round_scale(setup, curvature)
    state = probe.evaluate(scale, state, second)
    decrement, error = mean_square_gradient(
        inner_products((one + other) / 2 for one, other in _columns(*_gradients(state)))
    )
    lengths = _distances(*_gradients(state))
    noise = 0.5 * float(np.mean(lengths**2))
    # products with the Hessian, from the noise of the gradient on
    stiffness = 0.0
    for _ in range(STIFFNESS_PRODUCTS):
        each = 1 / np.maximum(lengths, TINY)
        position = add_multiples(blank(state.position), each, state.here.gradient)
        position = add_multiples(position, -each, state.momentum)
        state = probe.evaluate(scale, state._replace(position=position), first)
        lengths = _distances(*_gradients(state))
        stiffness = max(stiffness, float(np.quantile(lengths, STIFFNESS_QUANTILE)))
    measured = Measured(curvature, stiffness, 0.5 * decrement, 0.5 * error, noise, math.inf)
    wanted = setup.settings.gradients
    is_noisy = wanted_parts(setup, measured) > MOST_RAW_PARTS
    if wanted == "anchored" or (is_noisy and wanted == "auto"):
        # noise that is left where the gradient at w* on the same examples is taken off
        state = state._replace(position=fill(state.position, standard_normals(setup, at_first)))
        for batch, sign in ((first, -1), (second, 1)):
            state = _add_gradient(probe.evaluate(scale, state, batch), sign)
        state = state._replace(position=blank(state.position))
        state = probe.evaluate(scale, state, second)
        lengths = _distances(*_gradients(state))
        measured = measured._replace(anchored_noise=0.5 * float(np.mean(lengths**2)))
    return measured, state, probe.work, probe.examples


def _consistent_curvature(
    setup: WalkSetup,
    probe: Probe,
    state: State,
    batch: tuple[int, AbstractSource],
    rng: np.random.Generator,
) -> tuple[State, Float[np.ndarray, " leaves"]]:
    """Measure the curvature of each array over the width that this curvature leaves.

    Over the localizer's width, the first look, it is right where the loss is quadratic. Where
    layers multiply, a loss of high degree is far steeper there than anywhere in the posterior. So
    it is measured anew over the width that it leaves, and over one between the two as long as they
    disagree.

    `state` is at w*. It is returned with the gradient there on `batch` in the place of momenta, in
    the coordinates that are found, and with the curvature.
    """
    gamma, sizes = float(setup.posterior.gamma), np.asarray(setup.leaf_sizes)
    scale, used = round_scale(setup, np.zeros(len(sizes))), np.full(len(sizes), gamma)
    state = _keep_gradient(probe.evaluate(scale, state, batch))
    for look in range(1 + MOST_LOOKS):
        state = state._replace(position=fill(state.position, standard_normals(setup, rng)))
        state = probe.evaluate(scale, state, batch)
        seen = gamma + used * leaf_curvature(_bent(state), setup.leaf_sizes)
        seen = np.where(np.isfinite(seen), seen, NON_FINITE_RISE * used)
        change = abs(sizes @ np.log(seen / used)) / sizes.sum()
        is_last = change <= math.log(CONSISTENT) or probe.work > LOOKS_SHARE * setup.budget
        # a second look confirms the first where the loss is quadratic, at any curvature
        used = seen if is_last or look == 0 else np.sqrt(used * seen)
        ratio = 1 / jax.tree_util.tree_map(np.asarray, scale)
        scale = round_scale(setup, used - gamma)
        ratio = ratio * jax.tree_util.tree_map(np.asarray, scale)
        here = fill(state.position, (ratio * row for row in host_rows(state.momentum)))
        # the old one at w* takes the place of a gradient that may not be finite
        gradient = state.here._replace(gradient=state.momentum)
        state = State(blank(state.here.gradient), here, gradient)
        if is_last:
            break
    return state, used - gamma


def _of_loss(setup: WalkSetup) -> WalkSetup:
    """Return what gives the gradient of nbeta L alone, without the localizer's part."""
    nothing = jax.device_put(np.zeros((), setup.dtype))
    return dataclasses.replace(setup, posterior=dataclasses.replace(setup.posterior, gamma=nothing))


def _keep_gradient(state: State) -> State:
    """Keep the gradient in the place of momenta, which an evaluation leaves as they are."""
    here = state.here._replace(gradient=state.momentum)
    return state._replace(momentum=state.here.gradient, here=here)


def _add_gradient(state: State, sign: float) -> State:
    """Add the gradient to what was kept of others, or take it off."""
    signs = np.full(shape_of(state.momentum)[0], float(sign))
    return state._replace(momentum=add_multiples(state.momentum, signs, state.here.gradient))


def _gradients(state: State) -> tuple[Vectors, Vectors]:
    """Return what was kept of gradients, and the last one."""
    return state.momentum, state.here.gradient


def _bent(state: State) -> Iterator[tuple[Any, Any]]:
    """Yield where each walker is, and by how much its gradient differs from the one kept."""
    for at, here, there in zip(*map(host_rows, (state.position, *_gradients(state))), strict=True):
        yield at, there - here


def measure_heat(setup: WalkSetup, course: Course) -> Course:
    """Measure what the noise of batches of one part adds to llc, were the loss quadratic.

    Noise along a direction where data have the curvature c, and data and localizer a, raises the
    variance there by `position_heat / a`, and llc by half of c times that. Walkers stay where they
    are, and their momenta are drawn anew.

    Cost:
        Four evaluations of all walkers on a part of a batch.
    """
    probe, scale, anchor = Probe(setup, HEAT_PROBES), course.scale, course.anchor
    state = _keep_gradient(probe.evaluate(scale, course.state, probe.batch(), anchor))
    state = _add_gradient(probe.evaluate(scale, state, probe.batch(), anchor), -1)
    # momenta are the difference of two gradients now
    noise = state.momentum
    square = np.maximum(_row_products(noise, noise), TINY)
    localizer = _row_products(noise, noise, scale, scale)
    del noise
    slopes, batch = [], probe.batch()
    for step in (1 / np.sqrt(square), -1 / np.sqrt(square)):  # there and back
        position = add_multiples(state.position, step, state.momentum)
        state = probe.evaluate(scale, state._replace(position=position), batch, anchor)
        slopes.append(_row_products(*_gradients(state)))
    # the noise is zero where all weights of two batches are
    localizer *= float(setup.posterior.gamma) / square
    curvature = (slopes[0] - slopes[1]) / np.sqrt(square) - localizer
    total = np.maximum(localizer + np.abs(curvature), TINY)
    raised = 0.5 * square * position_heat(course.step_size, FRICTION_TIME, total)
    seed = np.random.SeedSequence(setup.seed.entropy, spawn_key=(MOMENTA,))
    momentum = fill(state.momentum, standard_normals(setup, np.random.default_rng(seed)))
    return course._replace(
        state=state._replace(momentum=momentum),
        heat=float(np.mean(0.5 * raised * curvature / total)),
        work=course.work + probe.work,
        examples=course.examples + probe.examples,
    )


def measure_decrement(setup: WalkSetup, course: Course) -> tuple[Course, float, float]:
    """Measure what a step from w* along the gradient would gain, on `ANCHOR_SHARE` of the budget.

    The walkers end at w*.

    Returns:
        The course with what it took, nats of log posterior, and their standard error.
    """
    probe, state = Probe(setup, DECREMENT_PROBES), course.state
    state = state._replace(position=blank(state.position), momentum=blank(state.momentum))
    count = int(np.clip(ANCHOR_SHARE * setup.budget / setup.cost(1, 1), 1, MOST_DECREMENT_BATCHES))
    for _ in range(count):
        state = _add_gradient(probe.evaluate(course.scale, state, probe.batch()), 1)
    square, error = mean_square_gradient(
        inner_products(total / count for (total,) in _columns(state.momentum))
    )
    work, examples = course.work + probe.work, course.examples + probe.examples
    return course._replace(state=state, work=work, examples=examples), 0.5 * square, 0.5 * error


def standard_normals(setup: WalkSetup, rng: np.random.Generator) -> Iterator[Any]:
    """Draw a direction for each walker, one at a time: the same however parameters lie."""

    def draw(array: Any) -> np.ndarray:
        return rng.standard_normal(array.shape, np.float32).astype(setup.dtype, copy=False)

    for _ in range(setup.shape[0]):
        yield jax.tree_util.tree_map(draw, setup.posterior.center)


def _columns(*vectors: Vectors | Vector) -> Iterator[list[Float[np.ndarray, "_ some"]]]:
    """Yield the same few columns of vectors in double precision, without a copy of all."""
    for arrays in host_blocks(*vectors):
        for start in range(0, arrays[0].shape[1], SLICE):
            yield [array[:, start : start + SLICE].astype(float) for array in arrays]


def inner_products(
    parts: Iterable[Float[np.ndarray, "walkers _"]],
) -> Float[np.ndarray, "walkers walkers"]:
    """Return the products of all pairs of rows, which come part by part."""
    return np.sum([part @ part.T for part in parts], axis=0)


def _row_products(*vectors: Vectors | Vector) -> Float[np.ndarray, " walkers"]:
    """Return the sum over each row of the product of vectors; a single row is that of all."""
    sums = [functools.reduce(np.multiply, parts).sum(axis=1) for parts in _columns(*vectors)]
    return np.sum(sums, axis=0)


def _distances(one: Vectors, other: Vectors) -> Float[np.ndarray, " walkers"]:
    """Return the length of the difference of each row."""
    squares = [np.square(a - b).sum(axis=1) for a, b in _columns(one, other)]
    return np.sqrt(np.sum(squares, axis=0))


def leaf_curvature(
    pairs: Iterable[tuple[Any, Any]],
    sizes: tuple[int, ...],
) -> Float[np.ndarray, " leaves"]:
    """Return the mean Rayleigh quotient of each array of parameters, at least 0.

    Each pair is a direction, and its product with the Hessian.
    """
    ends = np.cumsum(sizes)[:-1]

    def by_array(vector: Any) -> Iterable[np.ndarray]:
        return vector.arrays if isinstance(vector, Leaves) else np.split(vector, ends)

    products, squares = np.zeros((2, len(sizes)))
    for pair in pairs:
        direction, bent = map(by_array, pair)
        products += list(map(np.vdot, direction, bent))
        squares += list(map(np.vdot, direction, direction))
    return np.maximum(products / np.maximum(squares, TINY), 0.0)


def mean_square_gradient(products: Float[np.ndarray, "walkers walkers"]) -> tuple[float, float]:
    """Return |E g|^2 without the noise of g, from products of independent g, and its error.

    It is the mean product of two different draws, and the error that of the jackknife.
    """
    count = products.shape[0]
    if count < 3:
        return 0.0, math.inf
    products = products - np.diag(np.diagonal(products))
    others = (products.sum() - 2 * products.sum(axis=0)) / ((count - 1) * (count - 2))
    error = math.sqrt((count - 1) * float(np.var(others)))
    return float(products.sum() / (count * (count - 1))), error
