"""Keep the progress of an estimate in a folder, and go on from there.

An estimate that was interrupted, at any moment, ends at the same bits as one that was not. A fit, a
walk that begins at it (a correction), and a walk from the localizer have a file each, replaced as a
whole.
"""

import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._typing import Given, Key, Keys, PyTree
from fastvi._version import __version__
from fastvi.config import VIConfig
from fastvi.fitting.run import AbstractKeeper, Course, Snapshot
from fastvi.fitting.step_plan import Phases
from fastvi.results import files
from fastvi.results.packing import pack, unpack
from fastvi.sampling.keeping import AbstractWalkKeeper
from fastvi.target.data import Problem
from fastvi.target.identity import differing, digest_tree, list_changes, observe_loss
from fastvi.target.losses import take_examples
from fastvi.target.objective import FlatObjective

# Stages, as the status line names them, and what each is called in a sentence.
FIT, CORRECTION, WALK = "fit", "correction", "walk"
CALLED = {FIT: "fit", CORRECTION: "correction", WALK: "walk"}
FORMAT, VERSION = "fastvi progress", 3  # raised where the file's entries change their meaning
# Share of an estimate's time that may go into saving. At half an interruption loses twice the
# steps.
SAVING_SHARE = 0.05
WAY_OUT = "Delete it, and the estimate begins anew."
# Fields that no bit of a fit depends on: sampling begins where it ends.
AFTER_THE_FIT = ("method", "error", "budget", "sampler")
COUNTS = ("calibration_rounds", "done", "flat_looks", "converged")


class Stopped(BaseException):
    """An estimate was asked to stop, has kept its progress where that was possible, and stops.

    Not an `Exception`, so that nothing takes it for an error.
    """


