"""A status line on stderr for long work, without a dependency."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from fastvi._modes import call_in_their_modes
from fastvi._numbers import with_error
from fastvi._typing import Given
from fastvi.fitting.protocols import Progress
from fastvi.results.terminal import is_notebook, is_terminal, write_text

# Seconds between redraws of a terminal's line. Half writes twice as often; 1 s looks stuck.
MIN_SECONDS = 0.2
# Seconds between lines of a log, which keeps them all.
LOG_SECONDS = 10.0
# What a stage tells beside its name. The other stages have no steps of their own.
TOLD = {
    "data": " {step:,} examples read into memory",
    "fit": " {step}/{steps} steps, elbo {value:.2f}",
    "draws": " {step}/{steps} of each walker, llc {value:.4g}",
    "sweep": " {step}/{steps} runs done, {value:.0f} jobs",
}
# What sampling tells, whatever the stage is called.
SAMPLING = " {share} % of the budget, llc {llc}"
# Carriage return, and the sequence that terminals clear a line by (ECMA-48, EL).
CLEARED = "\r\x1b[K"
# Notebooks go back to the beginning of a line too, and overwrite as many letters as come.
OVERWRITTEN = "\r{:<79}"
# Share of a stage after which its speed says when it ends. Half of it says so from the first round,
# which compiles; double leaves the reader waiting.
KNOWN_SHARE = 0.02


class StatusLine:
    """Show stage, step and value on one line, redrawn in a terminal or a notebook.

    Elsewhere lines are printed, sparsely. A stream that cannot be written ends the showing, not the
    work.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.redrawn = _redrawn(self.stream)
        self.began = time.monotonic()
        self.shown = -math.inf  # the first report is shown at once
        self.stage = ""
        self.first = 0.0, 0  # when the stage began, and at which step

    def __call__(self, progress: Progress) -> None:
        """Redraw if the stage changed or enough time went by."""
        now = time.monotonic()
        pause = MIN_SECONDS if self.redrawn else LOG_SECONDS
        if progress.stage == self.stage and now - self.shown < pause:
            return
        if progress.stage != self.stage:
            self.first = now, progress.step
        self.stage, self.shown = progress.stage, now
        left = self._seconds_left(progress, now)
        ahead = "" if left is None else f", {format_seconds(left)} left"
        spent = format_seconds(now - self.began)
        text = f"fastvi: {progress.stage}{_numbers(progress)}{ahead} [{spent}]"
        self._write(self.redrawn.format(text) if self.redrawn else f"{text}\n")

    def _seconds_left(self, progress: Progress, now: float) -> float | None:
        """Return the seconds that a stage may still take, by its speed so far."""
        began, first = self.first
        done, ahead = progress.step - first, progress.expected
        if ahead is None or done <= KNOWN_SHARE * (ahead - first) or ahead <= first:
            return None
        return (now - began) * (ahead - progress.step) / done

    def __enter__(self) -> "StatusLine":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the line, however the work ended."""
        if self.redrawn and self.stage:
            self._write(self.redrawn.format(""))

    def _write(self, text: str) -> None:
        if self.stream is not None and write_text(self.stream, text) is not None:
            self.stream, self.redrawn = None, ""


def _redrawn(stream: TextIO | None) -> str:
    """Return how a line takes the place of the one before; nothing where none can."""
    if is_terminal(stream):
        return CLEARED + "{}"
    return OVERWRITTEN if is_notebook(stream) else ""


def _numbers(progress: Progress) -> str:
    """Return what a stage tells beside its name."""
    told = TOLD.get(progress.stage)
    if told is not None:
        return told.format_map(progress._asdict())
    if not progress.steps or math.isnan(progress.value):
        return ""
    llc = f"{progress.value:.4g}"
    if math.isfinite(progress.error):
        llc = with_error(progress.value, progress.error)
    share = 100 * progress.step / progress.steps
    return SAMPLING.format(share=f"{share:.0f}" if share >= 1 else "<1", llc=llc)


def format_seconds(seconds: float) -> str:
    """Write a duration in the units that a person would use: `42 s`, `3 min`, `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


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


def tell_sampling(
    report: Callable[[Progress], None] | None,
    stage: str,
    unit: float,
    budget: float,
    error: float,
) -> Callable[[float, float, float], None]:
    """Return what walkers tell: the work so far, llc and its error.

    Args:
        report: Who is told.
        stage: Name of the stage.
        unit: Sample gradients of a unit of the reported work.
        budget: Sample gradients, at most.
        error: Standard error at which the walk ends, relative to llc.
    """

    def tell(work: float, llc: float, sem: float) -> None:
        if report is None:
            return
        # the error falls as the root of the work
        wanted = work * (sem / (error * abs(llc))) ** 2 if error * abs(llc) > 0 else math.nan
        expected = min(max(work, wanted), budget) / unit if math.isfinite(wanted) else None
        report(Progress(stage, int(work / unit), int(budget / unit), llc, sem, expected))

    return tell


def told_of_reading(report: Callable[[Progress], None]) -> Callable[[int], None]:
    """Return what is told the number of examples read so far, of data that are read into memory."""

    def tell(count: int) -> None:
        report(Progress("data", count, count, math.nan))

    return tell
