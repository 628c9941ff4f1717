"""Runs that are stopped keep their progress in the run folder, and the same command goes on."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastvi.results import files
from fastvi.results.resume import ProgressFolder, Stopped


class Terminated(BaseException):
    """SIGTERM came: what launchers send before they kill."""


@contextlib.contextmanager
def keeping(folder: Path, tell: Callable[[str], None]) -> Iterator[ProgressFolder]:
    """Yield where an estimate keeps its progress; signals wait until it has.

    Progress of other settings is replaced, since a run folder is rewritten anyway.

    Args:
        folder: The run folder.
        tell: Receives a line where the estimate goes on, or begins anew and why.

    Raises:
        KeyboardInterrupt: If SIGINT came.
        Terminated: If SIGTERM came.
    """
    progress = ProgressFolder(folder / files.PROGRESS, begins_anew=True, tell=tell)
    try:
        with _stoppable(progress):
            yield progress
    finally:
        # rmdir refuses a folder that holds progress, which is to stay.
        with contextlib.suppress(OSError):
            progress.path.rmdir()


@contextlib.contextmanager
def _stoppable(progress: ProgressFolder) -> Iterator[None]:
    """Ask an estimate to stop where a signal comes; a second signal does not wait for it."""
    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if came or not progress.ask_to_stop():
            raise _ended(number, progress)
        came.append(number)

    # Python lets the main thread alone handle signals.
    wanted = (signal.SIGINT, signal.SIGTERM) * (
        threading.current_thread() is threading.main_thread()
    )
    before = {number: signal.getsignal(number) for number in wanted}
    # What is ignored stays ignored, as under nohup; None is a handler that Python cannot put back.
    before = {
        number: handler
        for number, handler in before.items()
        if handler not in (signal.SIG_IGN, None)
    }
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    except Stopped as stopped:
        raise _ended(came[0], progress) from stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(number: int, progress: ProgressFolder) -> BaseException:
    """Return what ends the command, with the words on how to go on."""
    words = "the same command goes on from here" if progress.holds_progress else ""
    return KeyboardInterrupt(words) if number == signal.SIGINT else Terminated(words)