class ProgressFolder(os.PathLike[str]):
    """A folder for the progress of an estimate, to be passed as `resume_from`.

    Args:
        folder: Where it is; it is made where there is none.
        begins_anew: Whether progress of another estimate, or that cannot be read, is replaced. It
            is refused otherwise.
        tell: Receives a line where an estimate goes on, and where it begins anew and why.

    Attributes:
        path: Where it is.
        is_moving: Whether a stage is between two checkpoints.
        is_asked: Whether it is to stop at the next.

    Raises:
        ConfigError: If the folder cannot be made.
    """

    def __init__(
        self,
        folder: Given[str | os.PathLike[str]],
        *,
        begins_anew: bool = False,
        tell: Callable[[str], None] | None = None,
    ):
        try:
            self.path = Path(folder)
        except TypeError as error:
            raise ConfigError(
                f"resume_from must be a folder, as a string or a path; got {type(folder).__name__}."
            ) from error
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"resume_from must be a folder, or one that can be made; got {str(folder)!r}: "
                f"{files.first_line(error)}"
            ) from error
        self.begins_anew = begins_anew
        self.is_moving, self.is_asked, self._has_warned = False, False, False
        self._tell, self._told = tell, set()

    def __fspath__(self) -> str:
        """Return where it is."""
        return str(self.path)

    @property
    def holds_progress(self) -> bool:
        """Whether an estimate has kept something."""
        return any(os.path.lexists(self.place(stage)) for stage in CALLED)

    def place(self, stage: str) -> Path:
        """Return the file of a stage."""
        return self.path / f"progress-{stage}.npz"

    def ask_to_stop(self) -> bool:
        """Ask the estimate to keep its progress after this chunk or round, and to raise `Stopped`.

        From a signal handler, from another thread, or from `progress`.

        Returns:
            Whether it will: not where it is asked between stages, which keep nothing.
        """
        self.is_asked = self.is_moving
        return self.is_asked

    def tell(self, line: str) -> None:
        """Tell a line once."""
        if self._tell is not None and line not in self._told:
            self._told.add(line)
            self._tell(line)

    def warn(self, called: str, error: OSError) -> None:
        """Warn of the first checkpoint of a stage that could not be written."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the progress of the {called} could not be kept in {self.path} "
                f"({files.first_line(error)}): the {called} goes on, but one that is interrupted "
                "now begins at the checkpoint before. Free space, or name another folder next "
                "time.",
                RuntimeWarning,
                stacklevel=2,
            )


class Stored(NamedTuple):
    """What a file of progress holds: what it says of itself, and arrays."""

    meta: dict[str, Any]
    arrays: Mapping[str, np.ndarray]


class StageFile:
    """The progress of one stage in one file.

    A kill at any moment leaves the old or the new one.

    Args:
        folder: The folder.
        stage: The stage.
        identity: What must be equal for it to go on, by name.
        begins_anew: As in `ProgressFolder`, whatever the folder says.

    Raises:
        ConfigError: If it is of another estimate.
        DataError: If it is damaged.
    """

    def __init__(
        self,
        folder: ProgressFolder,
        stage: str,
        identity: Mapping[str, Any],
        begins_anew: bool = False,
    ):
        self.folder, self.stage, self.identity = folder, stage, identity
        self.path = folder.place(stage)
        self._due = 0.0  # the first report is kept, whatever the clock says
        self._stored: Stored | None = None
        if os.path.lexists(self.path):
            try:
                self._stored = self._read()
            except (ConfigError, DataError) as error:
                if not (folder.begins_anew or begins_anew):
                    raise
                folder.tell(f"begins anew: {str(error).split('. ')[0]}")

    def take(self) -> Stored | None:
        """Return what was kept, once: the arrays are as large as the stage's."""
        stored, self._stored = self._stored, None
        if stored is not None:
            self.folder.tell(f"goes on from the progress in {self.folder.path}")
        return stored

    def save(self, content: Callable[[], Stored], is_last: bool) -> None:
        """Save a checkpoint.

        Checkpoints before the last are skipped so that saving takes at most `SAVING_SHARE` of the
        run, but for one that was asked for. If the folder cannot be written, the first failure
        warns, and the run goes on without a new checkpoint.

        Raises:
            Stopped: If it was asked for.
        """
        folder, began = self.folder, time.monotonic()
        folder.is_moving = not is_last
        # Read once: a signal may come at any moment.
        is_asked = folder.is_asked
        if began >= self._due or is_last or is_asked:
            try:
                self._write(content())
            except OSError as error:
                folder.warn(CALLED[self.stage], error)
            # A failed write counts too: on a full disk the run is not to try at every report.
            ended = time.monotonic()
            self._due = ended + (ended - began) / SAVING_SHARE
        if is_asked:
            raise Stopped(f"the {CALLED[self.stage]} was asked to stop")

    def _damaged(self, wrong: str) -> DataError:
        """Return the error of a file that is not as it was written."""
        return files.damaged(self.path, wrong, WAY_OUT)

    def _write(self, content: Stored) -> None:
        meta = {"format": FORMAT, "version": VERSION, "identity": self.identity, **content.meta}
        text = json.dumps(meta)
        arrays = {
            **content.arrays,
            "meta": np.array(text),
            "digest": np.array(_digest(text, content.arrays)),
        }
        with files.staged(self.folder.path) as staging:
            np.savez(staging / self.path.name, allow_pickle=False, **arrays)
            files.publish(staging, self.folder.path, (self.path.name,))

    def _read(self) -> Stored:
        """Read what was written for the same identity.

        By the identity this very version wrote it, and by the digest nobody has changed it since,
        so that there is no more to check.
        """
        arrays = files.read_arrays(self.path, WAY_OUT)
        text, digest = (str(arrays.pop(name, None)) for name in ("meta", "digest"))
        try:
            meta = json.loads(text)
        except (ValueError, RecursionError):
            meta = None
        if not isinstance(meta, dict):
            raise self._damaged(f"is not the progress of a {CALLED[self.stage]}")
        files.check_format(self.path, meta, FORMAT, VERSION, WAY_OUT)
        if digest != _digest(text, arrays):
            raise self._damaged("is not as it was written")
        self._compare(meta["identity"])
        return Stored(meta, arrays)

    def _compare(self, kept: dict[str, Any]) -> None:
        # The kept one went through JSON, which turns tuples to lists.
        names = differing(json.loads(json.dumps(self.identity)), kept)
        if names:
            listed = list_changes(names, kept, self.identity)
            raise ConfigError(
                f"{self.folder.path} holds the progress of another {CALLED[self.stage]}: {listed}. "
                "Pass what it was begun with, or an empty folder."
            )


