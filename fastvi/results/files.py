"""Files that are whole or not there, and reading of files that may be anything."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import stat
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from fastvi._errors import DataError
from fastvi._processes import is_first

PARTIAL = ".fastvi-partial-"  # begins the names of files and folders that are not finished
PROGRESS = ".fastvi-progress"  # folder of a run that is not finished, in its run folder
# Seconds after which such a one is what a killed process left. The longest write takes minutes;
# a larger number leaves its bytes on the disk for longer.
ABANDONED = 3600.0

LONGEST_NAME = 150  # of a folder that text names; file systems take 255

# What zipfile, its decompressors and numpy raise on bytes that are no archive of arrays.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    EOFError,
    MemoryError,  # a header that claims an array of terabytes
    NotImplementedError,
    OverflowError,
    RuntimeError,  # an encrypted archive
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def folder_name(text: str, kept: str = ",=[]+ '") -> str:
    """Return the name of a folder for this text, different where texts are.

    Args:
        text: It may hold a slash, or a letter that some file system refuses.
        kept: Letters that are left as they are, beside the plain ones.
    """
    name = quote(text, safe=kept)
    if len(name) <= LONGEST_NAME:
        return name
    # Names that begin alike are told apart by their digest.
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def damaged(path: Path, wrong: str, fix: str) -> DataError:
    """Word every error of a file: the file, what is wrong with it, the way out."""
    return DataError(f"{path} {wrong}. {fix}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def read_bytes(path: Path, fix: str) -> bytes:
    """Read a regular file.

    Raises:
        DataError: If it is missing, no file, or cannot be read.
    """
    try:
        mode = path.stat().st_mode
        # A pipe would wait for ever, and a device may never end.
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise damaged(path, f"is {what} where a file is wanted", fix)
        return path.read_bytes()
    except FileNotFoundError as error:
        is_link = "a link to a file that does not exist" if path.is_symlink() else "missing"
        raise damaged(path, f"is {is_link}", fix) from error
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read ({first_line(error)})", fix) from error


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """Read a JSON object whose names are all different, or raise DataError."""
    try:
        text = read_bytes(path, fix).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"is not UTF-8 text ({first_line(error)})", fix) from error
    if not text.strip():
        raise damaged(path, "is empty: it was not written to its end", fix)
    try:
        # Python's json takes the last of two equal names, and NaN, neither of which JSON has.
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    # A file of ten thousand brackets is a RecursionError.
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"is no JSON, or not all of it ({first_line(error)})", fix) from error
    if not isinstance(found, dict):
        raise damaged(path, f"holds a {type(found).__name__} where an object is wanted", fix)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"{next(name for name in names if names.count(name) > 1)!r} is given twice"
        )
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def check_format(path: Path, found: Mapping[str, Any], name: str, version: int, fix: str) -> None:
    """Raise DataError unless a file says that it is of this format and version."""
    if found.get("format") != name:
        raise damaged(path, f"is not of the format {name!r}, as fastvi writes it", fix)
    given = found.get("version")
    # A bool is an int to Python, and True would pass for version 1.
    if isinstance(given, bool) or not isinstance(given, int):
        raise damaged(path, f"has no version of the format that could be read: {given!r}", fix)
    if given != version:
        age, fix = ("", "Upgrade fastvi.") if given > version else ("the old ", fix)
        wrong = f"is of {age}version {given} of its format, this fastvi reads {version}"
        raise damaged(path, wrong, fix)


def read_arrays(path: Path, fix: str) -> dict[str, np.ndarray]:
    """Read an .npz file of plain arrays; nothing in it is unpickled.

    Raises:
        DataError: If it is missing, damaged, or holds anything but arrays of numbers and text.
    """
    content: Any = io.BytesIO(read_bytes(path, fix))
    try:
        with np.lib.npyio.NpzFile(content, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except _UNREADABLE as error:
        wrong = f"is no archive of arrays, or not all of it ({first_line(error)})"
        raise damaged(path, wrong, fix) from error
    for name, array in arrays.items():
        # A member that is no .npy file comes back as its bytes.
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiubU":
            raise damaged(path, f"holds {name!r}, which is no array of numbers", fix)
    return arrays


def digest_arrays(arrays: Mapping[str, Any]) -> str:
    """Condense names, dtypes, shapes and numbers, whatever archive they lie in."""
    digest = hashlib.sha256()
    # An archive may hold the same arrays in any order.
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Write an object as JSON for people to read too."""
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def digest_bytes(content: bytes) -> str:
    """Condense a file's bytes."""
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Make a folder inside `folder` for files that are not finished, under a unique name.

    It is on the same file system, so that `publish` can move its files, and is removed afterwards.
    """
    remove_abandoned(folder)
    # A name of its own keeps two processes in one folder apart.
    staging = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, folder: Path, names: Sequence[str]) -> None:
    """Move finished files to their places.

    The last is the mark that the others are complete and of one kind.

    They are on the disk before the mark is withdrawn, and in their places before it comes back: a
    kill or a power cut at any moment leaves the old files, the new ones, or no mark. A link in a
    file's place is replaced, not followed.

    Of several processes that run one program, the first alone moves anything.
    """
    if not is_first():
        return
    for name in names:
        # Windows syncs a file only where it is open for writing.
        with open(staging / name, "rb+") as file:
            os.fsync(file.fileno())
    # A file alone is replaced at one stroke, and needs no mark.
    if len(names) > 1:
        (folder / names[-1]).unlink(missing_ok=True)
        sync_folder(folder)
    for name in names:
        # A power cut may otherwise keep the mark and lose the name of a file before it.
        if name == names[-1]:
            sync_folder(folder)
        os.replace(staging / name, folder / name)
    sync_folder(folder)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there once it is on the disk."""
    with staged(path.parent) as staging:
        (staging / path.name).write_bytes(content)
        publish(staging, path.parent, (path.name,))


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    # Windows opens no folders, and some network file systems sync none.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed left behind."""
    for path in folder.glob(f"{PARTIAL}*"):
        # Another process may remove the same folder meanwhile.
        with contextlib.suppress(OSError):
            # lstat, so that a link tells its own age and not that of what it names.
            if time.time() - path.lstat().st_mtime > ABANDONED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
