"""Hold a folder for results before the work that fills it.

The number then has a place when it comes.
"""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from fastvi._errors import ConfigError, DataError
from fastvi.results import files

LOCK_FILE = ".fastvi.lock"
ORIGIN_FILE = "run.json"  # what makes a folder fastvi's own
RUN, SWEEP = "fastvi run", "fastvi sweep"
# Begin the names of what a process that was killed leaves, which says nothing of the owner.
UNFINISHED = (files.PARTIAL, files.PROGRESS, LOCK_FILE)
# What flock says of a file that somebody holds. Where a file system emulates it by locks on ranges
# of bytes, as NFS does, POSIX allows either of the first two.
BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


@contextlib.contextmanager
def claimed(
    folder: str | os.PathLike[str],
    kind: str = RUN,
    *,
    below_ours: bool = False,
    shared: bool = False,
) -> Iterator[Path]:
    """Make a folder that can be written and is free, and hold it while the block runs.

    A folder is free if it is new or empty, or if its run.json is of this kind. Folders that were
    made are removed again if the block leaves them empty. On Windows, and on file systems without
    locks, two processes are not told apart.

    Args:
        folder: The folder.
        kind: `RUN` or `SWEEP`.
        below_ours: Whether it lies in a sweep that this process holds, hence is ours whatever state
            it is in.
        shared: Whether others may hold it too who share it; nobody may who does not.

    Raises:
        ConfigError: If it cannot be had; the message says why and what to name instead.
    """
    folder = Path(folder)
    made = _make(folder)
    try:
        if not below_ours:
            _check_owner(folder, kind)
        with _locked(folder, shared):
            yield folder
    finally:
        for path in made:
            # rmdir refuses a folder that holds something by now, which is to stay.
            with contextlib.suppress(OSError):
                path.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder and return what had to be made, innermost first."""
    try:
        # A dangling link is there, whatever `exists` says, and was not made here.
        missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = (
            "a file is in its place"
            if isinstance(error, FileExistsError)
            else files.first_line(error)
        )
        raise ConfigError(
            f"the folder {str(folder)!r} cannot be made: {reason}. Name another one with --out, "
            "where you may write."
        ) from error
    return missing


def _check_owner(folder: Path, kind: str) -> None:
    try:
        held = held_by(folder)
    except OSError as error:
        raise ConfigError(
            f"the folder {str(folder)!r} cannot be read: {files.first_line(error)}."
        ) from error
    if held and not is_ours(folder, kind):
        shown = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        what = "no sweep" if kind == SWEEP else "no run"
        raise ConfigError(
            f"the folder {str(folder)!r} is {what} of fastvi and holds {shown}, which would be "
            f"written over. Name an empty or a new folder, for example --out {folder / 'llc'!s}."
        )


def held_by(folder: Path) -> list[str]:
    """Name what a folder holds, but for what is not finished."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if not name.startswith(UNFINISHED))


def is_ours(folder: Path, kind: str) -> bool:
    """Say whether a folder's run.json says that fastvi wrote it, of any version."""
    try:
        return files.read_object(folder / ORIGIN_FILE, "").get("format") == kind
    except DataError:
        return False


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block, of those that share a folder."""
    path = folder / f"{LOCK_FILE}.turn"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        _take(handle, waits=True)
        yield
    finally:
        os.close(handle)  # the file stays, as others wait for it


@contextlib.contextmanager
def _locked(folder: Path, shared: bool) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a process that dies."""
    path = folder / LOCK_FILE
    handle = _open_lock(path, shared)
    try:
        # On a full disk the lock holds without the words.
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        # The lock is still held here, else another process could lock the file that then goes.
        # Others may hold a shared one, by this file.
        if not shared:
            path.unlink(missing_ok=True)
        os.close(handle)


def _open_lock(path: Path, shared: bool) -> int:
    while True:
        try:
            # O_NOFOLLOW: a link in a folder of somebody else's could name any file to truncate.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise ConfigError(
                f"the folder {str(path.parent)!r} cannot be written: {files.first_line(error)}. "
                "Name another one with --out, where you may write."
            ) from error
        if not _take(handle, shared):
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise ConfigError(
                f"the folder {str(path.parent)!r} is being written by another fastvi ({holder!r}). "
                "Name another folder with --out, or wait for it."
            )
        if _is_still(path, handle):
            return handle
        os.close(handle)  # its holder has just removed it


def _take(handle: int, shared: bool = False, waits: bool = False) -> bool:
    """Lock an open file; False where another process holds it, and none is waited for."""
    if sys.platform == "win32":
        return True
    # Windows has no such module.
    import fcntl

    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(handle, kind if waits else kind | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no locks
        return error.errno not in BUSY
    return True


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
