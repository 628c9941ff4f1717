"""Keep the progress of a fit in a folder, and go on from there to the bits of a fit that was never interrupted."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Keys, PyTree
from fastvi.config import VIConfig
from fastvi.inference.driver import AbstractKeeper, Course
from fastvi.inference.loop import Problem
from fastvi.objective import FlatObjective

PROGRESS_FILE = "progress.npz"
SAVING_SHARE = 0.05  # of the time that may go into saving
LOSS, LOSS_TOLERANCE = "loss at w*", 1e-5


class FolderKeeper(AbstractKeeper):
    """Keeps a fit's progress in one file, replaced as a whole: a kill at any moment leaves the old or the new one.

    Attributes:
        folder: Where the file lies.
        identity: What must be equal for a fit to go on, by name.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = identity
        self._due = 0.0

    def restore(self, course: Course) -> None:
        """Move a course to where the kept one was.

        Raises:
            ConfigError: If the kept fit is another one.
        """
        path = self.folder / PROGRESS_FILE
        if not path.is_file():
            return
        with np.load(path) as stored:
            kept = json.loads(str(stored["meta"]))
            self._compare(kept["identity"])
            leaves = [jnp.asarray(stored[f"leaf_{i}"]) for i in range(kept["num_leaves"])]
            traces = {name.removeprefix("trace_"): stored[name] for name in stored.files if name.startswith("trace_")}
        structure = jax.tree_util.tree_structure(_arrays(course))
        course.family, course.state, course.start, course.calibration_rounds = structure.unflatten(leaves)
        course.parts = [{name: trace[:, at] for name, trace in traces.items()} for at in _slices(kept["lengths"])]
        course.phases = (*kept["phases"][:2], int(kept["phases"][2]))
        course.done, course.flat_looks, course.converged = kept["done"], kept["flat_looks"], kept["converged"]

    def save(self, course: Course) -> None:
        """Keep the course, but one before the last only if the latest was kept long enough ago for what it cost."""
        began = time.monotonic()
        if began < self._due and course.done < course.phases[2]:
            return
        leaves = jax.device_get(jax.tree_util.tree_leaves(_arrays(course)))
        meta = {
            "identity": self.identity,
            "num_leaves": len(leaves),
            "lengths": [part["elbo"].shape[1] for part in course.parts],
            "phases": course.phases,
            "done": course.done,
            "flat_looks": course.flat_looks,
            "converged": course.converged,
        }
        names = course.parts[0]
        traces = {f"trace_{name}": np.concatenate([part[name] for part in course.parts], axis=1) for name in names}
        replace_file(
            self.folder / PROGRESS_FILE,
            meta=np.array(json.dumps(meta)),
            **traces,
            **{f"leaf_{i}": leaf for i, leaf in enumerate(leaves)},
        )
        ended = time.monotonic()
        self._due = ended + (ended - began) / SAVING_SHARE

    def _compare(self, kept: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.identity))
        differing = [name for name in now if now[name] != kept.get(name) and not _is_rounding(name, now, kept)]
        if differing:
            listed = "; ".join(f"{name} was {kept.get(name)!r}, now {self.identity[name]!r}" for name in differing)
            raise ConfigError(
                f"{self.folder} holds the progress of another fit: {listed}. Pass what it was begun with, or an empty "
                "folder."
            )


def replace_file(path: Path, **arrays: Any) -> None:
    """Write an .npz file beside its place, and move it there once it is on the disk."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def identify(objective: FlatObjective, problem: Problem, config: VIConfig, keys: Keys, early_stop: bool) -> dict:
    """Name all that the bits of a fit depend on: configuration, key, w*, data, loss, versions."""
    posterior = problem.posterior
    first = jax.tree_util.tree_map(lambda leaf: leaf[: problem.batch_size], problem.data)
    return {
        **config.to_dict(),
        "early_stop": early_stop,
        "key": _digest(jax.random.key_data(keys)),
        "params": _digest(posterior.center),
        "data": _digest(problem.data),
        "n_data": problem.num_data,
        "nbeta": float(posterior.nbeta),
        "localization": float(posterior.gamma),
        LOSS: float(objective.loss(posterior.center, first)),
        "jax": jax.__version__,
    }


def _arrays(course: Course) -> PyTree:
    return course.family, course.state, course.start, course.calibration_rounds


def _slices(lengths: list[int]) -> list[slice]:
    ends = np.cumsum(lengths)
    return [slice(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]


def _digest(tree: PyTree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree_util.tree_leaves(tree):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()[:16]


def _is_rounding(name: str, now: dict[str, Any], kept: dict[str, Any]) -> bool:
    return name == LOSS and bool(np.isclose(now[name], kept.get(name, np.nan), rtol=LOSS_TOLERANCE))
