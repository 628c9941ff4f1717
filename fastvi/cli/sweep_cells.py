"""The cells of a sweep: kept, run, and published once, by whichever process has the lease.

A round is what processes do together that run one sweep at the same time. In a round each cell is
looked at once: the folder of its run says what became of it, or, of one that failed, a file beside.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fastvi._errors import ConfigError, DataError, NonFiniteError, UnavailableError
from fastvi.cli.llc import estimate_origin, observe_problem
from fastvi.cli.sweep_plan import Cell, SweepPlan
from fastvi.cli.table import describe
from fastvi.cli.target import ModelArguments, load, read_params, restrict_to_parts
from fastvi.config import VIConfig
from fastvi.demos.base import Say
from fastvi.results import files
from fastvi.results.claim import ASIDE, ORIGIN_FILE, held_by, lease_in
from fastvi.results.estimate import LLCEstimate
from fastvi.results.lease import Lease, LeaseLostError, is_living
from fastvi.results.runs import CONTENTS, read_record, read_settings, write_run_somewhere
from fastvi.results.terminal import warn
from fastvi.target.identity import differing

# Columns of a run, as `describe` fills them; a run that failed has dashes.
COLUMNS = ("llc", "q alone", "elbo", "k-hat", "FGE", "s", "findings")
LEASES, FAILED = f"{ASIDE}leases", f"{ASIDE}failed"  # folders in that of a sweep
CELL_FILE = "cell.json"
CELL, VERSION = "fastvi cell", 1  # the format of that file
OF_A_RUN = {*CONTENTS, CELL_FILE, "diagnostics"}  # what is written anew with a run

# What one run may fail with while the others are none the worse: a setting that its problem
# refuses, data that it cannot use, a divergence, or a device that has not the memory for it.
FAILURES = (ConfigError, DataError, NonFiniteError, UnavailableError, jax.errors.JaxRuntimeError)


class Numbers(NamedTuple):
    """What the figure shows of a run; `elbo` is NaN where nothing was fitted."""

    llc: float
    llc_sem: float
    fge: float
    elbo: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a cell: its columns of the table, words, and numbers if there are any.

    It holds no estimate: a sweep may have thousands.
    """

    columns: dict[str, str]
    words: str
    numbers: Numbers | None = None
    failed: bool = False

    def row(self, cell: Cell) -> dict[str, str]:
        """Return the row of the table."""
        return cell.shown | self.columns


NO_RUN = Outcome(dict.fromkeys(COLUMNS, "-") | {"findings": "no run yet"}, "no run yet")


class Problems:
    """What the cells of a sweep estimate on; the parameters of one checkpoint are kept at a time.

    The target's function is called once: the loss is then the same one to the compiled programs of
    all checkpoints and parts.

    Raises:
        ConfigError: As for `load`.
        DataError: As for `load`.
    """

    def __init__(self, plan: SweepPlan):
        self._parts = plan.parts
        self._own = load(plan.target)
        self._last: tuple[Any, dict[str | None, ModelArguments]] | None = None
        self._seen: dict[Any, dict[str, Any]] = {}

    def of(self, cell: Cell) -> ModelArguments:
        """Return what a cell estimates on."""
        params, part = cell.origin.params, cell.origin.part
        if self._last is None or self._last[0] != params:
            self._last = None  # let go before the next is read
            problem = self._own
            if params is not None:
                problem = problem._replace(params=read_params(params, problem.params))
            self._last = params, {None: problem}
        found = self._last[1]
        name = None if part is None else next(iter(part))
        if part is not None and name not in found:
            # Of all parts at once, for those of one shape share programs.
            found |= restrict_to_parts(found[None], self._parts or part)
        return found[name]

    def observe(self, cell: Cell) -> dict[str, Any]:
        """Say what a cell's problem computes, which depends on no other setting than the dtype."""
        part = None if cell.origin.part is None else next(iter(cell.origin.part))
        key = cell.origin.params, part, cell.config.dtype
        if key not in self._seen:
            self._seen[key] = observe_problem(self.of(cell), VIConfig(dtype=cell.config.dtype))
        return self._seen[key]


