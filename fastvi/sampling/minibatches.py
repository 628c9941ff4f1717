"""Walkers on fresh minibatches: each step of each walker draws examples of its own.

A batch is read in *parts* of one size, so that one compiled program serves every batch size, and no
more than a part of each walker is in memory at once.
"""

import abc
import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import PROGRAMS, quick_compilation
from fastvi._typing import Array, Batch, Float, Int, Keys, Scalar
from fastvi.families.moments import LinearMap
from fastvi.kernels.noise import normal, streams, words
from fastvi.sampling.dynamics import Evaluation, State, first_half_step, second_half_step
from fastvi.target.data import Problem
from fastvi.target.feed import Feed
from fastvi.target.fingerprint import Fingerprint, shapes_of
from fastvi.target.losses import WeightedBatch, num_examples, raw_examples, take_examples
from fastvi.target.objective import FlatObjective, value_and_grad
from fastvi.target.posterior import LocalPosterior

# Parts that a batch may have: their numbers are the low bits of a counter. Half of it bounds
# batches sooner, double leaves half as many steps before counters repeat.
MOST_PARTS = 2**10
# Dimension up to which walkers step side by side. Beyond, each fills the processor by itself, and
# a step of one in place has an eighth of the temporaries; at half and double: the same.
LARGEST_SIDE_BY_SIDE = 2**19


class AbstractSource(eqx.Module):
    """Where minibatches come from. `part_size` examples make a part."""

    examples: eqx.AbstractVar[Batch]
    part_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def rows(
        self, keys: Keys, step: Int[Array, ""], part: Int[Array, ""], parts: Int[Array, ""]
    ) -> Int[Array, "walkers part_size"]:
        """Return the examples of one part of each walker's batch."""


class Drawn(AbstractSource):
    """Examples at hand, drawn with replacement."""

    examples: Batch
    part_size: int = eqx.field(static=True)

    def rows(self, keys, step, part, parts):
        """Return rows that the keys draw."""
        block = streams.walker_data(step * MOST_PARTS + part)
        drawn = jax.vmap(lambda key: words(key, self.part_size, block=block))(keys)
        # uneven by at most num_examples / 2^32
        return (drawn % jnp.uint32(num_examples(self.examples))).astype(jnp.int32)


class Fed(AbstractSource):
    """Examples that arrive, in their order: those of the steps from `first_step` on."""

    examples: Batch
    first_step: Int[Array, ""]
    part_size: int = eqx.field(static=True)

    def rows(self, keys, step, part, parts):
        """Return the next rows: step by step, part by part, walker by walker."""
        walkers = keys.shape[0]
        first = (((step - self.first_step) * parts + part) * walkers) * self.part_size
        return first + jnp.arange(walkers * self.part_size).reshape(walkers, self.part_size)


class AbstractReader(abc.ABC):
    """Whoever has the examples: gives the source of the batches of some steps.

    Attributes:
        first: A source of the shapes that all have.
        most: Steps times parts, at most, that one source serves.
    """

    first: AbstractSource
    most: int

    @property
    def part_size(self) -> int:
        """Count the examples of a part."""
        return self.first.part_size

    @abc.abstractmethod
    def read(self, step: int, steps: int, parts: int) -> AbstractSource | None:
        """Return the batches of steps from `step` on; None where there are no more examples."""


class DrawnReader(AbstractReader):
    """Of examples at hand."""

    def __init__(self, examples: Batch, part_size: int):
        self.first = Drawn(examples=examples, part_size=part_size)
        self.most = MOST_PARTS

    def read(self, step: int, steps: int, parts: int) -> AbstractSource:
        """Return all examples, of which batches are drawn."""
        return self.first


