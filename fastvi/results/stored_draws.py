"""Draws that are on disk, opened."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Given, PyTree
from fastvi.observables.posterior import PosteriorDraws
from fastvi.observables.zarr_arrays import StoredArray, ZarrArrays
from fastvi.results import files
from fastvi.results.draw_findings import with_findings
from fastvi.results.draw_folder import MEAN_ENERGIES, WALKERS, WAY_OUT, draws_done, read_about
from fastvi.results.draw_identity import INIT_LOSSES, LOSSES, OBSERVABLES, TRACES

NUMBERS = ("nbeta", "localization", "n_data", "dim", "center_norm", "init_loss", "thin")


def load_draws(folder: Given[str | os.PathLike[str]]) -> PosteriorDraws:
    """Open draws that `sample_posterior(..., store=folder)` wrote, complete or not.

    Losses and observables are read from disk where they are needed: means, covariances, influences
    and susceptibilities take them a piece at a time. No model is needed, but for `params`.

    Args:
        folder: Where they are.

    Returns:
        All draws of whole blocks.

    Raises:
        DataError: If no draws are there, or fewer than two of each walker.
        MissingExtraError: If zarr is not installed.
    """
    folder = Path(folder)
    about = read_about(folder)
    if about is None:
        raise DataError(f"{folder} holds no draws. Pass the folder that was the store of a run.")
    draws = draws_done(folder)
    if draws < 2:
        raise DataError(
            f"{folder} holds {draws} draws of each walker, and errors take two. Go on with the run."
        )
    return stored_draws(folder, _no_model)


def stored_draws(folder: Path, as_passed: Callable[[Any], PyTree]) -> PosteriorDraws:
    """Return the draws of a folder."""
    about, end = read_about(folder), files.read_arrays(folder / WALKERS, WAY_OUT)
    assert about is not None, "the folder holds draws"
    draws, arrays = int(end["draws"]), ZarrArrays(folder, "r")
    names = list(about["identity"]["evaluated"])
    values = {name: StoredArray(arrays[name], draws) for name in names}
    found = PosteriorDraws(
        **{name: np.asarray(values.pop(name)) for name in TRACES},
        losses=_named(LOSSES, values),
        init_losses={name: arrays.whole(INIT_LOSSES + name) for name in _named(LOSSES, values)},
        observables=_named(OBSERVABLES, values),
        **{name: about[name] for name in NUMBERS},
        fge=float(end["work"]),
        displacement=values.get("displacement"),
        gradient=values.get("gradient"),
        as_passed=as_passed,
        mean_energies=_mean_energies(arrays, draws),
    )
    return with_findings(found)


def _mean_energies(arrays: ZarrArrays, draws: int) -> np.ndarray:
    """Return what a run has left at its end; none where it has not ended, or has gone on."""
    if MEAN_ENERGIES not in arrays:
        return np.zeros(0)
    of_draws, *values = arrays.whole(MEAN_ENERGIES)
    return np.array(values if of_draws == draws else [], float)


def _no_model(displacement: Any) -> PyTree:
    raise DataError(
        "these draws were opened from disk, without the model that knows how parameters lie in a "
        "vector: `displacement` has w - w* flat. Call sample_posterior with the same store for "
        "params()."
    )


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): one for name, one in values.items() if name.startswith(prefix)
    }
