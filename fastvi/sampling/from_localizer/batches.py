"""Fresh minibatches: each step of each walker reads examples of its own.

A batch is read in *parts* of one size, so that one compiled program serves every batch size, and no
more than a part of each walker is in memory at once.
"""

import abc
import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Batch, Int, Keys
from fastvi.kernels.noise import streams, words
from fastvi.target.feed import Feed
from fastvi.target.losses import WeightedBatch, num_examples, raw_examples, take_examples

# Parts that a batch may have: their numbers are the low bits of a counter. Half of it bounds
# batches sooner, double leaves half as many steps before counters repeat.
MOST_PARTS = 2**10


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


class WeightSums(NamedTuple):
    """Sums over examples: their number, weights and squares of weights, over the taken mean."""

    count: int = 0
    weight: float = 0.0
    square: float = 0.0

    @property
    def drift(self) -> float:
        """Return the relative difference of the mean weight from the one that was taken."""
        return self.weight / self.count - 1

    @property
    def noise(self) -> float:
        """Return the standard error of `drift`, were the examples drawn at random."""
        mean = self.weight / self.count
        return math.sqrt(max(self.square / self.count - mean**2, 0.0) / self.count)


class Reading(NamedTuple):
    """How far examples that arrive have been read.

    Attributes:
        count: Examples read.
        weights: What their weights were; None where nothing was weighed.
    """

    count: int = 0
    weights: WeightSums | None = None


class AbstractReader(abc.ABC):
    """Whoever has the examples: gives the source of the batches of some steps.

    Attributes:
        first: A source of the shapes that all have.
        most: Steps times parts, at most, that one source serves.
        reading: How far they were read; of examples at hand, nowhere.
    """

    first: AbstractSource
    most: int
    reading: Reading = Reading()

    @property
    def part_size(self) -> int:
        """Count the examples of a part."""
        return self.first.part_size

    @abc.abstractmethod
    def read(self, step: int, steps: int, parts: int) -> AbstractSource | None:
        """Return the batches of steps from `step` on; None where there are no more examples."""

    def go_on(self, reading: Reading) -> None:
        """Pass over what another reader of the same examples has read."""
        self.reading = reading


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
        weigh: Returns mean and mean square of the weights of examples, where the loss is weighted.
    """

    def __init__(
        self,
        feed: Feed,
        like: Batch,
        part_size: int,
        walkers: int,
        most: int,
        weigh: Callable[[Batch], tuple[float, float]] | None = None,
    ):
        self._feed, self._like, self._walkers = feed, like, walkers
        self._part_size, self.most, self._weigh = part_size, most, weigh
        self.first = self._held(take_examples(raw_examples(like), slice(1)), 0)

    def read(self, step: int, steps: int, parts: int) -> AbstractSource | None:
        """Return the next examples."""
        batch = self._feed.take(steps * parts * self._walkers * self.part_size)
        if batch is None:
            return None
        source, count = self._held(batch, step), num_examples(batch)
        read, weights = self.reading
        # arrays that are not full repeat examples; those of one step would do so dozens of times
        if self._weigh is not None and steps > 1:
            mean, square = self._weigh(source.examples)
            said = weights or WeightSums()
            weights = WeightSums(
                said.count + count, said.weight + count * mean, said.square + count * square
            )
        self.reading = Reading(read + count, weights)
        return source

    def go_on(self, reading: Reading) -> None:
        """Pass over what another reader has read, of data that can be read again."""
        super().go_on(reading)
        self._feed.restart(reading.count)

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