class FeedReader(AbstractReader):
    """Of examples that arrive; each is read once.

    Args:
        feed: Gives them.
        like: Some of them as the loss takes them, with a mean weight where it is weighted.
        part_size: Examples of a part.
        walkers: Number of walkers.
        most: As in `AbstractReader`.
    """

    def __init__(self, feed: Feed, like: Batch, part_size: int, walkers: int, most: int):
        self._feed, self._like, self._walkers = feed, like, walkers
        self._part_size, self.most = part_size, most
        self.first = self._held(take_examples(raw_examples(like), slice(1)), 0)

    def read(self, step: int, steps: int, parts: int) -> AbstractSource | None:
        """Return the next examples."""
        batch = self._feed.take(steps * parts * self._walkers * self.part_size)
        return None if batch is None else self._held(batch, step)

    def _held(self, batch: Batch, step: int) -> Fed:
        """Move examples to the device, in arrays of one size: what is left over repeats some."""
        rows = np.arange(self.most * self._walkers * self._part_size) % num_examples(batch)
        held = jax.tree_util.tree_map(lambda leaf: jnp.asarray(np.asarray(leaf)[rows]), batch)
        if isinstance(self._like, WeightedBatch):
            held = WeightedBatch(
                held, jnp.broadcast_to(self._like.inverse_mean_weight[0], rows.shape)
            )
        first_step = jnp.asarray(step, jnp.int32)
        return Fed(examples=held, first_step=first_step, part_size=self._part_size)


class Observed(NamedTuple):
    """What a batch says of a walker's position, for each walker, and step by step in a record.

    Attributes:
        excess: L_B(w) - L_B(w*), both on the same examples.
        reference: L_B(w*).
        radius2: |w - w*|^2.
        virial: (w - w*) . grad of -log p.
    """

    excess: Float[Array | np.ndarray, "*shape"]
    reference: Float[Array | np.ndarray, "*shape"]
    radius2: Float[Array | np.ndarray, "*shape"]
    virial: Float[Array | np.ndarray, "*shape"]


class Steps(NamedTuple):
    """What a round keeps of each step; `returned` of those that were taken back."""

    observed: Observed
    returned: Float[Array | np.ndarray, "steps walkers"]


class MinibatchPrograms(NamedTuple):
    """Compiled; where no batch is anchored, one program that holds the model.

    Attributes:
        advance: `(posterior, linear_map, source, anchor, state, keys, parts, step_size,
            friction_time, first, start, stop) -> (State, Steps)`. A round of steps from `start` to
            `stop`; step -1 evaluates the walkers where they are, on the batch of step `first`.
        full_gradient: `(problem) -> gradient` of L_n at w*, for an anchor.
        length: Steps of a round, at most.
    """

    advance: Any
    full_gradient: Any
    length: int


def evaluate_minibatches(
    objective: FlatObjective,
    posterior: LocalPosterior,
    linear_map: LinearMap,
    source: AbstractSource,
    anchor: Float[Array, " dim"] | None,
    parts: Int[Array, ""],
    keys: Keys,
    position: Float[Array, "some dim"],
    step: Int[Array, ""],
    some: Int[Array, " some"] | slice = slice(None),
) -> Evaluation:
    """Evaluate each walker, or `some` of those that have keys, on its batch of this step.

    The loss at w* on the same examples is taken off, which leaves the noise of a difference. With
    an anchor, the gradient at w* on the same examples is taken off too, and the anchor put in its
    place: that of all data. The loss follows: less the slope that was taken off, which has mean
    zero over batches that the position does not depend on.

    Cost:
        For each example a gradient, and a loss; with an anchor, two gradients.
    """
    displacement, center = linear_map.displacement(position), posterior.center

    def one(v, batch):
        loss, slope = value_and_grad(objective, center + v, batch)
        if anchor is None:
            reference = objective.loss(center, batch)
            return loss - reference, reference, slope
        reference, own = value_and_grad(objective, center, batch)
        tilt = anchor - own
        return loss - reference + tilt @ v, reference, slope + tilt

    def add(part, total):
        rows = source.rows(keys, step, part, parts)[some]
        found = jax.vmap(one)(displacement, take_examples(source.examples, rows))
        return jax.tree_util.tree_map(lambda a, b: a + b.astype(a.dtype), total, found)

    zeros = jnp.zeros(displacement.shape[0], displacement.dtype)
    sums = jax.lax.fori_loop(0, parts, add, (zeros, zeros, jnp.zeros_like(displacement)))
    excess, reference, slope = jax.tree_util.tree_map(lambda leaf: leaf / parts, sums)
    gradient = -jax.vmap(posterior.log_density_grad)(displacement, slope)
    radius2 = jnp.sum(displacement**2, axis=-1)
    potential = -jax.vmap(posterior.log_density)(displacement, excess)
    virial = jnp.sum(displacement * gradient, axis=-1)
    observed = Observed(excess, reference, radius2, virial)
    return Evaluation(potential, linear_map.pull_back(gradient), observed)


