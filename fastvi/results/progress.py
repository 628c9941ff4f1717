"""A status line on stderr for long work, without a dependency."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from fastvi._modes import call_in_their_modes
from fastvi._typing import Given
from fastvi.fitting.protocols import Progress
from fastvi.results.terminal import is_terminal, write_text

# Seconds between redraws of a terminal's line. Half writes twice as often; 1 s looks stuck.
MIN_SECONDS = 0.2
# Seconds between lines of a log, which keeps them all.
LOG_SECONDS = 10.0
# What a stage tells beside its name. The other stages have no steps of their own.
TOLD = {
    "data": " {step:,} examples read into memory",
    "fit": " {step}/{steps} steps, elbo {value:.2f}",
    "correction": " {step}/{steps} FGE at most, llc {value:.4g}",
    "draws": " {step}/{steps} of each walker, llc {value:.4g}",
    "sweep": " {step}/{steps} runs done, {value:.0f} jobs",
    "walk": " {step:,}/{steps:,} sample gradients at most, llc {value:.4g}",
}
# Carriage return, and the sequence that terminals clear a line by (ECMA-48, EL).
CLEARED = "\r\x1b[K"


class StatusLine:
    """Show stage, step and value on one line, redrawn in a terminal and printed sparsely elsewhere.

    A stream that cannot be written ends the showing, not the work.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.interactive = is_terminal(self.stream)
        self.began = time.monotonic()
        self.shown = -math.inf  # the first report is shown at once
        self.stage = ""

    def __call__(self, progress: Progress) -> None:
        """Redraw if the stage changed or enough time went by."""
        now = time.monotonic()
        pause = MIN_SECONDS if self.interactive else LOG_SECONDS
        if progress.stage == self.stage and now - self.shown < pause:
            return
        self.stage, self.shown = progress.stage, now
        numbers = TOLD.get(progress.stage, "").format_map(progress._asdict())
        text = f"fastvi: {progress.stage}{numbers} [{now - self.began:.0f} s]"
        self._write(f"{CLEARED}{text}" if self.interactive else f"{text}\n")

    def __enter__(self) -> "StatusLine":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the line, however the work ended."""
        if self.interactive and self.stage:
            self._write(CLEARED)

    def _write(self, text: str) -> None:
        if self.stream is not None and write_text(self.stream, text) is not None:
            self.stream, self.interactive = None, False


def reporting(
    progress: Given[bool | Callable[[Progress], None]],
) -> contextlib.AbstractContextManager[Callable[[Progress], None] | None]:
    """Return the context that yields what a stage reports to.

    True gives a status line, which ends however the stage ends. A function is the caller's own.
    """
    if progress is True:
        return StatusLine()
    if not callable(progress):
        return contextlib.nullcontext(None)
    return contextlib.nullcontext(functools.partial(call_in_their_modes, progress))


def told_of_reading(report: Callable[[Progress], None]) -> Callable[[int], None]:
    """Return what is told the number of examples read so far, of data that are read into memory."""

    def tell(count: int) -> None:
        report(Progress("data", count, count, math.nan))

    return tell
