"""When an estimate ends with what it has: at a time limit, or where somebody presses Ctrl-C."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator

from fastvi._errors import ConfigError
from fastvi._processes import agree, is_several
from fastvi.results.terminal import warn


class EarlyEnd:
    """Says, when called, whether to end with what there is; once it has, it always does.

    Args:
        time_limit: Seconds from now on; None for no limit.

    Attributes:
        reason: Why it was said to end; None before.

    Raises:
        ConfigError: If the limit is not a positive number.
    """

    def __init__(self, time_limit: float | None = None):
        is_number = isinstance(time_limit, (int, float)) and not isinstance(time_limit, bool)
        if time_limit is not None and not (is_number and time_limit > 0):
            raise ConfigError(
                f"time_limit must be a positive number of seconds; got {time_limit!r}. Leave it "
                "out for no limit."
            )
        self.limit = time_limit
        self.deadline = time.monotonic() + (math.inf if time_limit is None else time_limit)
        self.reason: str | None = None

    def __call__(self) -> bool:
        """Say whether to end; all processes are told the same."""
        if self.reason is None and self.limit is not None:
            is_late = time.monotonic() >= self.deadline
            # clocks differ, and processes must go on alike
            if agree(is_late):
                self.reason = f"its time_limit of {self.limit:g} s"
        return self.reason is not None

    @contextlib.contextmanager
    def interruptible(self, *, tells: bool) -> Iterator[None]:
        """End where Ctrl-C is pressed, and raise KeyboardInterrupt where it is pressed again.

        Handlers of others are left alone, and several processes, of which one alone is told.

        Args:
            tells: Whether to say on stderr what has happened.
        """
        is_free = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
            and not is_several()
        )
        if not is_free:
            yield
            return

        def handle(number: int, frame: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.reason = "Ctrl-C"
            if tells:
                warn("\nfastvi: ends with what there is; Ctrl-C again stops at once")

        signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
