"""Draws of the posterior in the layout that devinterp 2 writes.

Its own analysis and its users' figures then read them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastvi._errors import DataError
from fastvi._optional import import_optional
from fastvi.observables.posterior import PosteriorDraws

UNKNOWN = -1  # where the number of a token is not known; no vocabulary has it
TRACE = ("chain", "draw", "batch", "token_pos")
STEPS = ("chain", "step", "batch_sampling", "token_pos")


def to_devinterp(draws: PosteriorDraws, input_ids: Mapping[str, np.ndarray] | None = None) -> Any:
    """Convert draws to the tree that `devinterp.slt.sampling.sample` returns, of devinterp 2.0.

    Walkers are its chains, and each draw is a step. Variables of the root:

    - `loss_{name}` by (chain, draw, batch_{name}, token_pos), of each data set that was named in
      `losses`, with one token, or in `token_losses`;
    - `sampling_loss` by (chain, draw, batch, token_pos) and `sampling_loss_micro` by (chain, step,
      batch_sampling, token_pos): L_n of the draw by either of the two estimates that draws have of
      it, the same at every token, so that all means are those of L_n;
    - `init_loss` by (chain, token_pos): L_n(w*);
    - `input_ids_{name}` by (batch_{name}, token): -1 where they are not given.

    Attributes: `metadata`, with the settings where devinterp has them (`n_beta` is nbeta, its
    `num_steps_bw_draws` is `thin`; there is no learning rate), and `nbeta`, `localization`, `llc`,
    `llc_sem`. Its `compute_llc` on the tree gives the llc of the draws.

    Args:
        draws: From `sample_posterior` or `load_draws`; losses that are on disk are read to memory.
        input_ids: Numbers of the tokens by the name of the data set, shape (examples, tokens + 1).

    Returns:
        An `xarray.DataTree`.

    Raises:
        DataError: If data sets have different numbers of tokens, which share an axis there, two
            names are one in letters, digits and underscores, or numbers of tokens do not fit.
        MissingExtraError: If xarray is not installed.
    """
    xarray = import_optional("xarray", extra="arviz", distribution="xarray", purpose="to_devinterp")
    tokens, input_ids = _tokens_in(draws), dict(input_ids or {})
    names = _identifiers(draws.losses)
    unknown = sorted(input_ids.keys() - names.keys())
    if unknown:
        raise DataError(f"input_ids are of {unknown[0]!r}, whose losses were not evaluated.")
    energies = np.asarray(draws.energies, float)
    loss = (draws.init_loss + energies / draws.nbeta).astype(np.float32)
    loss = np.broadcast_to(loss[..., None], (*loss.shape, tokens))
    start = np.full((draws.num_walkers, tokens), draws.init_loss, np.float32)
    variables: dict[str, Any] = {
        "init_loss": (("chain", "token_pos"), start),
        "sampling_loss": (TRACE, loss),
        "sampling_loss_micro": (STEPS, loss),
    }
    for name, short in names.items():
        values = np.asarray(draws.losses[name])
        values = values.reshape(*values.shape[:3], tokens)
        batch = f"batch_{short}"
        variables[f"loss_{short}"] = ("chain", "draw", batch, "token_pos"), values
        ids = _checked_ids(name, input_ids.get(name), (values.shape[2], tokens + 1))
        variables[f"input_ids_{short}"] = (batch, "token"), ids
    dataset = xarray.Dataset(variables, attrs=_attributes(draws, names, tokens))
    return xarray.DataTree(dataset=dataset)


def _tokens_in(draws: PosteriorDraws) -> int:
    counts = {name: math.prod(one.shape[3:]) for name, one in draws.losses.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise DataError(
            f"all losses share one axis of tokens in devinterp's layout; {listed}. Draw with data "
            "of one kind, in losses or in token_losses."
        )
    return next(iter(counts.values()), 1)


def _identifiers(losses: Mapping[str, Any]) -> dict[str, str]:
    """Return names of letters, digits and underscores, as devinterp makes them."""
    names = {name: re.sub(r"\W", "_", name) or "_" for name in losses}
    names = {name: f"_{one}" if one[0].isdigit() else one for name, one in names.items()}
    if len(set(names.values())) < len(names):
        raise DataError(
            "names of data sets must differ in letters, digits and underscores for devinterp; got "
            f"{list(names)}."
        )
    return names


def _checked_ids(name: str, ids: Any, shape: tuple[int, int]) -> np.ndarray:
    if ids is None:
        return np.full(shape, UNKNOWN, np.int64)
    ids = np.asarray(ids)
    if ids.shape != shape or ids.dtype.kind not in "iu":
        raise DataError(
            f"input_ids[{name!r}] must be integers of shape {shape}, a token more than there are "
            f"losses; got {ids.dtype} of shape {ids.shape}."
        )
    return ids.astype(np.int64)


def _attributes(draws: PosteriorDraws, names: Mapping[str, str], tokens: int) -> dict[str, Any]:
    sampler = {
        "n_beta": draws.nbeta,
        "localization": draws.localization,
        "num_chains": draws.num_walkers,
        "num_draws": draws.num_draws,
        "num_steps_bw_draws": draws.thin,
        "num_burnin_steps": 0,
        "batch_size": draws.energies.shape[-1],
        "sampling_method": "fastvi",
    }
    observables = [
        {"type": "ObserveDifferentDataset", "obs_id": short, "batches_per_draw": 1}
        for short in names.values()
    ]
    return {
        "metadata": {
            "config": {
                "sampler": sampler,
                "observables": observables,
                "shared_observable_dims": ["token", "token_pos"],
                "tokenizer_context_length": tokens + 1,
            }
        },
        "completed": 1,
        "nbeta": draws.nbeta,
        "localization": draws.localization,
        "llc": float(draws.llc_estimate.value),
        "llc_sem": float(draws.llc_estimate.sem),
    }
