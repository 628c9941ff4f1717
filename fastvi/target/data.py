"""The examples, with every way in which they are read, and the target on them.

Three verbs read examples: `minibatch` draws some, `subset` chooses some, `mean` averages over all.
"""

import abc
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from fastvi._typing import Array, Batch, Float, Int, Key
from fastvi.kernels.noise import streams, words
from fastvi.target.losses import example_bytes, map_examples, num_examples, take_examples
from fastvi.target.objective import FlatObjective, value_and_grad
from fastvi.target.posterior import LocalPosterior

# Bytes of the examples of one forward-backward pass and of what a forward pass computes of them.
# A tanh net 784-64-10 then takes some 3,900 examples, which 8 walkers share as 480 each, and a
# round of theirs 25 to 35 MiB of temporaries. Measured there on 2 CPU cores: half of the bytes and
# twice as many are within 10 % of the time, all of 16,384 examples at once a third slower.
PASS_BYTES = 2**24
# Pieces that data which are read once are evaluated on: the spread over them is the error of a
# sample of the data. Half as many leave it uncertain by a quarter, twice as many by an eighth.
SAMPLE_PIECES = 16
MOST_EXAMPLES = 4096  # of a pass where it is not known what is computed of an example


def default_max_batch(examples: Batch, computed: float | None = None) -> int:
    """Return how many examples one pass may take.

    Args:
        examples: The examples.
        computed: Bytes that a forward pass computes of each; where they are not known, a pass takes
            `MOST_EXAMPLES` at the most.
    """
    most = int(PASS_BYTES / max(example_bytes(examples) + (computed or 0), 1))
    # A pass takes one example even if that alone is too large.
    return max(1, most if computed else min(most, MOST_EXAMPLES))


