"""Keep the estimates of a curve or of parts in a folder, one by one, and go on after the last."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Given
from fastvi.observables.covariance import Estimate
from fastvi.observables.split import Split
from fastvi.results import files
from fastvi.results.claim import held
from fastvi.results.estimate import LLCEstimate
from fastvi.target.identity import differing, list_changes

MEMBER_FILE = "member.json"
FORMAT, VERSION = "fastvi member", 1  # raised where the file's entries change their meaning
WAY_OUT = "Delete its folder, and the estimate is made again."


class Series:
    """A folder with a folder for each estimate that is finished; `folder` is None for none.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def find(self, name: str, identity: dict[str, Any]) -> tuple[LLCEstimate, Split | None] | None:
        """Return the estimate of this name and its split if it was finished.

        Args:
            name: Of the estimate.
            identity: What must be equal to what it was made of, by name.

        Raises:
            ConfigError: If it is one of something else.
            DataError: If a file of it is damaged.
        """
        if self.folder is None:
            return None
        place = self.folder / files.folder_name(name)
        if not os.path.lexists(place):
            return None
        path = place / MEMBER_FILE
        record = files.read_object(path, WAY_OUT)
        files.check_format(path, record, FORMAT, VERSION, WAY_OUT)
        kept, now = record.get("identity"), json.loads(json.dumps(identity))
        if not isinstance(kept, dict):
            raise files.damaged(path, "does not say what the estimate is of", WAY_OUT)
        # Both ways: what was given then may not be now.
        names = differing(now, kept) + [entry for entry in kept if entry not in now]
        if names:
            listed = list_changes(names, kept, dict.fromkeys(names) | now)
            raise ConfigError(
                f"{place} holds an estimate of something else: {listed}. Pass what it was begun "
                "with, or an empty folder."
            )
        return LLCEstimate.load(place), _read_split(path, record)

    def keep(
        self,
        name: str,
        identity: dict[str, Any],
        estimate: LLCEstimate,
        split: Split | None = None,
    ) -> None:
        """Write an estimate, whole or not at all; one that is not finite is made again."""
        if self.folder is None or not np.isfinite(estimate.llc):
            return
        parts = split and [[repr(float(one)) for one in part] for part in split]
        record = {"format": FORMAT, "version": VERSION, "identity": identity, "split": parts}
        with files.staged(self.folder) as staging:
            whole = estimate.save(staging / "whole")
            (whole / MEMBER_FILE).write_bytes(files.json_bytes(record))
            os.rename(whole, self.folder / files.folder_name(name))
            files.sync_folder(self.folder)


@contextlib.contextmanager
def held_series(folder: Given[str | os.PathLike[str] | None]) -> Iterator[Series]:
    """Make a folder for the estimates of a series, and hold it while the block runs.

    Without a folder nothing is kept.

    Raises:
        ConfigError: If it cannot be made or written, or another process holds it.
    """
    if folder is None:
        yield Series(None)
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"resume_from must be a folder, or one that can be made; got {str(folder)!r}: "
            f"{files.first_line(error)}"
        ) from error
    with held(path, "Wait for it, or pass another folder."):
        yield Series(path)


def _read_split(path: Path, record: dict[str, Any]) -> Split | None:
    parts = record.get("split")
    if parts is None:
        return None
    try:
        drift, spread = (Estimate(*(np.asarray(float(one)) for one in part)) for part in parts)
    except (TypeError, ValueError) as error:
        raise files.damaged(path, "has an impossible split", WAY_OUT) from error
    return Split(drift, spread)