class WalkKeeper(AbstractWalkKeeper):
    """Keeps the progress of walkers.

    Args:
        file: Where.
        classes: The named tuples that it is made of.
    """

    def __init__(self, file: StageFile, classes: tuple[Any, ...]):
        self.file, self.classes = file, classes

    def restore(self) -> Any:
        """Return the progress that was kept last; None where there is none."""
        stored = self.file.take()
        if stored is None:
            return None
        return unpack(stored.meta["progress"], stored.arrays, self.classes)

    def save(self, progress: Callable[..., Any], *told: Any, is_last: bool = False) -> None:
        """Keep the progress, as often as `SAVING_SHARE` allows."""
        self.file.save(lambda: _packed(progress(*told)), is_last)


def _packed(progress: Any) -> Stored:
    packed, arrays = pack(progress)
    return Stored({"progress": packed}, arrays)


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Condense what a file says of itself, and its arrays."""
    return files.digest_bytes(f"{files.digest_arrays(arrays)} {text}".encode())


class FitKeeper(AbstractKeeper):
    """Keeps the progress of a fit."""

    def __init__(self, file: StageFile):
        self.file = file

    def restore(self, course: Course) -> Course:
        """Return the course that was kept, or the given one, which begins."""
        stored = self.file.take()
        if stored is None:
            return course
        kept, arrays = stored
        structure = jax.tree_util.tree_structure(_arrays(course))
        leaves = [jnp.asarray(arrays[f"leaf_{i}"]) for i in range(structure.num_leaves)]
        family, state, start = structure.unflatten(leaves)
        traces = {
            name.removeprefix("trace_"): array
            for name, array in arrays.items()
            if name.startswith("trace_")
        }
        ends = itertools.accumulate(kept["lengths"], initial=0)
        warmup, decay_start, end = kept["phases"]
        return course._replace(
            family=family,
            state=state,
            start=start,
            snapshots=_read_snapshots(arrays),
            parts=tuple(
                {name: trace[:, begin:end] for name, trace in traces.items()}
                for begin, end in itertools.pairwise(ends)
            ),
            phases=Phases(warmup, decay_start, int(end)),
            **{name: kept[name] for name in COUNTS},
        )

    def save(self, course: Course) -> None:
        """Keep the course, as often as `SAVING_SHARE` allows, and at its end."""
        self.file.save(lambda: _stored(course), course.done >= course.phases.end)


def _read_snapshots(arrays: Mapping[str, np.ndarray]) -> tuple[Snapshot, ...]:
    """Return the kept shapes of q, in the order of their steps."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for entry, array in arrays.items():
        if entry.startswith("snapshot_"):
            step, _, name = entry.removeprefix("snapshot_").partition("_")
            found.setdefault(int(step), {})[name] = array
    return tuple(Snapshot(step, found[step]) for step in sorted(found))


def _stored(course: Course) -> Stored:
    leaves = jax.device_get(jax.tree_util.tree_leaves(_arrays(course)))
    meta = {
        "lengths": [part["elbo"].shape[1] for part in course.parts],
        "phases": course.phases,
        **{name: getattr(course, name) for name in COUNTS},
    }
    traces = {
        f"trace_{name}": np.concatenate([part[name] for part in course.parts], axis=1)
        for name in course.parts[0]
    }
    shapes = {
        f"snapshot_{one.step}_{name}": array
        for one in course.snapshots
        for name, array in one.arrays.items()
    }
    return Stored(meta, {f"leaf_{i}": leaf for i, leaf in enumerate(leaves)} | traces | shapes)


def _arrays(course: Course) -> PyTree:
    return course.family, course.state, course.start


def identify(
    objective: FlatObjective, problem: Problem, config: VIConfig, keys: Keys | Key
) -> dict[str, Any]:
    """Name all that the bits of an estimate depend on.

    Configuration, key, w*, data, loss, versions.
    """
    posterior = problem.posterior
    # The data are compared by their digest, so that one batch is enough for the loss.
    first = take_examples(problem.data.examples, slice(problem.batch_size))
    return {
        **config.to_dict(),
        "key": digest_tree(jax.random.key_data(keys)),
        "params": digest_tree(posterior.center),
        "data": digest_tree(problem.data.examples),
        "n_data": problem.num_data,
        "nbeta": float(posterior.nbeta),
        "localization": float(posterior.gamma),
        **observe_loss(objective, posterior.center, first),
        # Another version may round otherwise, and an estimate is to end at the same bits.
        "jax": jax.__version__,
        "fastvi": __version__,
    }
