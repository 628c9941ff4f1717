"""A status line on stderr for long work, without a dependency."""

import sys
import time
from typing import TextIO

from fastvi.inference.driver import Progress

MIN_SECONDS = 0.2  # between redraws


class StatusLine:
    """Show stage, step and ELBO on one line, redrawn in a terminal and printed sparsely elsewhere."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.interactive = self.stream.isatty()
        self.began = time.monotonic()
        self.shown = -1e9
        self.stage = ""

    def __call__(self, progress: Progress) -> None:
        """Redraw if the stage changed or enough time went by."""
        now = time.monotonic()
        pause = MIN_SECONDS if self.interactive else 10.0
        if progress.stage == self.stage and now - self.shown < pause:
            return
        self.stage, self.shown = progress.stage, now
        text = f"fastvi: {progress.stage}"
        if progress.stage == "fit":
            text += f" {progress.step}/{progress.steps} steps, elbo {progress.value:.2f}"
        if progress.stage == "correction":
            text += f" {progress.step}/{progress.steps} FGE at most, llc {progress.value:.4g}"
        text += f" [{now - self.began:.0f} s]"
        self.stream.write(f"\r\x1b[K{text}" if self.interactive else f"{text}\n")
        self.stream.flush()

    def close(self) -> None:
        """End the line."""
        if self.interactive and self.stage:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
