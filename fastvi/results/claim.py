"""Hold a folder for results before the work that fills it.

The number then has a place when it comes.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastvi._errors import ConfigError, DataError
from fastvi.results import files
from fastvi.results.lease import Lease, holder_of, take

LEASE_FILE = ".fastvi-lease"
# Begins the names of files that fastvi keeps beside results, and of what a killed process left.
# They say nothing of a folder's owner.
ASIDE = ".fastvi-"
ORIGIN_FILE = "run.json"  # what makes a folder fastvi's own
RUN, SWEEP = "fastvi run", "fastvi sweep"
TURN_SECONDS = 0.1  # between looks of a process that waits for its turn


class Claim(NamedTuple):
    """A folder that this process holds, and its lease, to be checked before files go there."""

    folder: Path
    lease: Lease


@contextlib.contextmanager
def claimed(folder: str | os.PathLike[str]) -> Iterator[Claim]:
    """Make a folder for a run that can be written and is free, and hold it while the block runs.

    Another process gets it after that, or when this one has died.

    Args:
        folder: The folder.

    Raises:
        ConfigError: If it cannot be had; the message says why and what to name instead.
    """
    with (
        prepared(folder, RUN) as folder,
        held(folder, "Name another folder with --out, or wait for it.") as lease,
    ):
        yield Claim(folder, lease)


@contextlib.contextmanager
def held(folder: Path, way_out: str) -> Iterator[Lease]:
    """Hold a folder while the block runs.

    Raises:
        ConfigError: If it cannot be written, or another process holds it.
    """
    lease = lease_in(folder, LEASE_FILE)
    if lease is None:
        holder = holder_of(folder / LEASE_FILE) or "another process"
        raise ConfigError(
            f"the folder {str(folder)!r} is being written by another fastvi ({holder!r}). {way_out}"
        )
    with lease:
        yield lease


@contextlib.contextmanager
def prepared(folder: str | os.PathLike[str], kind: str) -> Iterator[Path]:
    """Make a folder that belongs to nobody else.

    That is one that is new or empty, or whose run.json is of this kind. Folders that were made are
    removed again if the block leaves them empty.

    Args:
        folder: The folder.
        kind: `RUN` or `SWEEP`.

    Raises:
        ConfigError: If it cannot be had; the message says why and what to name instead.
    """
    folder = Path(folder)
    made = _make(folder)
    try:
        _check_owner(folder, kind)
        yield folder
    finally:
        for path in made:
            # rmdir refuses a folder that holds something by now, which is to stay.
            with contextlib.suppress(OSError):
                path.rmdir()


def lease_in(folder: Path, name: str, **term: float) -> Lease | None:
    """Take a lease in a folder, None where a process that may live holds it.

    Raises:
        ConfigError: If the folder cannot be written.
    """
    try:
        return take(folder / name, **term)
    except OSError as error:
        raise ConfigError(
            f"the folder {str(folder)!r} cannot be written: {files.first_line(error)}. "
            "Name another one with --out, where you may write."
        ) from error


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
    return sorted(name for name in names if not name.startswith(ASIDE))


def is_ours(folder: Path, kind: str) -> bool:
    """Say whether a folder's run.json says that fastvi wrote it, of any version."""
    try:
        return files.read_object(folder / ORIGIN_FILE, "").get("format") == kind
    except DataError:
        return False


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[Lease]:
    """Wait until no other process is in such a block, of those that share a folder."""
    while (lease := lease_in(folder, f"{LEASE_FILE}-turn")) is None:
        time.sleep(TURN_SECONDS)
    with lease:
        yield lease
