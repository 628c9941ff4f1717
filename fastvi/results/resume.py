"""Keep the progress of a fit in a folder, and go on from there.

A fit that was interrupted ends at the same bits as one that was not.
"""

import itertools
import json
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Given, Keys, PyTree
from fastvi._version import __version__
from fastvi.config import VIConfig
from fastvi.fitting.run import AbstractKeeper, Course, Snapshot
from fastvi.fitting.step_plan import Phases
from fastvi.results import files
from fastvi.results.schema import fits
from fastvi.target.data import Problem
from fastvi.target.identity import differing, digest_tree, list_changes, observe_loss
from fastvi.target.losses import take_examples
from fastvi.target.objective import FlatObjective

PROGRESS_FILE = "progress.npz"
FORMAT, VERSION = "fastvi progress", 2  # raised where the file's entries change their meaning
# Share of a fit's time that may go into saving. At half an interruption loses twice the steps.
SAVING_SHARE = 0.05
WAY_OUT = "Delete it, and the fit begins anew."
# Fields that no bit of a fit depends on: sampling begins where it ends.
AFTER_THE_FIT = ("method", "error", "budget", "sampler")
COUNTS = {"calibration_rounds": int, "done": int, "flat_looks": int, "converged": bool | None}
META = {
    "identity": dict[str, Any],
    "num_leaves": int,
    "lengths": list[int],
    "phases": list[float],
    **COUNTS,
}


class FolderKeeper(AbstractKeeper):
    """Keeps a fit's progress in one file, replaced as a whole.

    A kill at any moment leaves the old or the new one.

    Attributes:
        folder: Where the file lies.
        identity: What must be equal for a fit to go on, by name.

    Raises:
        ConfigError: If the folder cannot be made, or holds another fit.
        DataError: If the file is damaged.
    """

    def __init__(self, folder: Given[str | os.PathLike[str]], identity: dict[str, Any]):
        try:
            self.folder = Path(folder)
        except TypeError as error:
            raise ConfigError(
                f"resume_from must be a folder, as a string or a path; got {type(folder).__name__}."
            ) from error
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"resume_from must be a folder, or one that can be made; got {str(folder)!r}: "
                f"{files.first_line(error)}"
            ) from error
        self.identity = identity
        self._due = 0.0  # the first report is kept, whatever the clock says
        self._has_warned = False
        path = self.folder / PROGRESS_FILE
        self._kept: tuple[dict[str, Any], Mapping[str, np.ndarray]] | None = None
        if os.path.lexists(path):
            stored = files.read_arrays(path, WAY_OUT)
            self._kept = _read_meta(path, stored.get("meta")), stored
            # Another fit is refused here, before anything compiles.
            self._compare(self._kept[0]["identity"])

    def restore(self, course: Course) -> Course:
        """Return the course that was kept, or the given one, which begins.

        Raises:
            DataError: If the file is damaged.
        """
        if self._kept is None:
            return course
        # The arrays are let go here: they are as large as the fit.
        path, (kept, stored), self._kept = self.folder / PROGRESS_FILE, self._kept, None
        template, structure = jax.tree_util.tree_flatten(_arrays(course))
        leaves = [stored.get(f"leaf_{i}") for i in range(kept["num_leaves"])]
        traces = {
            name.removeprefix("trace_"): array
            for name, array in stored.items()
            if name.startswith("trace_")
        }
        snapshots = _read_snapshots(path, stored)
        _check_leaves(path, leaves, template)
        _check_course(path, kept, traces)
        family, state, start = structure.unflatten([jnp.asarray(leaf) for leaf in leaves])
        ends = itertools.accumulate(kept["lengths"], initial=0)
        warmup, decay_start, end = kept["phases"]
        return course._replace(
            family=family,
            state=state,
            start=start,
            snapshots=snapshots,
            parts=tuple(
                {name: trace[:, begin:end] for name, trace in traces.items()}
                for begin, end in itertools.pairwise(ends)
            ),
            phases=Phases(warmup, decay_start, int(end)),
            **{name: kept[name] for name in COUNTS},
        )

    def save(self, course: Course) -> None:
        """Save a checkpoint.

        Checkpoints before the end are skipped so that saving takes at most `SAVING_SHARE` of the
        run. The last one is always written. If the folder cannot be written, the first failure
        warns, and the fit goes on without a new checkpoint.
        """
        began = time.monotonic()
        if began < self._due and course.done < course.phases.end:
            return
        try:
            self._write(course)
        except OSError as error:
            self._warn(error)
        # A failed write counts too: on a full disk the fit is not to try at every report.
        ended = time.monotonic()
        self._due = ended + (ended - began) / SAVING_SHARE

    def _write(self, course: Course) -> None:
        leaves = jax.device_get(jax.tree_util.tree_leaves(_arrays(course)))
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "identity": self.identity,
            "num_leaves": len(leaves),
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
        arrays: dict[str, Any] = {f"leaf_{i}": leaf for i, leaf in enumerate(leaves)}
        arrays |= traces | shapes | {"meta": np.array(json.dumps(meta))}
        with files.staged(self.folder) as staging:
            np.savez(staging / PROGRESS_FILE, **arrays)
            files.publish(staging, self.folder, (PROGRESS_FILE,))

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the progress of the fit could not be kept in {self.folder} "
                f"({files.first_line(error)}): the fit goes on, but one that is interrupted now "
                "begins at the checkpoint before. Free space, or name another folder next time.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _compare(self, kept: dict[str, Any]) -> None:
        # The kept one went through JSON, which turns tuples to lists.
        now = json.loads(json.dumps(self.identity))
        names = differing(now, kept)
        if names:
            listed = list_changes(names, kept, self.identity)
            raise ConfigError(
                f"{self.folder} holds the progress of another fit: {listed}. Pass what it was "
                "begun with, or an empty folder."
            )