@dataclasses.dataclass(frozen=True)
class Workplace:
    """The folder of a sweep, in one round.

    Attributes:
        folder: The folder.
        round: Name of the round.
        seconds: Term of the leases of cells.
    """

    folder: Path
    round: str
    seconds: float

    def check(self) -> None:
        """Raise ConfigError where another round has begun, while this process stood still."""
        if files.read_object(self.folder / ORIGIN_FILE, "").get("round") != self.round:
            raise ConfigError(
                f"another sweep has begun in {str(self.folder)!r}, as this process gave no sign of "
                "life. Start it again to join."
            )

    def find(self, cell: Cell) -> Outcome | None:
        """Return what became of a cell in this round, as any process has left it."""
        failure = self._read(self.folder / FAILED / cell.name)
        return failure or self._read(self.folder / cell.name / CELL_FILE)

    def is_held(self, cell: Cell) -> bool:
        """Say whether a process that may live has a cell."""
        return is_living(self.folder / LEASES / cell.name)

    def settle(
        self, cell: Cell, problems: Problems, tell: Say, *, progress: bool
    ) -> Outcome | None:
        """Keep the run of a cell that is there and was asked for in the same way, or run it.

        Args:
            cell: The cell.
            problems: What is estimated on.
            tell: Receives a line where a run that was stopped goes on.
            progress: Whether to show a status line.

        Returns:
            What became of it, a failure too; None where another process has it.

        Raises:
            ConfigError: If the folder cannot be written, or another round has begun in it.
        """
        found = self.find(cell)
        if found is not None:
            return found
        self.check()
        lease = lease_in(self.folder / LEASES, cell.name, seconds=self.seconds)
        if lease is None:
            return None
        with lease:
            # Another process may have ended it since.
            found = self.find(cell) or self._keep_or_run(cell, problems, lease, tell, progress)
            # rmdir refuses what holds a run or progress
            with contextlib.suppress(OSError):
                (self.folder / cell.name).rmdir()
            return found

    def _keep_or_run(
        self, cell: Cell, problems: Problems, lease: Lease, tell: Say, progress: bool
    ) -> Outcome | None:
        place = self.folder / cell.name
        try:
            fingerprint = problems.observe(cell)
            if os.path.lexists(place) and not place.is_dir():
                raise ConfigError(f"{place} is in the place of a run's folder. Move it away.")
            # progress alone is no run
            before = _identity(place) if place.is_dir() and held_by(place) else None
            place.mkdir(exist_ok=True)  # its progress is kept there
            kept, reason = finished(place, cell, fingerprint)
            if kept is not None:
                outcome = outcome_of(kept, "kept, ")
                # Where it cannot be noted, other processes look for themselves.
                with contextlib.suppress(OSError):
                    files.replace_file(place / CELL_FILE, self._record(outcome))
                return outcome
            began = time.perf_counter()
            result = estimate_origin(
                problems.of(cell),
                cell.origin,
                cell.config,
                place,
                progress=progress,
                tell=lambda line: tell(f"{cell.name}: {line}"),
            )
        except FAILURES as error:
            return self._record_failure(cell, error)
        after = f", {time.perf_counter() - began:.0f} s"
        outcome = outcome_of(result, f"{reason}, " if reason else "", after)
        return self._publish(cell, result, fingerprint, outcome, lease, before)

    def _publish(
        self,
        cell: Cell,
        result: LLCEstimate,
        fingerprint: dict[str, Any],
        outcome: Outcome,
        lease: Lease,
        before: tuple[int, int] | None,
    ) -> Outcome | None:
        """Move a run that is whole to its place, unless another process has taken the lease.

        A process that stood still and comes back between the check and the move finds the place
        filled: a folder moves to none that holds something.
        """
        place, trouble = self.folder / cell.name, None
        try:
            with files.staged(self.folder) as staging:
                new, old = staging / "new", staging / "old"
                written = write_run_somewhere(result, new, cell.origin, cell.config, fingerprint)
                trouble = written.trouble and written.trouble.replace(str(new), str(place))
                if trouble is None:
                    (new / CELL_FILE).write_bytes(self._record(outcome))
                    _copy_foreign(place, new)
                    lease.check()
                    if before is None:
                        _remove_progress(place)
                    elif not _move_away(place, old, before):
                        return None
                    os.rename(new, place)
                    files.sync_folder(self.folder)
        except LeaseLostError:
            return None
        except OSError as error:
            if self.find(cell) is not None:
                return None
            trouble = f"the run could not be moved to {place} ({files.first_line(error)})"
        if trouble is not None:
            warn(f"fastvi: warning: {trouble}")
            return dataclasses.replace(outcome, failed=True)
        return outcome

    def _record_failure(self, cell: Cell, error: BaseException) -> Outcome:
        said = files.first_line(error)
        # A divergence is known by the name of its finding.
        is_broken = isinstance(error, NonFiniteError)
        findings = "non_finite" if is_broken else f"{type(error).__name__}: {said}"
        columns = dict.fromkeys(COLUMNS, "-") | {"findings": findings}
        outcome = Outcome(columns, f"failed, {said.split('. ')[0]}", failed=True)
        files.replace_file(self.folder / FAILED / cell.name, self._record(outcome))
        return outcome

    def _record(self, outcome: Outcome) -> bytes:
        numbers = outcome.numbers and {k: repr(v) for k, v in outcome.numbers._asdict().items()}
        return files.json_bytes(
            {
                "format": CELL,
                "version": VERSION,
                "round": self.round,
                "columns": outcome.columns,
                "words": outcome.words,
                "numbers": numbers,
                "failed": outcome.failed,
            }
        )

    def _read(self, path: Path) -> Outcome | None:
        """Read what a process of this round has recorded; another round's is looked at anew."""
        try:
            found = files.read_object(path, "")
            if found.get("round") != self.round:
                return None
            files.check_format(path, found, CELL, VERSION, "")
            numbers = found["numbers"]
            if numbers is not None:
                numbers = Numbers(**{name: float(value) for name, value in numbers.items()})
            return Outcome(
                {name: str(found["columns"][name]) for name in COLUMNS},
                str(found["words"]),
                numbers,
                found["failed"] is True,
            )
        # It is looked at anew.
        except (DataError, KeyError, TypeError, ValueError, AttributeError):
            return None