def blank_state(
    position: Float[Array | np.ndarray, "walkers dim"],
    momentum: Float[np.ndarray, "walkers dim"] | None = None,
) -> State:
    """Return a state to call step -1 with, which reads nothing of its evaluation.

    It uses up a position on the device.
    """
    # each an array of its own, since a donated one may be given once alone
    count, momentum = position.shape[0], np.zeros_like(position) if momentum is None else momentum
    each = [jnp.zeros(count, position.dtype) for _ in range(5)]
    blank = Evaluation(each[0], jnp.zeros_like(position), Observed(*each[1:]))
    position = position if isinstance(position, jax.Array) else jnp.array(position)
    return State(position, jnp.array(momentum), blank)


def minibatch_programs(
    objective: Any, loss: Fingerprint, posterior: LocalPosterior, source: Any, length: int
) -> MinibatchPrograms:
    """Return the programs, shared by objectives that compute the same."""
    key = ("minibatches", length, shapes_of((posterior, source)))

    def build(objective: FlatObjective) -> MinibatchPrograms:
        def full_gradient(problem: Problem):
            center = problem.posterior.center
            return problem.data.mean(lambda batch: value_and_grad(objective, center, batch)[1])

        once = jax.jit(full_gradient, compiler_options=quick_compilation())
        return MinibatchPrograms(_advance(objective, length), once, length)

    return PROGRAMS.find(loss, key, (objective,), build)


def _advance(objective: FlatObjective, length: int) -> Any:
    @functools.partial(jax.jit, donate_argnames=("state",))
    def advance(
        posterior: LocalPosterior,
        linear_map: LinearMap,
        source: AbstractSource,
        anchor: Float[Array, " dim"] | None,
        state: State,
        keys: Keys,
        parts: Int[Array, ""],
        step_size: Scalar,
        friction_time: Scalar,
        first: Int[Array, ""],
        start: Int[Array, ""],
        stop: Int[Array, ""],
    ) -> tuple[State, Steps]:
        shape, dtype = state.position.shape, state.position.dtype

        def moved(state, step, index, some):
            """Make a step of some walkers, whose states these are."""
            block = streams.walker_noise(index)
            noise = jax.vmap(lambda key: normal(key, shape[1:], dtype, block=block))(keys[some])
            half = first_half_step(state, step, friction_time, noise)
            there = evaluate_minibatches(
                objective,
                posterior,
                linear_map,
                source,
                anchor,
                parts,
                keys,
                half.position,
                index,
                some,
            )
            state, info = second_half_step(state, half, there, step, is_same_data=False)
            return state, info.is_returned.astype(dtype)

        def moved_in_turn(state, step, index):
            """Make a step of one walker after the other, in place: the memory of one step."""

            def one(walker, carry):
                row = jax.tree_util.tree_map(
                    lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, walker, 1), carry[0]
                )
                changed = moved(row, step, index, walker[None])
                return jax.tree_util.tree_map(
                    lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, walker, 0),
                    carry,
                    changed,
                )

            return jax.lax.fori_loop(0, shape[0], one, (state, jnp.zeros(shape[0], dtype)))

        def one_step(number, carry):
            state, kept = carry
            index = first + jnp.maximum(number, 0)
            step = jnp.where(number < 0, 0, step_size)
            if shape[1] > LARGEST_SIDE_BY_SIDE:
                state, returned = moved_in_turn(state, step, index)
            else:
                state, returned = moved(state, step, index, slice(None))
            said = Steps(state.here.observed, returned)
            # step -1 writes where step 0 writes next
            at = jnp.maximum(number, 0)
            return state, jax.tree_util.tree_map(lambda a, b: a.at[at].set(b), kept, said)

        blank = Steps(state.here.observed, jnp.zeros(shape[0], dtype))
        kept = jax.tree_util.tree_map(lambda leaf: jnp.zeros((length, *leaf.shape), dtype), blank)
        return jax.lax.fori_loop(start, stop, one_step, (state, kept))

    return advance
