"""Draws in a folder: what they are of, the walkers at the last of them, and how to go on.

Beside the zarr arrays lie `draws.json`, which says what the draws are of, `walkers.npz`, the
walkers at the end of the last whole block, and `begun.npz`, what does not change as they move. A
kill at any moment leaves all blocks that `walkers.npz` counts.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._typing import Given, PyTree
from fastvi.observables.split import GroupMeans
from fastvi.observables.storage import (
    Shapes,
    ZarrArrays,
    ZarrSink,
    block_draws,
)
from fastvi.results import files
from fastvi.results.draw_identity import INIT_LOSSES, differing_entries
from fastvi.sampling.ensemble import AbstractEnsemble
from fastvi.target.identity import list_changes

ABOUT, WALKERS, BEGUN = "draws.json", "walkers.npz", "begun.npz"
FORMAT, VERSION = "fastvi draws", 1  # raised where the entries of a file change their meaning
MEAN_ENERGIES = "mean_energies"
WAY_OUT = "Name another folder, or delete this one and draw anew."


@dataclasses.dataclass(frozen=True)
class DrawPlan:
    """What is drawn and evaluated.

    Attributes:
        identity: What must be equal for draws to go on, by name.
        numbers: Numbers of the posterior, as `PosteriorDraws` names them.
        walkers: How many there are.
        shapes: Shape of each value of a draw, by name.
        init_losses: Losses at w*, by the name of their data.
    """

    identity: dict[str, Any]
    numbers: dict[str, Any]
    walkers: int
    shapes: Shapes
    init_losses: dict[str, np.ndarray]


class DrawFolder:
    """Draws that go to a folder, or go on from what is there.

    Raises:
        ConfigError: If the folder cannot be made.
        DataError: If it holds something else, or draws of another configuration.
    """

    def __init__(self, folder: Given[str | os.PathLike[str]], plan: DrawPlan, draws: int):
        self.folder, self.plan = _as_folder(folder), plan
        self._fixed: dict[int, Any] = {}
        about = read_about(self.folder)
        if about is None:
            self.block = block_draws(plan.walkers, draws, plan.shapes)
        else:
            self._compare(about["identity"])
            self.block = about["block"]
        self.done = draws_done(self.folder) if about else 0
        # draws that are there are not thrown away
        self.draws = max(draws, self.done)
        if not self.done:
            self._create()
        self.arrays = ZarrArrays(self.folder, "r+")
        self.arrays.grow(list(plan.shapes), self.draws)

    def _create(self) -> None:
        plan = self.plan
        about = {
            "format": FORMAT,
            "version": VERSION,
            "identity": plan.identity,
            "block": self.block,
            **plan.numbers,
        }
        files.replace_file(self.folder / ABOUT, files.json_bytes(about))
        arrays = ZarrArrays(self.folder, "a")
        arrays.create(plan.walkers, self.draws, self.block, plan.shapes)
        for name, losses in plan.init_losses.items():
            arrays.put_whole(INIT_LOSSES + name, losses)

    def sink(self) -> ZarrSink:
        """Return where the values of draws go."""
        return ZarrSink(
            self.arrays,
            tuple(self.plan.shapes),
            self.done,
            self.draws,
            self.block,
            self._state_of,
            self._save,
        )

    def begin(
        self, ensemble: AbstractEnsemble, means: GroupMeans
    ) -> tuple[AbstractEnsemble, GroupMeans]:
        """Return walkers where they were at the last whole block, with the sums of their means.

        They are noted where there is none.

        Raises:
            DataError: If files are damaged, or of walkers of another kind.
        """
        progress = ensemble.progress, means
        if self.done:
            moved, means = self._restored(progress)
            return ensemble.at(moved), means
        leaves = jax.tree_util.tree_leaves(progress)
        self._fixed = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
        begun = {_leaf(i): _on_host(leaf) for i, leaf in self._fixed.items()}
        _replace_arrays(self.folder / BEGUN, begun)
        return ensemble, means

    @property
    def has_mean_energies(self) -> bool:
        """Whether the energies at the mean of these draws are there."""
        there = MEAN_ENERGIES in self.arrays
        return there and self.arrays.whole(MEAN_ENERGIES)[0] == self.draws

    def put_mean_energies(self, values: np.ndarray) -> None:
        """Keep the energies at the mean of these draws, of which no later ones are."""
        self.arrays.put_whole(MEAN_ENERGIES, np.array([self.draws, *values]))

    def _restored(self, progress: PyTree) -> PyTree:
        begun = files.read_arrays(self.folder / BEGUN, WAY_OUT)
        moved = files.read_arrays(self.folder / WALKERS, WAY_OUT)
        leaves, structure = jax.tree_util.tree_flatten(progress)
        known = {**begun, **moved}
        if int(moved.get("leaves", -1)) != len(leaves):
            raise self._of_another_kind()
        found = [self._restored_leaf(known, i, leaf) for i, leaf in enumerate(leaves)]
        self._fixed = {i: found[i] for i in range(len(found)) if _leaf(i) not in moved}
        return jax.tree_util.tree_unflatten(structure, found)

    def _state_of(self, progress: PyTree) -> dict[str, np.ndarray]:
        """Copy to the host what walkers need to go on, but what has not changed since they began.

        Steps use up the arrays that walkers are in, so that they are copied here.
        """
        leaves = jax.tree_util.tree_leaves(progress)
        arrays = {
            _leaf(i): _on_host(leaf)
            for i, leaf in enumerate(leaves)
            if not (i in self._fixed and leaf is self._fixed[i])
        }
        return {**arrays, "leaves": np.asarray(len(leaves))}

    def _save(self, draws: int, work: float, arrays: dict[str, np.ndarray]) -> None:
        _replace_arrays(
            self.folder / WALKERS, {**arrays, "draws": np.asarray(draws), "work": np.asarray(work)}
        )

    def _restored_leaf(self, known: Mapping[str, np.ndarray], i: int, template: Any) -> Any:
        value = known.get(_leaf(i))
        if value is None or value.shape != np.shape(_on_host(template)):
            raise self._of_another_kind()
        if not isinstance(template, jax.Array):
            return value if isinstance(template, np.ndarray) else type(template)(value.item())
        if jnp.issubdtype(template.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.array(value), impl=jax.random.key_impl(template))
        # a copy: steps use up the arrays that walkers are in
        return jnp.array(value, template.dtype)

    def _of_another_kind(self) -> DataError:
        return DataError(
            f"{self.folder} holds walkers of another estimate of the same posterior: they have "
            f"other arrays. Go on from the estimate that they began at. {WAY_OUT}"
        )

    def _compare(self, kept: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.plan.identity))
        names = differing_entries(now, kept)
        if names:
            listed = list_changes(names, kept, now)
            raise DataError(
                f"{self.folder} holds draws of another configuration: {listed}. Pass what they "
                "were begun with, or name another folder."
            )


def _as_folder(folder: Any) -> Path:
    try:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
    except TypeError as error:
        raise ConfigError(
            f"store must be a folder, as a string or a path; got {type(folder).__name__}."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"store must be a folder, or one that can be made; got {str(folder)!r}: "
            f"{files.first_line(error)}"
        ) from error
    return path


def read_about(folder: Path) -> dict[str, Any] | None:
    """Return what a folder says of its draws, None where it is empty or not there.

    Raises:
        DataError: If it holds something else.
    """
    path = folder / ABOUT
    if not os.path.lexists(path):
        # what a process leaves that is killed while it writes the first file
        files_there = folder.iterdir() if folder.is_dir() else ()
        if any(not path.name.startswith(files.PARTIAL) for path in files_there):
            raise DataError(f"{folder} holds something else than draws. Name another folder.")
        return None
    about = files.read_object(path, WAY_OUT)
    files.check_format(path, about, FORMAT, VERSION, WAY_OUT)
    if not isinstance(about.get("identity"), dict) or not isinstance(about.get("block"), int):
        raise files.damaged(path, "does not say what the draws are of", WAY_OUT)
    return about


def draws_done(folder: Path) -> int:
    """Count the draws of each walker that are complete."""
    if not os.path.lexists(folder / WALKERS):
        return 0
    return int(files.read_arrays(folder / WALKERS, WAY_OUT).get("draws", 0))


def _leaf(i: int) -> str:
    return f"leaf_{i}"


def _on_host(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(leaf) if is_key else leaf)


def _replace_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with files.staged(path.parent) as staging:
        with open(staging / path.name, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        files.publish(staging, path.parent, (path.name,))