def identify(
    objective: FlatObjective, problem: Problem, config: VIConfig, keys: Keys, early_stop: bool
) -> dict:
    """Name all that the bits of a fit depend on: configuration, key, w*, data, loss, versions."""
    posterior, given = problem.posterior, config.to_dict()
    # The data are compared by their digest, so that one batch is enough for the loss.
    first = take_examples(problem.data.examples, slice(problem.batch_size))
    return {
        **{name: value for name, value in given.items() if name not in AFTER_THE_FIT},
        "early_stop": early_stop,
        "key": digest_tree(jax.random.key_data(keys)),
        "params": digest_tree(posterior.center),
        "data": digest_tree(problem.data.examples),
        "n_data": problem.num_data,
        "nbeta": float(posterior.nbeta),
        "localization": float(posterior.gamma),
        **observe_loss(objective, posterior.center, first),
        # Another version may round otherwise, and a fit is to end at the same bits.
        "jax": jax.__version__,
        "fastvi": __version__,
    }


def _read_meta(path: Path, stored: Any) -> dict[str, Any]:
    """Read and check what a progress file says of itself."""
    try:
        meta = json.loads(str(stored))
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise files.damaged(path, "is not the progress of a fit", WAY_OUT)
    files.check_format(path, meta, FORMAT, VERSION, WAY_OUT)
    # No hint of META fits a tuple, which JSON has not, so that a missing name is a wrong one.
    wrong = [name for name, hint in META.items() if not fits(meta.get(name, ()), hint)]
    if wrong:
        raise files.damaged(path, f"has an impossible {wrong[0]!r}", WAY_OUT)
    return meta


def _read_snapshots(path: Path, stored: Mapping[str, np.ndarray]) -> tuple[Snapshot, ...]:
    """Return the kept shapes of q, in the order of their steps."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for entry, array in stored.items():
        if not entry.startswith("snapshot_"):
            continue
        step, _, name = entry.removeprefix("snapshot_").partition("_")
        if not (step.isdecimal() and name):
            raise files.damaged(path, f"has an impossible {entry!r}", WAY_OUT)
        found.setdefault(int(step), {})[name] = array
    return tuple(Snapshot(step, found[step]) for step in sorted(found))


def _check_leaves(path: Path, leaves: list[Any], template: list[Any]) -> None:
    # The program of the fit is compiled for these shapes and dtypes.
    kinds = [None if leaf is None else (leaf.shape, leaf.dtype) for leaf in leaves]
    if kinds != [(leaf.shape, leaf.dtype) for leaf in template]:
        raise files.damaged(path, "lacks arrays of the fit, or has them in other shapes", WAY_OUT)


def _check_course(path: Path, kept: dict[str, Any], traces: dict[str, np.ndarray]) -> None:
    """Check that steps, phases and traces are of one course."""
    done, phases, lengths = kept["done"], kept["phases"], kept["lengths"]
    possible = (
        len(phases) == 3
        and bool(np.all(np.isfinite(phases)))
        and 0 < done <= phases[2]
        and min(lengths, default=0) > 0
        and sum(lengths) == done
        and kept["flat_looks"] >= 0
        and "elbo" in traces
        and all(
            trace.ndim == 2 and trace.shape[1] == done and trace.dtype.kind == "f"
            for trace in traces.values()
        )
    )
    if not possible:
        raise files.damaged(path, "has steps, phases and traces that are not of one fit", WAY_OUT)


def _arrays(course: Course) -> PyTree:
    return course.family, course.state, course.start
