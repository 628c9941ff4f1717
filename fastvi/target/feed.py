"""Examples that arrive: a few at a time, in their order, read ahead by a thread."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from fastvi._processes import is_several
from fastvi._typing import Batch
from fastvi.target.losses import num_examples, take_examples


class Feed:
    """Examples in the order in which they arrive, as many at a time as are asked for.

    A thread reads the next batch while the last one is used. Memory: two batches, and what was
    asked for. Of several processes, which exchange what they read, none reads ahead.

    Args:
        batches: Gives the examples.
        behind: Returns the batches behind so many examples, of data that can be read again.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        behind: Callable[[int], Iterator[Batch]] | None = None,
    ):
        self._batches, self._waiting, self._behind = batches, [], behind
        # One thread, because an iterator gives its batches in order and to one caller at a time.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fastvi-feed")
        self._next = self._read_next()

    def peek(self, count: int) -> Batch | None:
        """Return the next examples, fewer than asked for where there are no more."""
        while sum(map(num_examples, self._waiting)) < count:
            batch = self._next()  # what the person's iterator raises comes out here
            if batch is None:
                break
            self._waiting.append(batch)
            self._next = self._read_next()
        if not self._waiting:
            return None
        self._waiting = [concatenate(self._waiting)]
        return take_examples(self._waiting[0], slice(count))

    def take(self, count: int) -> Batch | None:
        """Return the next examples and pass on, or None where there are fewer."""
        found = self.peek(count)
        if found is None or num_examples(found) < count:
            return None
        self._waiting = [take_examples(self._waiting[0], slice(count, None))]
        return found

    def restart(self, count: int) -> None:
        """Go on behind the first `count` examples of all, of data that can be read again."""
        assert self._behind is not None, "data that are read once cannot be read again"
        self._batches, self._waiting = self._behind(count), []
        # what the reader has read ahead is let go
        self._next = self._read_next()

    def _read_next(self) -> Callable[[], Batch | None]:
        """Begin to read the next batch, and return what waits for it."""
        if is_several():  # an exchange, which all processes make in the order of their programs
            return lambda: next(self._batches, None)
        return self._reader.submit(next, self._batches, None).result

    def close(self) -> None:
        """Read no more."""
        # The reader may be in the person's iterator, which nothing can interrupt.
        self._reader.shutdown(wait=False, cancel_futures=True)


def concatenate(batches: list[Batch]) -> Batch:
    """Return one batch of the examples of several."""
    return jax.tree_util.tree_map(lambda *leaves: np.concatenate(leaves), *batches)
