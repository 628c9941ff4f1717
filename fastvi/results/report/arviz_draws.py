"""Draws of the posterior in the groups that arviz knows."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastvi._errors import DataError
from fastvi.observables.posterior import PosteriorDraws

CONSTANTS = ("n_data", "dim", "nbeta", "localization", "init_loss", "center_norm", "thin")
SAMPLES = ("chain", "draw")


def groups_of_draws(xarray: Any, draws: PosteriorDraws) -> dict[str, Any]:
    """Return the datasets by group, see `fastvi.to_arviz`.

    Raises:
        DataError: If an observable has the name of a number that draws have themselves.
    """
    llc, radius2 = np.asarray(draws.llc, float), np.asarray(draws.radius2, float)
    own = {"llc": llc, "L": draws.init_loss + llc / draws.nbeta, "radius2": radius2}
    if draws.displacement is not None:
        own["displacement"] = np.asarray(draws.displacement)
    taken = sorted(own.keys() & draws.observables.keys())
    if taken:
        raise DataError(
            f"the observable {taken[0]!r} has the name of a variable that arviz's group has of "
            "the draws themselves. Give it another name when drawing."
        )
    statistics = {
        "slope": np.asarray(draws.slope, float),
        "lp": -llc - 0.5 * draws.localization * radius2,
    }
    observables = {name: np.asarray(one) for name, one in draws.observables.items()}
    constants = {name: np.asarray(getattr(draws, name)) for name in CONSTANTS}
    constants |= {f"init_loss_{name}": one for name, one in draws.init_losses.items()}
    groups = {
        "posterior": _dataset(xarray, own | observables, SAMPLES, _attributes(draws)),
        "sample_stats": _dataset(xarray, statistics, SAMPLES),
        "constant_data": _dataset(xarray, constants, ()),
    }
    if draws.losses:
        likelihoods = {name: -np.asarray(one) for name, one in draws.losses.items()}
        groups["log_likelihood"] = _dataset(xarray, likelihoods, SAMPLES)
    return groups


def _attributes(draws: PosteriorDraws) -> dict[str, Any]:
    """Collect what netCDF can hold: numbers and text."""
    return {
        "inference_library": "fastvi",
        "llc": float(draws.llc_estimate.value),
        "llc_sem": float(draws.llc_estimate.sem),
        "total_fge": draws.fge,
        "findings": " ".join(finding.name for finding in draws.health),
    }


def _dataset(
    xarray: Any, arrays: Mapping[str, np.ndarray], dims: tuple[str, ...], attrs: Any = None
) -> Any:
    """Return variables with these first dimensions, and others of their own as arviz names them."""
    variables = {
        name: ((*dims, *(f"{name}_dim_{i}" for i in range(array.ndim - len(dims)))), array)
        for name, array in arrays.items()
    }
    lengths = next(iter(arrays.values())).shape
    coords = {dim: np.arange(length) for dim, length in zip(dims, lengths, strict=False)}
    return xarray.Dataset(variables, coords=coords, attrs=attrs or {})
