"""What is evaluated at draws: energies, losses of examples, and observables."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import PROGRAMS
from fastvi._modes import call_in_their_modes
from fastvi._typing import Array, Float, Int, Key, Keys, PyTree, Scalar
from fastvi.kernels.noise import streams
from fastvi.observables.example_losses import losses_by_example, losses_by_token, some_of
from fastvi.sampling.ensemble import Target
from fastvi.sampling.gradients import excess_and_grad
from fastvi.target.data import Problem
from fastvi.target.fingerprint import shapes_of

# Bytes that gradients on all data compute at one draw, up to which they are taken: a fifth of a
# second on one core. At half, halves are noisier; at double, draws of a language model wait longer.
WHOLE_BYTES = 2.0**29
# Losses of all walkers that are evaluated at once: 16 MiB in float32. Half evaluates twice as many
# pieces of large data, double holds twice as much.
PIECE_NUMBERS = 2**22
LEAST_HALF = 64  # examples of half of a sample: half is noisier, double costs large models more


class Energies(NamedTuple):
    """Of each draw two estimates of n beta (L_n(w) - L_n(w*)) and of its derivative along w - w*.

    Both are exact where all data are evaluated. Else they are of two samples of examples that are
    independent of each other and drawn anew for each draw: products of one of each are unbiased.
    `gradient` is that of n beta L_n, or the mean of what the two samples say.
    """

    llc: Float[Array, "draws halves"]
    slope: Float[Array, "draws halves"]
    radius2: Float[Array, " draws"]
    gradient: Float[Array, "draws dim"]


def half_of_sample(target: Target) -> int:
    """Return how many examples either half of a sample has; 0 where all data are evaluated."""
    computed, num_data = max(target.loss.computed, 1.0), target.problem.num_data
    if computed * num_data <= WHOLE_BYTES or num_data <= 2 * LEAST_HALF:
        return 0
    return max(LEAST_HALF, int(WHOLE_BYTES / computed / 2))


def energies_at(
    target: Target,
) -> Callable[[Problem, Scalar, Float[Array, "draws dim"], Keys, Int[Array, ""]], Energies]:
    """Return `(problem, L_n(w*), displacement, keys, number) -> Energies`, compiled.

    The keys are those of the walkers, and the number that of the draw.

    Cost:
        A gradient on all data for each draw; of a sample a gradient and a loss of each example.
    """
    half = half_of_sample(target)

    def build(objective: Any) -> Callable[..., Energies]:
        def on_sample(problem: Problem, reference: Scalar, v: Array, rows: Array):
            excess, slope = excess_and_grad(objective, problem, v, reference, rows)
            # what the same examples say at w*: their difference is much less noisy
            at_center, _ = excess_and_grad(objective, problem, 0 * v, reference, rows)
            return excess - at_center, slope

        def at(problem: Problem, reference: Scalar, v: Array, key: Key, number: Array):
            if not half:
                excess, slope = excess_and_grad(objective, problem, v, reference)
                return jnp.stack([excess] * 2), jnp.stack([v @ slope] * 2), slope
            key = jax.random.fold_in(streams.derive(key, streams.Purpose.DRAWS), number)
            rows = jax.random.randint(key, (2, half), 0, problem.num_data)
            excess, slopes = jax.lax.map(lambda some: on_sample(problem, reference, v, some), rows)
            return excess, slopes @ v, jnp.mean(slopes, axis=0)

        def at_draws(problem: Problem, reference: Scalar, displacement: Array, keys: Keys, number):
            found = jax.lax.map(
                lambda draw: at(problem, reference, draw[0], draw[1], number), (displacement, keys)
            )
            excess, slope, gradient = (problem.posterior.nbeta * part for part in found)
            return Energies(excess, slope, jnp.sum(displacement**2, axis=1), gradient)

        return jax.jit(at_draws)

    key = ("energies", half, shapes_of(target.problem))
    return PROGRAMS.find(target.loss, key, (target.objective,), build)


def mean_energies(target: Target, points: Float[Array, "points dim"]) -> np.ndarray:
    """Return n beta (L_n - L_n(w*)) at displacements from w*, one after the other.

    Cost:
        A loss on all data for each, and for w*.
    """
    problem, rise = target.problem, mean_rise_at(target)
    reference = rise(problem, jnp.zeros_like(problem.posterior.center), np.float32(0.0))
    nbeta = float(problem.posterior.nbeta)
    return nbeta * np.array([float(rise(problem, point, reference)) for point in points])


def mean_rise_at(target: Target) -> Callable[[Problem, Float[Array, " dim"], Any], Scalar]:
    """Return `(problem, displacement, reference) -> L_n - reference`, compiled.

    The reference is taken off each slice's mean, which keeps float32 accurate.
    """

    def build(objective: Any) -> Callable[..., Scalar]:
        def mean_loss(problem: Problem, displacement: Array, reference: Scalar) -> Scalar:
            point = problem.posterior.center + displacement
            return problem.data.mean(lambda batch: objective.loss(point, batch) - reference)

        return jax.jit(mean_loss)

    key = ("mean loss", shapes_of(target.problem))
    return PROGRAMS.find(target.loss, key, (target.objective,), build)


class ExampleLosses:
    """The losses of a data set at draws, of its examples or of their tokens.

    Attributes:
        problem: The posterior, with the data set in place of its data.
        shape: Of the losses of a draw, (examples,) or (examples, tokens...).
    """

    def __init__(self, target: Target, problem: Problem, by_token: bool):
        self.problem = problem
        self._target, self._evaluate = target, losses_by_token if by_token else losses_by_example
        center = problem.posterior.center
        none = jax.ShapeDtypeStruct((1, center.size), center.dtype)
        found = jax.eval_shape(
            lambda problem, v: self._evaluate(target.objective, problem, v), problem, none
        )
        self.shape: tuple[int, ...] = found.shape[1:]

    def pieces(
        self, displacement: Float[Array, "draws dim"]
    ) -> Iterator[tuple[slice, Float[Array, "draws examples *tokens"]]]:
        """Yield which examples, and their losses.

        Cost:
            A loss of each example for each draw.
        """
        count = self.shape[0]
        each = displacement.shape[0] * math.prod(self.shape[1:])
        size = min(count, max(1, PIECE_NUMBERS // each))
        for start in range(0, count, size):
            now = min(size, count - start)
            losses = self._program(now)(self.problem, displacement, np.int32(start))
            yield slice(start, start + now), losses

    def at(self, displacement: Float[Array, "draws dim"]) -> np.ndarray:
        """Return the losses of all examples."""
        found = [np.asarray(losses) for _, losses in self.pieces(displacement)]
        return np.concatenate(found, axis=1)

    def _program(self, size: int) -> Callable[..., Array]:
        evaluate, is_whole = self._evaluate, size == self.shape[0]

        def build(objective: Any) -> Callable[..., Array]:
            def losses(problem: Problem, v: Array, start: Array) -> Array:
                some = problem if is_whole else some_of(problem, start, size)
                return evaluate(objective, some, v)

            return jax.jit(losses)

        key = (evaluate.__name__, size, shapes_of(self.problem))
        return PROGRAMS.find(self._target.loss, key, (self._target.objective,), build)


def observable_at(
    function: Callable[[PyTree, Any], Any], as_passed: Callable[[Array], PyTree]
) -> Callable[[Array, Any], Array]:
    """Return `(displacement, data) -> values`, compiled, of a function of parameters and data."""

    @jax.jit
    def at_draws(displacement: Array, data: Any) -> Array:
        def at(v):
            return jnp.asarray(call_in_their_modes(function, as_passed(v), data))

        return jax.lax.map(at, displacement)

    return at_draws
