"""An estimate, or draws of its posterior, as arviz sees them.

Draws with their statistics, the optimisation apart from them, the problem.
"""

import json
from typing import Any

import numpy as np

from fastvi._optional import import_optional
from fastvi.observables.posterior import PosteriorDraws
from fastvi.results.estimate import LLCEstimate
from fastvi.results.report.arviz_draws import groups_of_draws
from fastvi.target.work import LOSS

ENOUGH_WALK = 4  # records of a walker that are worth a posterior
CONSTANTS = ("n_data", "dim", "nbeta", "localization", "init_loss")


def to_arviz(result: LLCEstimate | PosteriorDraws) -> Any:
    """Convert an estimate, or draws of its posterior, to arviz's container.

    Groups of an estimate: `posterior` with llc and L (the mean loss), one entry for each chain and
    draw: the walkers after their burn-in where `method="sample"` ran, else independent draws of q;
    `sample_stats` of the same draws; `variational`, the draws of q in any case, with resp_entropy,
    log_q, log_p (under the names of the traces, logq and elbo_like, as well) and log_weight = log_p
    - log_q; `optimization`, the traces of the fit on a dimension `step`; `constant_data`. Mirrored
    draws stand side by side, so that their dependence is seen. A walk without a fit has neither
    `variational` nor `optimization`, and no attribute of q. Numbers of the estimate and its
    configuration are attributes of `posterior`.

    Groups of draws, by chain (walker) and draw: `posterior` with llc, L, radius2, each observable,
    and displacement, w - w* flat, where parameters were kept; `log_likelihood` with minus the loss
    of each example or token, by the name of its data; `sample_stats` with slope, (w - w*) . grad of
    n beta L_n, and lp, the log density of the posterior without its constant; `constant_data`, with
    the losses at w* as init_loss_{name}. Numbers of all draws are attributes of `posterior`. Losses
    that are on disk are read to memory.

    Args:
        result: The estimate; one that `LLCEstimate.load` read will do. Or draws, from
            `sample_posterior` or `load_draws`.

    Returns:
        An `arviz.InferenceData` (arviz before 1.0) or an `xarray.DataTree`; both have `to_netcdf`.

    Raises:
        DataError: If an observable has the name of a number that draws have themselves.
        MissingExtraError: If arviz is not installed.
    """
    arviz = import_optional("arviz", extra="arviz", distribution="arviz", purpose="to_arviz")
    xarray = import_optional("xarray", extra="arviz", distribution="xarray", purpose="to_arviz")
    if isinstance(result, PosteriorDraws):
        groups = groups_of_draws(xarray, result)
    else:
        groups = _groups_of_estimate(xarray, result)
    # To ask arviz 1 for an attribute that it gave up warns.
    container = vars(arviz).get("InferenceData")
    if container is None:
        return xarray.DataTree.from_dict(groups)
    return container(**groups)


def _groups_of_estimate(xarray: Any, result: LLCEstimate) -> dict[str, Any]:
    draws, statistics = _draws_of_q(result) if result.has_fit else ({}, {})
    walks = result.walk_llc.shape[1] >= ENOUGH_WALK or not result.has_fit
    posterior, sample_stats = _walk(result) if walks else (draws, statistics)
    groups = {
        "posterior": _dataset(xarray, posterior, ("chain", "draw"), _attributes(result)),
        "sample_stats": _dataset(xarray, sample_stats, ("chain", "draw")),
        "constant_data": _dataset(xarray, {name: getattr(result, name) for name in CONSTANTS}, ()),
    }
    if result.has_fit:
        groups["variational"] = _dataset(xarray, draws | statistics, ("chain", "draw"))
        groups["optimization"] = _dataset(xarray, dict(result.traces), ("chain", "step"))
    return groups


def _draws_of_q(result: LLCEstimate) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return LLC and loss of q's draws, and their statistics, mirrored draws side by side."""
    arrays = result.draws._asdict() | {"log_weight": result.log_weights}
    found = {name: _side_by_side(np.asarray(array, float)) for name, array in arrays.items()}
    excess, log_q, log_weight = (found[name] for name in ("excess_loss", "log_q", "log_weight"))
    fitted = np.asarray(result.traces["cumulative_fge"], float)[:, -1:]
    # Each draw took one loss on all data.
    work = fitted + LOSS * np.arange(1, excess.shape[1] + 1)
    return (
        {"llc": result.nbeta * excess, "L": result.init_loss + excess},
        {
            "cumulative_fge": work,
            "diverging": ~np.isfinite(log_weight),
            "log_q": log_q,
            "log_p": log_q + log_weight,
            "log_weight": log_weight,
            "logq": log_q,
            "elbo_like": log_q + log_weight,
            "resp_entropy": found["resp_entropy"],
        },
    )


def _side_by_side(draws: np.ndarray) -> np.ndarray:
    """Put draw i and its mirror image i + n/2 next to each other."""
    chains, count = draws.shape
    return draws.reshape(chains, 2, count // 2).swapaxes(1, 2).reshape(chains, count)


def _walk(result: LLCEstimate) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the walkers after their burn-in, and the work that each record took."""
    burn, (walkers, length) = result.walk_burn_in, result.walk_llc.shape
    llc = np.asarray(result.walk_llc, float)[:, burn:]
    before = result.work.total_fge - result.work.fge_correction
    # The walkers share what was spent before, and their own work is even along the walk.
    work = (
        before / walkers
        + result.work.fge_correction / walkers * np.arange(burn + 1, length + 1) / length
    )
    return (
        {"llc": llc, "L": result.init_loss + llc / result.nbeta},
        {"cumulative_fge": np.broadcast_to(work, llc.shape), "diverging": ~np.isfinite(llc)},
    )


def _attributes(result: LLCEstimate) -> dict[str, Any]:
    """Collect what netCDF can hold: numbers and text."""
    return {
        "inference_library": "fastvi",
        "llc": result.llc,
        "llc_sem": result.llc_sem,
        "method": "variational" if result.correction is None else result.correction.method,
        **(_attributes_of_q(result) if result.has_fit else {}),
        "total_fge": float(result.work.total_fge),
        "converged": str(result.converged),  # netCDF has neither None nor a bool
        "findings": " ".join(finding.name for finding in result.health),
        "config": json.dumps(result.config.to_dict()),
    }


def _attributes_of_q(result: LLCEstimate) -> dict[str, Any]:
    khat, word, effective = result.importance
    return {
        "llc_vi": result.llc_vi,
        "elbo": result.elbo,
        "khat": khat,
        "khat_word": word,
        "effective_draws": effective,
    }


def _dataset(
    xarray: Any, arrays: dict[str, Any], dims: tuple[str, ...], attrs: dict | None = None
) -> Any:
    variables = {name: (dims, np.asarray(array)) for name, array in arrays.items()}
    lengths = next(iter(variables.values()))[1].shape
    coords = {dim: np.arange(length) for dim, length in zip(dims, lengths, strict=True)}
    return xarray.Dataset(variables, coords=coords, attrs=attrs or {})
