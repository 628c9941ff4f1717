"""Where values of draws go: to memory, or to arrays on disk that a thread writes.

Each has its values by name, in arrays of shape (walkers, draws, ...).
"""

import abc
import collections
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from fastvi.observables.zarr_arrays import Shapes, ZarrArrays

# Bytes of a block of draws, after which it is written. Half writes twice as many files; double
# holds 16 MiB more, as a block is filled while another one is written.
BLOCK_BYTES = 2**23
# Draws of a block, at most, all of which are lost when a run is killed. Half writes the state of
# the walkers twice as often, double loses twice as much.
BLOCK_DRAWS = 16
# Bytes that wait for the disk before the walkers do. Half stops them sooner where the disk is slow
# at times; double is held in memory.
WAITING_BYTES = 2**23


class AbstractSink(abc.ABC):
    """Takes the values of draws, one draw of all walkers after the other."""

    names: tuple[str, ...]

    @property
    @abc.abstractmethod
    def done(self) -> int:
        """Count the draws that are there already, of each walker."""

    @abc.abstractmethod
    def seen(self, name: str) -> np.ndarray:
        """Return the values that are there already, shape (draws, walkers, ...)."""

    @abc.abstractmethod
    def put(self, name: str, draw: int, rows: slice, values: np.ndarray) -> None:
        """Take values of a draw: of all walkers, and of some rows of their first other axis."""

    @abc.abstractmethod
    def finish(self, draw: int, work: float, progress: Any) -> None:
        """Take note that a draw is complete, with the work so far and where the walkers are."""

    @abc.abstractmethod
    def close(self) -> None:
        """Wait until all is where it belongs."""


class MemorySink(AbstractSink):
    """Holds values in memory, in the type that they come in."""

    def __init__(self, walkers: int, draws: int, shapes: Shapes):
        self.names = tuple(shapes)
        self._shapes = {name: (walkers, draws, *shape) for name, shape in shapes.items()}
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def done(self) -> int:
        """Count none: a run in memory begins anew."""
        return 0

    def seen(self, name: str) -> np.ndarray:
        """Return none."""
        return np.empty((0, *self._shapes[name][:1], *self._shapes[name][2:]))

    def put(self, name: str, draw: int, rows: slice, values: np.ndarray) -> None:
        """Copy the values to their place."""
        if name not in self._arrays:
            self._arrays[name] = np.empty(self._shapes[name], values.dtype)
        into = self._arrays[name][:, draw]
        into[(slice(None), rows)[: into.ndim]] = values

    def finish(self, draw: int, work: float, progress: Any) -> None:
        """Need nothing: a run that is interrupted is gone."""

    def close(self) -> None:
        """Need nothing."""

    def array(self, name: str) -> np.ndarray:
        """Return the values of all draws."""
        return self._arrays[name]


class BlockWriter:
    """Runs jobs on a thread, one after the other; what one raises ends those behind it.

    It is raised to the caller at the next job, or at the end.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, "fastvi-draws")
        self._jobs: collections.deque[tuple[Future, int]] = collections.deque()

    def add(self, job: Callable[[], None], size: int) -> None:
        """Queue a job, and wait where more than `WAITING_BYTES` wait with it."""
        waiting = sum(bytes_of for _, bytes_of in self._jobs)
        while self._jobs and (self._jobs[0][0].done() or waiting + size > WAITING_BYTES):
            first, bytes_of = self._jobs.popleft()
            first.result()
            waiting -= bytes_of
        before = self._jobs[-1][0] if self._jobs else None
        self._jobs.append((self._pool.submit(_run_after, before, job), size))

    def wait(self) -> None:
        """Wait for all jobs."""
        while self._jobs:
            self._jobs.popleft()[0].result()

    def close(self) -> None:
        """Wait for all jobs, and take no more."""
        try:
            self.wait()
        finally:
            self._jobs.clear()
            self._pool.shutdown()


def _run_after(before: Future | None, job: Callable[[], None]) -> None:
    # a block whose values were not written must not be followed by one that says it is complete
    if before is not None:
        before.result()
    job()


def block_draws(walkers: int, draws: int, shapes: Shapes) -> int:
    """Return how many draws of each walker are written at once."""
    numbers = walkers * sum(math.prod(shape) for shape in shapes.values())
    by_size = BLOCK_BYTES // (np.dtype(np.float32).itemsize * max(numbers, 1))
    return max(1, min(by_size, BLOCK_DRAWS, draws))


class ZarrSink(AbstractSink):
    """Fills blocks of draws, which a thread writes.

    Args:
        arrays: Where to.
        names: What there is of each draw.
        done: Draws that are there already.
        draws: Draws that there will be.
        block: Draws of a block; one that begins within a block ends with it.
        copy: Copies to the host what walkers need to go on.
        save: `(draws, work, copied)` notes on the thread that so many draws are complete.
    """

    def __init__(
        self,
        arrays: ZarrArrays,
        names: tuple[str, ...],
        done: int,
        draws: int,
        block: int,
        copy: Callable[[Any], dict[str, np.ndarray]],
        save: Callable[[int, float, dict[str, np.ndarray]], None],
    ):
        self._arrays, self.names = arrays, names
        self._done, self._draws, self._block = done, draws, block
        self._copy, self._save, self._writer = copy, save, BlockWriter()
        self._buffers: dict[tuple[str, int], np.ndarray] = {}

    @property
    def done(self) -> int:
        """Count the draws that were there already."""
        return self._done

    def seen(self, name: str) -> np.ndarray:
        """Read the values that were there already."""
        return np.swapaxes(self._arrays[name][:, : self._done], 0, 1)

    def _ends(self, draw: int) -> tuple[int, int]:
        """Return the first draw of the block that a draw is in, and the first one behind it."""
        start = draw - draw % self._block
        return max(start, self._done), min(start + self._block, self._draws)

    def put(self, name: str, draw: int, rows: slice, values: np.ndarray) -> None:
        """Copy values to their block, which is written when it is full."""
        start, stop = self._ends(draw)
        if draw == start:
            # a kill loses one block at most: the one before is written while the first draw is made
            self._writer.wait()
        place = name, rows.start or 0
        if place not in self._buffers:
            shape = values.shape[0], stop - start, *values.shape[1:]
            self._buffers[place] = np.empty(shape, np.float32)
        self._buffers[place][:, draw - start] = values
        if draw + 1 == stop:
            full, target = self._buffers.pop(place), self._arrays[name]
            where = (slice(None), slice(start, stop), rows)[: full.ndim]
            self._writer.add(lambda: target.__setitem__(where, full), full.nbytes)

    def finish(self, draw: int, work: float, progress: Any) -> None:
        """Save the walkers at the end of a block."""
        if draw + 1 == self._ends(draw)[1]:
            copied = self._copy(progress)
            size = sum(leaf.nbytes for leaf in copied.values())
            self._writer.add(lambda: self._save(draw + 1, work, copied), size)

    def close(self) -> None:
        """Write the blocks that are full; the one that is not is lost."""
        self._writer.close()