class AbstractData(eqx.Module):
    """Examples on the device: arrays with a common leading axis.

    Attributes:
        examples: The arrays.
        max_batch: The most examples that one forward-backward pass takes, all copies of it
            together.
    """

    examples: eqx.AbstractVar[Batch]
    max_batch: eqx.AbstractVar[int]

    @property
    @abc.abstractmethod
    def num_data(self) -> int:
        """Count the examples that the mean loss L_n is over."""

    @property
    def is_sample(self) -> bool:
        """Whether L_n is over a sample, of data that are read once."""
        return False

    @property
    def num_examples(self) -> int:
        """Count the examples at hand."""
        return num_examples(self.examples)

    @abc.abstractmethod
    def minibatch(self, key: Key, size: int, block: Array | int = 0) -> Batch:
        """Draw examples uniformly, with replacement.

        Args:
            key: Random key.
            size: Number of examples.
            block: Counter of the key: other blocks give other examples.
        """

    def pieces(self) -> Iterator["AbstractData"]:
        """Yield all data in pieces that are on the device: here in one."""
        yield self

    def known_pieces(self) -> Iterator["AbstractData"]:
        """Yield pieces for which nothing is read of data that are read once."""
        return self.pieces()

    def fits_a_pass(self, copies: int = 1) -> bool:
        """Say whether one pass takes all examples, with so many copies side by side."""
        return self._slice_size(self.num_examples, copies) == self.num_examples

    def subset(self, key: Key, size: int) -> "Data":
        """Choose examples at random, without replacement; all of them where there are no more."""
        if self.num_examples <= size:
            return Data(self.examples, self.max_batch)
        rows = jax.random.choice(key, self.num_examples, (size,), replace=False)
        return Data(take_examples(self.examples, rows), self.max_batch)

    def mean(
        self,
        statistic: Callable[[Batch], Any],
        rows: Int[Array, " rows"] | None = None,
        copies: int = 1,
        axis: str | None = None,
    ) -> Any:
        """Average a statistic that is itself a mean over the examples of a batch.

        The examples are read a slice at a time, and no copy of them is made.

        Args:
            statistic: `(batch) -> pytree of arrays`.
            rows: The examples to average over; all when left out.
            copies: How many evaluations of `statistic` run side by side: walkers, draws or
                tangents that a vmap inside or outside of it adds. They share `max_batch`.
            axis: Axis of a mesh whose devices, each with all examples, divide them; inside of
                `shard_map` alone.

        Cost:
            One evaluation of the statistic for each example. Memory: that of `max_batch` examples.
            On `axis` one sum over the devices; every device evaluates what does not divide.
        """
        count = self.num_examples if rows is None else rows.shape[0]
        devices = 1 if axis is None else jax.lax.axis_size(axis)
        share = count // devices
        if axis is None or not share:
            return self._mean_of(statistic, rows, None, count, copies)
        first = jax.lax.axis_index(axis) * share
        mean = jax.lax.pmean(self._mean_of(statistic, rows, first, share, copies), axis)
        covered = share * devices
        if covered == count:
            return mean
        rest = self._mean_of(statistic, rows, covered, count - covered, copies)
        return _weighted(mean, rest, covered / count)

    def _mean_of(
        self,
        statistic: Callable[[Batch], Any],
        rows: Int[Array, " rows"] | None,
        first: Int[Array, ""] | int | None,
        count: int,
        copies: int,
    ) -> Any:
        """Average over so many examples from the `first` on; over all, where that is None."""
        size = self._slice_size(count, copies)
        if size == count:  # no loop, whose body XLA would not fuse with what surrounds it
            return statistic(
                self._read(rows, 0 if first is None else first, None if first is None else count)
            )
        slices, start = count // size, 0 if first is None else first
        total = _sum_over(lambda i: statistic(self._read(rows, start + i * size, size)), slices)
        mean = jax.tree_util.tree_map(lambda leaf: leaf / slices, total)
        covered = slices * size
        if covered == count:
            return mean
        # a mean over other examples cannot be masked, so a rest is a second copy of the model
        rest = statistic(self._read(rows, start + covered, count - covered))
        return _weighted(mean, rest, covered / count)

    def each(self, statistic: Callable[[Batch], Array], copies: int = 1) -> Array:
        """Evaluate a statistic that has a value for each example of a batch, a slice at a time.

        Args:
            statistic: `(batch) -> array` with the batch axis first.
            copies: As in `mean`.
        """
        count, rows = self.num_examples, None
        size = self._slice_size(count, copies)
        if size == count:
            return statistic(self.examples)
        starts = jnp.arange(count // size) * size
        found = jax.lax.map(lambda start: statistic(self._read(rows, start, size)), starts)
        # The slices lead, and the values of each follow on axis 1.
        found, covered = found.reshape(-1, *found.shape[2:]), found.shape[0] * size
        if covered == count:
            return found
        return jnp.concatenate([found, statistic(self._read(rows, covered, count - covered))])

    def _slice_size(self, count: int, copies: int) -> int:
        # Copies side by side share the memory of one pass.
        return slice_size(count, max(1, self.max_batch // copies))

    def _read(self, rows: Array | None, start: Any = 0, length: int | None = None) -> Batch:
        """Return a stretch of the examples, or of those in `rows`; all of them by default."""
        if length is None:
            return self.examples if rows is None else take_examples(self.examples, rows)
        if rows is None:  # a dynamic slice in a loop is read in place; a reshape would be a copy
            return _slice(self.examples, start, length)
        return take_examples(self.examples, _slice(rows, start, length))


class Data(AbstractData):
    """All examples."""

    examples: Batch
    max_batch: int = eqx.field(static=True)

    @property
    def num_data(self) -> int:
        """Count the examples."""
        return self.num_examples

    def minibatch(self, key: Key, size: int, block: Array | int = 0) -> Batch:
        """Draw examples with replacement, or return all of them where `size` is that large."""
        # The mean over all examples has no noise, which draws with replacement would have.
        if size >= self.num_examples:
            return self.examples
        # uneven by at most num_examples / 2^32, and a third of the work of randint
        rows = words(key, size, block=block) % jnp.uint32(self.num_examples)
        return take_examples(self.examples, rows.astype(jnp.int32))


def hold(examples: Batch, max_batch: int | None = None) -> Data:
    """Return the examples as data, with the default `max_batch` where none is given."""
    return Data(examples, max_batch or default_max_batch(examples))


class Window(AbstractData):
    """Uniform draws from data that are not at hand.

    L_n is the mean over `population` examples: all of them or, of data that `are_read_once`, a
    sample.
    """

    examples: Batch
    max_batch: int = eqx.field(static=True)
    population: int = eqx.field(static=True)
    are_read_once: bool = eqx.field(static=True, default=False)

    @property
    def num_data(self) -> int:
        """Count the examples that L_n is over."""
        return self.population

    @property
    def is_sample(self) -> bool:
        """Whether L_n is over a sample, of data that are read once."""
        return self.are_read_once

    def known_pieces(self) -> Iterator[AbstractData]:
        """Yield the window in parts, whose spread is the error of a sample."""
        size = -(-self.num_examples // SAMPLE_PIECES)
        for start in range(0, self.num_examples, size):
            rows = slice(start, start + size)
            yield Data(take_examples(self.examples, rows), self.max_batch)

    def minibatch(self, key: Key, size: int, block: Array | int = 0) -> Batch:
        """Take the next examples, from a place of the key's own on.

        They are independent draws already, and reusing them would draw q towards the minimum of
        the window's loss.
        """
        first = words(key, 1)[0] % jnp.uint32(self.num_examples)
        # the number of examples that the steps before used
        used = streams.step_of(jnp.asarray(block, jnp.uint32)) * size
        rows = first + (used + jnp.arange(size, dtype=jnp.uint32)) % self.num_examples
        return take_examples(self.examples, (rows % self.num_examples).astype(jnp.int32))


def shared_mean(
    statistic: Callable[..., Any], data: AbstractData, shared: tuple[Any, ...], copies: int = 1
) -> Any:
    """Average `statistic(*shared, batch)` over all examples."""
    return data.mean(lambda batch: statistic(*shared, batch), copies=copies)


def slice_size(count: int, most: int) -> int:
    """Return the size of slices: at most `most`, and a divisor of `count` unless all are too small.

    Even slices let a program hold the model once. A divisor below a quarter of `most` would make
    passes too small to be fast, so a rest is left over instead.
    """
    if count <= most:
        return count
    # The largest divisor is taken: each slice is a pass with a cost of its own.
    sizes = (size for size in range(most, max(1, most // 4) - 1, -1) if count % size == 0)
    return next(sizes, most)


def _weighted(mean: Any, rest: Any, share: float) -> Any:
    """Return the mean of two means, the first of them over a share of the examples."""
    return jax.tree_util.tree_map(lambda a, b: a * share + b * (1 - share), mean, rest)


def _sum_over(term: Callable[[Int[Array, ""]], Any], length: int) -> Any:
    """Return the sum of `term(0)` to `term(length - 1)`, tracing it once."""
    # the sum needs shapes before the loop: eval_shape would run the model's Python once more
    closed, shapes = jax.make_jaxpr(term, return_shape=True)(jnp.int32(0))
    leaves, structure = jax.tree_util.tree_flatten(shapes)

    def add(totals, index):
        terms = jaxpr_as_fun(closed)(index)
        return [total + term for total, term in zip(totals, terms, strict=True)], None

    zeros = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
    totals = jax.lax.scan(add, zeros, jnp.arange(length, dtype=jnp.int32))[0]
    return jax.tree_util.tree_unflatten(structure, totals)


def _slice(tree: Any, start: Any, length: int) -> Any:
    return map_examples(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, length), tree)


class Problem(eqx.Module):
    """The target, the data that its loss is of, and the size of minibatches."""

    posterior: LocalPosterior
    data: AbstractData
    batch_size: int = eqx.field(static=True)

    @property
    def num_data(self) -> int:
        """Count the examples that L_n is the mean over."""
        return self.data.num_data

    @property
    def holds_all(self) -> bool:
        """Whether all data are at hand."""
        return isinstance(self.data, Data)

    def next_batch(self, key: Key, block: Array | int = 0) -> Batch:
        """Draw a minibatch."""
        return self.data.minibatch(key, self.batch_size, block)

    def next_data(self, key: Key) -> Data:
        """Draw a minibatch to average over, no more examples at once than of all data."""
        return Data(self.next_batch(key), self.data.max_batch)


def evaluate_target(
    objective: FlatObjective,
    problem: Problem,
    displacement: Float[Array, "draws dim"],
    batch: Batch,
    copies: int = 1,
) -> tuple[Float[Array, " draws"], Float[Array, "draws dim"]]:
    """Evaluate log p and its gradient at every draw, on one batch.

    A batch of more examples than a pass takes is averaged over slices.

    Args:
        objective: The loss.
        problem: Target and data.
        displacement: The draws.
        batch: The examples.
        copies: How many such calls a vmap outside runs side by side.
    """
    posterior, draws = problem.posterior, displacement.shape[0]

    def all_draws(batch):
        def one(v):
            return value_and_grad(objective, posterior.center + v, batch)

        if draws == 1:  # an axis of one would be carried through the model
            return jax.tree_util.tree_map(lambda leaf: leaf[None], one(displacement[0]))
        return jax.vmap(one)(displacement)

    # Every draw sees the same slice, so that a slice is read once for all of them.
    loss, grad = Data(batch, problem.data.max_batch).mean(all_draws, copies=copies * draws)
    value = jax.vmap(posterior.log_density)(displacement, loss)
    slope = jax.vmap(posterior.log_density_grad)(displacement, grad)
    dtype = displacement.dtype
    return value.astype(dtype), slope.astype(dtype)  # the loss may know float64 alone
