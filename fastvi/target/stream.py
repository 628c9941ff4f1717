"""Data that do not fit into memory: batches on the host, read again and again or only once.

Both kinds give windows of uniform draws to the fit, and pieces to whoever averages over the data.
"""

import abc
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError, UnavailableError
from fastvi._typing import Batch
from fastvi.target.batches import OTHER_EXAMPLES, checksums, one_kind, regrouped
from fastvi.target.data import SAMPLE_PIECES, AbstractData, Data, Window, default_max_batch
from fastvi.target.feed import Feed, concatenate
from fastvi.target.leaves import kind_of
from fastvi.target.losses import example_bytes, num_examples, take_examples, weigh_batch

# Steps of a fit between looks at its traces, at most; half of that at least. Half of it looks, and
# waits for the host, twice as often; twice as many stop later.
CHUNK = 100
# Bytes of a window of data that can be read again, at least CHUNK minibatches. Half of it takes
# twice as many passes over the data, twice as much takes the memory.
WINDOW_BYTES = 128 * 2**20
STREAM_SEED = 0  # tells draws of windows from other uses of the key's words


class AbstractStream(abc.ABC):
    """Data that do not fit into memory.

    Attributes:
        num_data: The number of examples that L_n is averaged over.
        max_batch: The most examples of one forward-backward pass.
        mean_weight: Of an example, of a weighted loss: windows and pieces then carry it.
        weight_error: Relative error of `mean_weight`, where it was found on a sample.
        is_sample: Whether the pieces are a sample of the data, and not all of them.
        fits: Whether a window holds all data.
    """

    num_data: int
    max_batch: int
    mean_weight: float | None = None
    weight_error: float = 0.0
    is_sample: bool = False
    fits: bool

    def __init__(self, batches: Iterable[Any], dtype: Any):
        self._batches, self._dtype = batches, np.dtype(dtype)

    @abc.abstractmethod
    def window(self, step: int) -> AbstractData:
        """Return uniform draws from the data for the steps from `step` on."""

    @abc.abstractmethod
    def pieces(self) -> Iterator[AbstractData]:
        """Yield all data, or a sample of them, in pieces that are on the device."""

    def known_pieces(self) -> Iterator[AbstractData]:
        """Yield pieces for which nothing is read of data that are read once."""
        return self.pieces()

    def _piece(self, batch: Batch) -> Data:
        return Data(self._held(batch), self.max_batch)

    def _held(self, batch: Batch) -> Batch:
        """Move a batch to the device, with the mean weight where the loss is weighted."""
        held = jax.tree_util.tree_map(jnp.asarray, batch)
        if self.mean_weight is None:
            return held
        return weigh_batch(held, self.mean_weight, self._dtype)