def finished(
    folder: Path, cell: Cell, fingerprint: dict[str, Any]
) -> tuple[LLCEstimate | None, str]:
    """Return the run if it is complete and of the same target and settings.

    Else why it is run again.
    """
    # An empty folder holds no run whose loss is to be told.
    if not folder.is_dir() or not held_by(folder):
        return None, ""
    try:
        record, config = read_record(folder), read_settings(folder)
        if record.origin != cell.origin or config != cell.config:
            return None, "run again under other settings"
        names = ", ".join(differing(fingerprint, record.fingerprint or {}))
        if names:
            return None, f"run again because the target computes something else ({names})"
        return LLCEstimate.load(folder), ""
    except (ConfigError, DataError) as error:
        return None, f"run again because {str(error).split('. ')[0]}"


def outcome_of(result: LLCEstimate, before: str, after: str = "") -> Outcome:
    """Take from an estimate what the table and the figure show."""
    return Outcome(
        describe(result),
        f"{before}llc {result.llc_text}{after}",
        Numbers(
            float(result.llc),
            float(result.llc_sem),
            float(result.work.total_fge),
            float(result.elbo) if result.has_fit else math.nan,
        ),
    )


def _identity(folder: Path) -> tuple[int, int]:
    """Tell a folder from others that come to its place."""
    found = folder.lstat()
    return found.st_dev, found.st_ino


def _copy_foreign(place: Path, new: Path) -> None:
    """Take along what somebody has put into the folder of an earlier run."""
    if not place.is_dir():
        return
    for path in place.iterdir():
        if path.name in OF_A_RUN or path.name.startswith(ASIDE):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _remove_progress(place: Path) -> None:
    """Remove a folder that has held progress alone, unless another process has put a run there."""
    shutil.rmtree(place / files.PROGRESS, ignore_errors=True)
    with contextlib.suppress(OSError):
        place.rmdir()


def _move_away(place: Path, aside: Path, before: tuple[int, int]) -> bool:
    """Move the earlier run away; False where another process has put a new one there."""
    try:
        os.rename(place, aside)
    except FileNotFoundError:
        return True
    if _identity(aside) == before:
        return True
    os.rename(aside, place)
    return False
