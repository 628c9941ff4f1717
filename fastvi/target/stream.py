"""Data that do not fit into memory.

A re-iterable of host batches, read in windows for the fit, in chunks for sums.
"""

import abc
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError, UnavailableError
from fastvi._typing import Batch
from fastvi.target.data import AbstractData, Data, Window, default_max_batch
from fastvi.target.inputs import as_held, kind_of, numeric, refuse_examples_in_a_list, refuse_sparse
from fastvi.target.losses import num_examples, take_examples, weigh_batch

CHUNK = 100  # steps of a fit between looks at its traces, at most; half of that at least
WINDOW_BYTES = 128 * 2**20  # at least CHUNK minibatches, however large an example is
STREAM_SEED = 0


class AbstractStream(abc.ABC):
    """Data that do not fit into memory."""

    @abc.abstractmethod
    def window(self, step: int) -> AbstractData:
        """Return uniform draws from the data for the steps from `step` on."""

    @abc.abstractmethod
    def pieces(self) -> Iterator[AbstractData]:
        """Yield all data in pieces that are on the device."""


class HostStream(AbstractStream):
    """A re-iterable of host batches, each a pytree of arrays with a common leading axis of examples.

    A window holds uniform draws with replacement from all examples, whatever their order, as many
    as the steps use up before the next: their minibatches have the noise of minibatches from the
    data. Each window costs one pass. A pass that gives other examples than the first, in whatever
    order, is refused.

    Attributes:
        num_data: Number of examples.
        num_rows: Examples of a window.
        mean_weight: Mean weight of an example, of a weighted loss: windows and chunks then carry
            it.
    """

    mean_weight: float | None = None

    def __init__(
        self,
        batches: Iterable[Any],
        dtype: Any,
        seed: Any,
        batch_size: int,
        most_bytes: int | None = None,
    ):
        if isinstance(batches, Iterator):
            raise DataError(
                f"data is a {type(batches).__name__}, which can be read only once; pass an object "
                "whose __iter__ "
                "begins anew each time, such as a torch DataLoader or a class of your own."
            )
        self._batches, self._dtype = batches, np.dtype(dtype)
        self._seed = [int(word) for word in np.ravel(np.asarray(jax.random.key_data(seed)))]
        self.num_data, self._fingerprint, self._example = self._survey()
        bytes_each = sum(
            math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in self._leaves(self._example)
        )
        self.max_batch = default_max_batch(self._example)
        most_bytes = WINDOW_BYTES if most_bytes is None else most_bytes
        self._steps = CHUNK * max(1, most_bytes // max(bytes_each, 1) // (batch_size * CHUNK))
        self.num_rows = min(self.num_data, self._steps * batch_size)
        self._held: tuple[int, Batch] | None = None

    def window(self, step: int) -> AbstractData:
        """Return `num_rows` uniform draws from the data, other ones once they are used up.

        All data if they fit.
        """
        number = step // self._steps
        if self._held is None or self._held[0] != number:
            self._held = None  # lets the old window go before the new one is made
            self._held = number, self._draw(number)
        examples = self._weighed(self._held[1])
        if self.num_rows == self.num_data:
            return Data(examples, self.max_batch)
        return Window(examples, self.max_batch, self.num_data)

    def _weighed(self, batch: Batch) -> Batch:
        if self.mean_weight is None:
            return batch
        return weigh_batch(batch, self.mean_weight, self._dtype)

    def _draw(self, number: int) -> Batch:
        if self.num_rows == self.num_data:
            wanted = np.arange(self.num_data)
        else:
            seed = [STREAM_SEED, *self._seed, number]
            wanted = np.random.default_rng(seed).integers(self.num_data, size=self.num_rows)
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        rows = jax.tree_util.tree_map(
            lambda leaf: np.empty((self.num_rows, *leaf.shape[1:]), leaf.dtype), self._example
        )
        seen = 0
        for batch in self._read():
            size = self._leaves(batch)[0].shape[0]
            first, last = np.searchsorted(ordered, (seen, seen + size))
            for target, source in zip(self._leaves(rows), self._leaves(batch), strict=True):
                target[order[first:last]] = source[ordered[first:last] - seen]
            seen += size
        return jax.tree_util.tree_map(jnp.asarray, rows)

    def pieces(self) -> Iterator[AbstractData]:
        """Yield all data in pieces of `max_batch` examples and a rest."""
        size, waiting, count = self.max_batch, [], 0
        for batch in self._read():
            waiting.append(batch)
            count += num_examples(batch)
            while count >= size:
                whole = _concatenate(waiting)
                yield self._piece(take_examples(whole, slice(size)))
                waiting, count = [take_examples(whole, slice(size, None))], count - size
        if count:
            yield self._piece(_concatenate(waiting))

    def _piece(self, batch: Batch) -> Data:
        held = jax.tree_util.tree_map(jnp.asarray, batch)
        return Data(self._weighed(held), self.max_batch)

    def _survey(self) -> tuple[int, int, Batch]:
        """Read all data once.

        Count, check and sum them up, and return one empty batch of their kind.
        """
        count, fingerprint, example = 0, 0, None
        for batch in self._cast_batches():
            leaves = self._leaves(batch)
            if not leaves or any(
                leaf.ndim == 0 or leaf.shape[0] != leaves[0].shape[0] for leaf in leaves
            ):
                raise DataError(
                    "all arrays of a batch need the same leading axis (examples); after "
                    f"{count} examples {kind_of(self._batches)} gave {_kind(batch, 0)}. Make it "
                    "give batches of arrays."
                )
            refuse_examples_in_a_list(batch)
            empty = take_examples(batch, slice(0))
            example = empty if example is None else example
            if _kind(empty) != _kind(example):
                raise DataError(
                    f"batches differ: {_kind(example)} first, {_kind(empty)} after {count} "
                    "examples."
                )
            count += leaves[0].shape[0]
            fingerprint += _fingerprint(leaves)
        if count == 0:
            raise DataError("data has no examples: the iterable of batches was empty.")
        return count, fingerprint, example

    def _read(self) -> Iterator[Batch]:
        """Read all data once more; refuse what differs from the first time."""
        count, fingerprint = 0, 0
        for batch in self._cast_batches():
            leaves = self._leaves(batch)
            count += leaves[0].shape[0]
            fingerprint += _fingerprint(leaves)
            yield batch
        if count != self.num_data:
            raise DataError(
                f"the iterable of batches gave {self.num_data} examples first and {count} later."
            )
        if fingerprint != self._fingerprint:
            raise DataError(
                "the iterable of batches gave other examples in a later pass than in the first, "
                "so that there is no "
                "one loss on all data. Switch augmentation, noise and drop_last off; the order "
                "may change."
            )

    def _cast_batches(self) -> Iterator[Batch]:
        for batch in self._batches:
            refuse_sparse(batch)
            yield jax.tree_util.tree_map_with_path(self._cast, batch)

    def _cast(self, path: Any, leaf: Any) -> np.ndarray:
        name = "batch" + jax.tree_util.keystr(path)
        return np.asarray(as_held(numeric(leaf, name), name, self._dtype))

    @staticmethod
    def _leaves(tree: Batch) -> list[np.ndarray]:
        return jax.tree_util.tree_leaves(tree)


def uncorrected(method: str | None) -> str:
    """Return the method of an estimate from a stream: "variational" unless reweighting was asked for.

    Raises:
        UnavailableError: If it is one that needs the gradient on all data, or much of it, at every
            step.
    """
    if method in ("auto", "sample"):
        raise UnavailableError(
            f"method={method!r} needs the data in memory, and they are streamed. Use "
            '"reweight" or "variational".'
        )
    return method or "variational"


def _kind(batch: Batch, axes: int = 1) -> str:
    return str(jax.tree_util.tree_map(lambda leaf: f"{leaf.dtype}{list(leaf.shape[axes:])}", batch))


def _fingerprint(leaves: list[np.ndarray]) -> int:
    """Sum a checksum of each example, which no other order or division into batches changes."""
    rows = [
        np.ascontiguousarray(leaf).reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
        for leaf in leaves
    ]
    return sum(map(zlib.crc32, np.concatenate([part.view(np.uint8) for part in rows], axis=1)))


def _concatenate(batches: list[Batch]) -> Batch:
    return jax.tree_util.tree_map(lambda *leaves: np.concatenate(leaves), *batches)