class HostStream(AbstractStream):
    """A re-iterable of host batches: pytrees of arrays with a common leading axis of examples.

    A window holds uniform draws with replacement from all examples, whatever their order, as many
    as the steps use up before the next: their minibatches have the noise of minibatches from the
    data. Each window costs one pass. A pass that gives other examples than the first, in whatever
    order, is refused.

    Attributes:
        num_rows: Examples of a window.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        dtype: Any,
        seed: Any,
        batch_size: int,
        most_bytes: int | None = None,
    ):
        super().__init__(batches, dtype)
        self._seed = [int(word) for word in np.ravel(np.asarray(jax.random.key_data(seed)))]
        self.num_data, self._fingerprint, self._example = self._survey()
        self.max_batch = default_max_batch(self._example)
        most_bytes = WINDOW_BYTES if most_bytes is None else most_bytes
        most_rows = most_bytes // max(example_bytes(self._example), 1)
        # A window lasts for whole chunks, so that no chunk of steps reads from two windows.
        self._steps = CHUNK * max(1, most_rows // (batch_size * CHUNK))
        self.num_rows = min(self.num_data, self._steps * batch_size)
        self.fits = self.num_rows == self.num_data
        self._window: tuple[int, Batch] | None = None

    def feed(self) -> Feed:
        """Return uniform draws from all data, in the order of `window`, without an end."""
        return Feed(self._behind(0), self._behind)

    def _behind(self, count: int) -> Iterator[Batch]:
        """Return the draws behind so many, in pieces.

        Another pass is then made only where all rows of a window have been taken.
        """
        number, taken = divmod(count, self.num_rows)

        def windows() -> Iterator[Batch]:
            yield take_examples(self._rows(number), slice(taken, None))
            yield from map(self._rows, itertools.count(number + 1))

        return regrouped(windows(), default_max_batch(self._example))

    def _rows(self, number: int) -> Batch:
        """Return the rows of a window, which cost no pass where it is the one that is held."""
        held = self._window
        if held is not None and held[0] == number:
            return jax.tree_util.tree_map(np.asarray, held[1])
        return self._draw(number)

    def window(self, step: int) -> AbstractData:
        """Return `num_rows` uniform draws from the data, other ones once they are used up.

        All data if they fit.
        """
        number = step // self._steps
        if self._window is None or self._window[0] != number:
            self._window = None  # the old window goes before the new one is made
            self._window = number, jax.tree_util.tree_map(jnp.asarray, self._draw(number))
        examples = self._held(self._window[1])
        if self.fits:
            return Data(examples, self.max_batch)
        return Window(examples, self.max_batch, self.num_data)

    def _draw(self, number: int) -> Batch:
        if self.fits:  # in their own order, so that bits are those of the same arrays in memory
            wanted = np.arange(self.num_data)
        else:
            seed = [STREAM_SEED, *self._seed, number]
            wanted = np.random.default_rng(seed).integers(self.num_data, size=self.num_rows)
        # sorted, so that one pass over the batches fills all rows
        order = np.argsort(wanted, kind="stable")
        ordered, seen = wanted[order], 0
        rows = jax.tree_util.tree_map(
            lambda leaf: np.empty((self.num_rows, *leaf.shape[1:]), leaf.dtype), self._example
        )
        targets = jax.tree_util.tree_leaves(rows)
        for batch in self._read():
            size = num_examples(batch)
            first, last = np.searchsorted(ordered, (seen, seen + size))
            for target, source in zip(targets, jax.tree_util.tree_leaves(batch), strict=True):
                target[order[first:last]] = source[ordered[first:last] - seen]
            seen += size
        return rows

    def pieces(self) -> Iterator[AbstractData]:
        """Yield all data in pieces of one size, some `PASS_BYTES`, and a rest."""
        return map(self._piece, regrouped(self._read(), default_max_batch(self._example)))

    def _survey(self) -> tuple[int, int, Batch]:
        """Read all data once: count, check and sum them up, and keep an empty batch of theirs."""
        count, fingerprint, example = 0, 0, None
        for batch in one_kind(self._batches, self._dtype):
            example = take_examples(batch, slice(0)) if example is None else example
            count += num_examples(batch)
            fingerprint += sum(checksums(batch))
        if count == 0:
            raise DataError("data has no examples: the iterable of batches was empty.")
        return count, fingerprint, example

    def _read(self) -> Iterator[Batch]:
        """Read all data once more; refuse what differs from the first time."""
        count, fingerprint = 0, 0
        for batch in one_kind(self._batches, self._dtype):
            count += num_examples(batch)
            fingerprint += sum(checksums(batch))
            yield batch
        if count != self.num_data:
            raise DataError(
                f"the iterable of batches gave {self.num_data} examples first and {count} later."
            )
        if fingerprint != self._fingerprint:
            raise DataError(OTHER_EXAMPLES)


class OnePassStream(AbstractStream):
    """An iterator of host batches, each read once, whose order says nothing of the examples.

    A window holds the next examples, as many as the steps use up. The pieces hold as many again, a
    sample of the data. An iterator that ends within the first window is held as it is.
    """

    def __init__(self, batches: Iterator[Any], dtype: Any, batch_size: int):
        super().__init__(batches, dtype)
        # parts of one size, so that one program takes each of them
        size = -(-CHUNK * batch_size // SAMPLE_PIECES)
        self._parts = regrouped(one_kind(batches, self._dtype), size)
        first = list(itertools.islice(self._parts, SAMPLE_PIECES))
        if not first:
            raise DataError("data has no examples: the iterator of batches was empty.")
        self._step, self._window = 0, concatenate(first)
        self.num_data = self._cursor = num_examples(self._window)
        # An iterator that gave less than was asked for has given all that there is.
        self.is_sample = self.num_data == SAMPLE_PIECES * size
        self.fits = not self.is_sample
        self.max_batch = default_max_batch(self._window)

    def next(self, cursor: int) -> tuple[Batch, int]:
        """Return the examples after the first `cursor` ones, and the cursor behind them.

        Raises:
            DataError: If they have been read before, or there are no more.
        """
        if cursor != self._cursor:
            raise DataError(
                f"data is a {kind_of(self._batches)}, which can be read only once. Pass an object "
                "whose __iter__ begins anew each time, such as a torch DataLoader."
            )
        batch = next(self._parts, None)
        if batch is None:
            raise DataError(
                f"the iterator of batches ended after {cursor} examples, and more are wanted. Take "
                "fewer steps or a smaller batch_size, or pass data that can be read again."
            )
        self._cursor += num_examples(batch)
        return batch, self._cursor

    def window(self, step: int) -> AbstractData:
        """Return examples for the steps from `step` on, which may not go back."""
        if step != self._step:  # every chunk of steps has examples of its own
            if step < self._step:
                self.next(0)  # which says that they are gone
            self._window = concatenate([self.next(self._cursor)[0] for _ in range(SAMPLE_PIECES)])
            self._step = step
        examples = self._held(self._window)
        if self.fits:
            return Data(examples, self.max_batch)
        return Window(examples, self.max_batch, self.num_data, are_read_once=True)

    def pieces(self) -> Iterator[AbstractData]:
        """Yield the next examples, as many as a window has."""
        return (self._piece(self.next(self._cursor)[0]) for _ in range(SAMPLE_PIECES))

    def known_pieces(self) -> Iterator[AbstractData]:
        """Yield the window in pieces: nothing is read."""
        size = -(-num_examples(self._window) // SAMPLE_PIECES)
        return map(self._piece, regrouped([self._window], size))


def feed_once(batches: Iterator[Any], dtype: Any) -> Feed:
    """Return the feed of an iterator, whose order says nothing of the examples."""
    return Feed(one_kind(batches, dtype))


def open_stream(batches: Any, dtype: Any, seed: Any, batch_size: int) -> AbstractStream:
    """Return an iterator as data that are read once, another iterable as ones to read anew."""
    if isinstance(batches, Iterator):
        return OnePassStream(batches, dtype, batch_size)
    return HostStream(batches, dtype, seed, batch_size)


def uncorrected(method: str | None, is_sample: bool) -> str:
    """Return the method of an estimate from a stream: "variational" where none was asked for.

    Args:
        method: The method that was asked for.
        is_sample: Whether the data are read once, so that L_n is known on a sample alone.

    Raises:
        UnavailableError: If it is one that needs the gradient on all data, or much of it, at every
            step, or L_n itself where only a sample of it is known.
    """
    if method in ("auto", "sample"):
        raise UnavailableError(
            f"method={method!r} after a fit needs the data in memory, and they are streamed. A "
            "walk from the localizer needs no fit: leave out what configures one, and set "
            'localization > 0. Or use "reweight" or "variational".'
        )
    if method == "reweight" and is_sample:
        raise UnavailableError(
            'method="reweight" needs L_n on all data at each draw, and an iterator gives a sample. '
            'Use "variational", or data that can be read again.'
        )
    return method or "variational"
