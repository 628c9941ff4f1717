"""Measurements before a walk: curvature, stiffness, and the noise of a gradient."""

import copy
import math

import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Array, Float
from fastvi.families.moments import LinearMap
from fastvi.sampling.dynamics import State
from fastvi.sampling.from_localizer.batches import AbstractSource
from fastvi.sampling.from_localizer.plan import (
    TINY,
    Measured,
    position_heat,
    round_map,
    wanted_parts,
)
from fastvi.sampling.from_localizer.setup import FRICTION_TIME, Course, WalkSetup, call_round
from fastvi.sampling.from_localizer.steps import blank_state

# Products with the Hessian that look for its largest eigenvalue, from the noise of a gradient on.
STIFFNESS_PRODUCTS = 2
# Step number from which on batches are those of measurements; no walk makes as many steps.
PROBE_STEPS = 2**20
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
SLICE = 2**16  # numbers of a vector that are doubled at once


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

    def gradient(
        self,
        linear_map: LinearMap,
        position: Float[Array | np.ndarray, "walkers dim"],
        batch: tuple[int, AbstractSource],
        anchor: Float[Array, " dim"] | None = None,
    ) -> Float[np.ndarray, "walkers dim"]:
        """Return the estimate of the gradient of nbeta L_n of each walker in round coordinates."""
        state = blank_state(position)
        del position  # the state has a copy
        state = self._call(linear_map, state, batch, anchor)
        position, gradient = state.position, state.here.gradient
        del state  # its momenta are wanted no more
        return self._of_loss(linear_map, position, gradient)

    def evaluate(
        self,
        linear_map: LinearMap,
        state: State,
        batch: tuple[int, AbstractSource],
        anchor: Float[Array, " dim"] | None = None,
    ) -> tuple[State, Float[np.ndarray, "walkers dim"]]:
        """Evaluate walkers where they are, whose state is used up; return the gradient too."""
        state = self._call(linear_map, state, batch, anchor)
        return state, self._of_loss(linear_map, state.position, state.here.gradient)

    def _call(self, linear_map: LinearMap, state: State, batch, anchor) -> State:
        step, source = batch
        course = Course(state, linear_map, 0.0, anchor, done=step)
        self.work += self.setup.cost(1, 1, course.is_anchored)
        return call_round(self.setup, course, source, -1, 0)[0]

    def _of_loss(
        self,
        linear_map: LinearMap,
        position: Float[Array, "walkers dim"],
        gradient: Float[Array, "walkers dim"],
    ) -> Float[np.ndarray, "walkers dim"]:
        """Take the localizer's part off a gradient."""
        of_localizer = np.square(np.asarray(linear_map.scale)) * float(self.setup.posterior.gamma)
        found = np.array(gradient)
        for mine, at in zip(found, np.asarray(position), strict=True):  # row by row, in place
            mine -= of_localizer * at
        return found


def measure_curvature(setup: WalkSetup, rng: np.random.Generator) -> tuple[Measured, float, int]:
    """Measure the curvature of each array, the stiffness, and the gradient at w*.

    Returns:
        What was measured, the sample gradients that it took, and the examples that it read.

    Cost:
        Five evaluations of all walkers on a part of a batch.
    """
    # arrays of all walkers are changed in place and let go as soon as may be: they are what bounds
    # the parameters that fit the memory
    probe, at_first = Probe(setup, CURVATURE_PROBES), copy.deepcopy(rng)
    localizer = round_map(setup, np.zeros(len(setup.leaf_sizes)))
    first, second = probe.batch(), probe.batch()
    zero = np.zeros(setup.shape, setup.dtype)
    here = probe.gradient(localizer, zero, first)
    bent = probe.gradient(localizer, standard_normal(setup, rng), first)
    bent -= here
    direction = standard_normal(setup, copy.deepcopy(at_first))
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
    wanted = setup.settings.gradients
    is_noisy = wanted_parts(setup, measured) > MOST_RAW_PARTS
    if wanted == "anchored" or (is_noisy and wanted == "auto"):
        # noise that is left where the gradient at w* on the same examples is taken off
        there = probe.gradient(linear_map, standard_normal(setup, copy.deepcopy(at_first)), first)
        there -= probe.gradient(linear_map, standard_normal(setup, at_first), second)
        there /= math.sqrt(2)
        there -= noise
        measured = measured._replace(anchored_noise=mean_square(there))
    return measured, probe.work, probe.examples


def _largest_eigenvalue(
    probe: Probe,
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
        start = jnp.asarray(image / sizes)
        del image
        image = probe.gradient(linear_map, start, batch)
        image -= here
        sizes = np.linalg.norm(image, axis=1)
        stiffness = max(stiffness, float(np.quantile(sizes, STIFFNESS_QUANTILE)))
    return stiffness


def measure_heat(setup: WalkSetup, course: Course) -> Course:
    """Measure what the noise of batches of one part adds to llc, were the loss quadratic.

    Noise along a direction where data have the curvature c, and data and localizer a, raises the
    variance there by `position_heat / a`, and llc by half of c times that.

    Cost:
        Four evaluations of all walkers on a part of a batch.
    """
    probe, linear_map, state = Probe(setup, HEAT_PROBES), course.linear_map, course.state
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
    localizer = np.einsum("ij,ij,j->i", noise, noise, scale2, dtype=float)
    # the noise is zero where all weights of two batches are
    localizer *= float(setup.posterior.gamma) / np.maximum(square, TINY)
    total = np.maximum(localizer + np.abs(curvature), TINY)
    raised = square * position_heat(course.step_size, FRICTION_TIME, total)
    return course._replace(
        state=state,
        heat=float(np.mean(0.5 * raised * curvature / total)),
        work=course.work + probe.work,
        examples=course.examples + probe.examples,
    )


def measure_decrement(setup: WalkSetup, course: Course) -> tuple[float, float, float, int]:
    """Measure what a step from w* along the gradient would gain, on `ANCHOR_SHARE` of the budget.

    Returns:
        Nats of log posterior, their standard error, the sample gradients, and the examples.
    """
    probe, zero = Probe(setup, DECREMENT_PROBES), np.zeros(setup.shape, setup.dtype)
    count = int(np.clip(ANCHOR_SHARE * setup.budget / setup.cost(1, 1), 1, MOST_DECREMENT_BATCHES))
    total = zero
    for _ in range(count):
        total = total + probe.gradient(course.linear_map, zero, probe.batch())
    square, error = mean_square_gradient(total / count)
    return 0.5 * square, 0.5 * error, probe.work, probe.examples


def standard_normal(setup: WalkSetup, rng: np.random.Generator) -> Float[np.ndarray, "walkers dim"]:
    """Draw a direction for each walker."""
    return rng.standard_normal(setup.shape, np.float32).astype(setup.dtype, copy=False)


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
