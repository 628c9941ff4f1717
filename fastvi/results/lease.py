"""A lease: a file that says who works on something, and that he still lives.

It needs no locks, which file systems of clusters lack, or keep on each node apart. Its holder
renews the file's time; once that is older than the lease's own term, anybody may take it. Ages are
differences of two times of one file system, whatever the clocks of machines say.
"""

import contextlib
import json
import os
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fastvi.results import files

# Seconds without renewal after which a lease goes to whoever asks. Network file systems and
# machines that swap stand still for tens of seconds; double leaves the work of a dead node alone
# for twice as long.
SECONDS = 60.0
RENEWALS = 12  # in that time: a few may be late
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # a link could name anybody's file


class LeaseLostError(OSError):
    """Report that another process has taken a lease that was not renewed in time."""


class Lease:
    """A lease that this process has taken; a daemon thread renews it until it is released.

    Attributes:
        path: The file.
        token: What tells it from all other leases.
        seconds: Its term without renewal.
    """

    def __init__(self, path: Path, token: str, seconds: float):
        self.path, self.token, self.seconds = path, token, seconds

    @property
    def is_held(self) -> bool:
        """Whether nobody has taken it since."""
        try:
            return _look(self.path).token == self.token
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raise LeaseLostError unless it is held; to be called just before work is published."""
        if not self.is_held:
            raise LeaseLostError(
                f"another process has taken {self.path}, which this one did not renew for "
                f"{self.seconds:g} s"
            )

    def renew(self) -> None:
        """Give a sign of life, where the file system takes one."""
        # One that is away for a moment takes the next.
        with contextlib.suppress(OSError):
            if self.is_held:
                # Without a time given the file system sets its own, also over a network.
                os.utime(self.path)

    def release(self) -> None:
        """Give it back, unless another has it by now."""
        _RENEWER.discard(self)
        with contextlib.suppress(OSError):
            _withdraw(self.path, self.token)

    def __enter__(self) -> "Lease":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back."""
        self.release()


def take(path: Path, seconds: float = SECONDS) -> Lease | None:
    """Take a lease, or return None where a process that may live holds it.

    Args:
        path: The file, in a folder that is there.
        seconds: Its term without renewal.

    Raises:
        OSError: If the file cannot be written.
    """
    token = uuid.uuid4().hex
    content = {"token": token, "seconds": seconds, **_this_process()}
    while not _create(path, json.dumps(content)):
        try:
            seen = _look(path)
            if _lives(path, seen):
                return None
            # One process alone has the file that it has moved away.
            _withdraw(path, seen.token, seen.modified)
        except FileNotFoundError:
            continue
    lease = Lease(path, token, seconds)
    _RENEWER.add(lease)
    return lease


def holder_of(path: Path) -> str | None:
    """Say who holds a lease, living or not; None where nobody does."""
    try:
        holder = _look(path).holder
    except OSError:
        return None
    if "process" not in holder:
        return "another process"
    return f"process {holder['process']} on {holder.get('host')}"


def is_living(path: Path) -> bool:
    """Say whether there is a lease of a process that may live."""
    try:
        return _lives(path, _look(path))
    except FileNotFoundError:
        return False


class _Seen(NamedTuple):
    """What a lease's file says, and its time; a file without words is of nobody known."""

    token: str | None
    seconds: float
    holder: dict[str, Any]
    modified: float


def _look(path: Path) -> _Seen:
    # Opening a file is what makes a client of NFS ask the server for its time and content.
    handle = os.open(path, os.O_RDONLY | NO_FOLLOW)
    with os.fdopen(handle, "rb") as file:
        content = file.read(4096)
        modified = os.fstat(file.fileno()).st_mtime
    try:
        found = json.loads(content)
        # Its maker was interrupted before it wrote.
    except ValueError:
        found = {}
    holder = found if isinstance(found, dict) else {}
    seconds = holder.get("seconds")
    term = float(seconds) if isinstance(seconds, (int, float)) else SECONDS
    return _Seen(holder.get("token"), term, holder, modified)


def _lives(path: Path, seen: _Seen) -> bool:
    return not _has_died(seen.holder) and _now_beside(path) - seen.modified <= seen.seconds


def _create(path: Path, content: str) -> bool:
    """Make a file with this content at one stroke; False where there is one.

    A process that looks at it, or moves it away, finds all of the content.
    """
    whole = path.with_name(f"{files.PARTIAL}{uuid.uuid4().hex}")
    _write_new(whole, content)
    try:
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: there a file may be seen before its content
        return _write_new(path, content)
    finally:
        whole.unlink(missing_ok=True)
    return True


def _write_new(path: Path, content: str) -> bool:
    """Make a file, then write its content; False where there is one."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "w") as file:
            file.write(content)
    except OSError:
        # A full disk takes the name and not the words.
        path.unlink(missing_ok=True)
        raise
    return True


def _withdraw(path: Path, token: str | None, modified: float | None = None) -> None:
    """Remove the lease of this token, and if given this time; another one goes back."""
    aside = path.with_name(f"{files.PARTIAL}{uuid.uuid4().hex}")
    os.rename(path, aside)
    seen = _look(aside)
    if seen.token != token or (modified is not None and seen.modified != modified):
        # It was taken or renewed after it was looked at. Where a third process has made one
        # meanwhile, this one is lost, as its holder finds before it publishes.
        _create(path, json.dumps(seen.holder))
    aside.unlink(missing_ok=True)


def _now_beside(path: Path) -> float:
    """Return the time by the clock that a lease's file has its time from."""
    probe = path.with_name(f"{files.PARTIAL}{uuid.uuid4().hex}")
    _write_new(probe, "")
    try:
        os.utime(probe)
        return _look(probe).modified
    finally:
        probe.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _machine() -> str | None:
    """Name the running system and its space of process numbers; None where that is not known.

    Two containers of one host may have the same name, and the same numbers for other processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(process: int) -> str | None:
    """Return when a process began, in ticks of its system; "" if it has ended, None if unknown."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name before the last bracket may hold anything. Z is a process that nobody has waited for.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _has_died(holder: dict[str, Any]) -> bool:
    """Say whether the holder is a process of this system that has ended."""
    machine, process = _machine(), holder.get("process")
    if machine is None or holder.get("machine") != machine or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's, and alive
        return False
    # The number may be that of a later process.
    return _started(process) not in (None, holder.get("started"))


class _Renewer:
    """Renews the leases of this process from one thread, which ends with the last of them."""

    def __init__(self) -> None:
        self._held: list[Lease] = []
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        with self._lock:
            self._held.append(lease)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
                self._thread.start()
        # Its term may be shorter than those that the thread sleeps by.
        self._changed.set()

    def discard(self, lease: Lease) -> None:
        with self._lock:
            if lease in self._held:
                self._held.remove(lease)
        self._changed.set()

    def _run(self) -> None:
        while True:
            self._changed.clear()
            with self._lock:
                held = [*self._held]
                if not held:
                    self._thread = None
                    return
            for lease in held:
                lease.renew()
            self._changed.wait(min(lease.seconds for lease in held) / RENEWALS)


_RENEWER = _Renewer()
