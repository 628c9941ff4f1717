"""`sample_posterior`: walkers of a finished estimate go on, and say more than their llc."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastvi._errors import ConfigError, DataError
from fastvi._modes import in_own_modes
from fastvi._typing import Batch, Given
from fastvi.api.draw_values import DrawValues, Report
from fastvi.api.resample import correct
from fastvi.fitting.protocols import Progress
from fastvi.observables.evaluate import mean_energies
from fastvi.observables.posterior import PosteriorDraws
from fastvi.observables.split import group_means
from fastvi.observables.storage import MemorySink
from fastvi.results.draw_findings import with_findings
from fastvi.results.draw_folder import DrawFolder, DrawPlan
from fastvi.results.draw_identity import LOSSES, OBSERVABLES, TRACES, identify_draws
from fastvi.results.estimate import LLCEstimate
from fastvi.results.stored_draws import stored_draws
from fastvi.sampling.ensemble import AbstractEnsemble

# Steps between two draws. Half of it makes draws that are nearly alike, double leaves half of what
# the steps have paid for unused.
THIN = 4
# What noise and steps may add to llc. Half of it takes a quarter more steps and twice the
# gradients, double is seen in the mean of some thousand draws.
ERROR = 0.005
# Numbers that draws may hold before it is asked whether that was meant: 4 GiB in float32.
MOST_NUMBERS = 2**30


@in_own_modes
def sample_posterior(
    result: LLCEstimate,
    draws: Given[int] = 200,
    *,
    losses: Mapping[str, Given[Batch]] | None = None,
    token_losses: Mapping[str, Given[Batch]] | None = None,
    observables: Mapping[str, Any] | None = None,
    thin: Given[int] = THIN,
    error: Given[float] = ERROR,
    keep_params: Given[bool] = False,
    store: Given[str | os.PathLike[str] | None] = None,
    progress: Given[bool | Callable[[Progress], None]] = True,
) -> PosteriorDraws:
    """Draw from the local posterior, and evaluate there what you name.

    The walkers of an estimate go on from where they ended: they have burnt in. Where an estimate
    was made without any, from q alone or by its reweighted draws, they run first.

    Args:
        result: An estimate of this process, from `estimate_llc`.
        draws: Draws of each walker.
        losses: Data sets by name, of the structure that the loss takes. The loss of each example is
            kept for each draw; where the loss returns the mean of a batch, each example is passed
            as a batch of one.
        token_losses: The same, of which the loss of each token is kept: the loss returns an array
            of shape (batch, tokens), or `(losses, weights)` of that shape. Weights multiply: a
            token has `weight * loss` over the mean weight of a token, so that the mean over all
            tokens is the loss of the data, and one that is masked has 0.
        observables: By name, `(function, data)` with `function(params, data)` an array, or a
            function alone, which is given all data of the estimate.
        thin: Steps between two draws of a walker; an even number.
        error: What gradient noise and finite steps may each add to llc, relative to it. No control
            variate takes it off draws, so it is smaller than that of an estimate.
        keep_params: Whether to keep the parameters of every draw where there are more than 4,096
            of them; fewer are kept in any case.
        store: A folder to which all that is evaluated goes while walkers move, as zarr arrays in
            single precision. If it holds draws of the same configuration the run goes on from the
            last whole block of them, with more `draws` than before too; draws that are there
            already are all returned. Draws are held in memory when left out.
        progress: Whether to show a status line on stderr, or a function that receives `Progress`.

    Returns:
        The draws, with covariances, influences, susceptibilities and llc on each data set.

    Raises:
        ConfigError: If a number is impossible, or a name is given twice.
        DataError: If the result holds no walkers (it was loaded from disk), its loss has changed
            since, its data are not held in memory, data cannot be used, or the store holds
            something else or draws of another configuration.
        MissingExtraError: If there is a store and zarr is not installed.

    Cost:
        For each draw of a walker `thin` steps, a gradient on all data, and a loss of each example
        that is named. Where gradients on all data are dear, they are taken on two samples instead.
        With a store, 8 MiB for a block of draws, and as many that wait for the disk.
    """
    _check_numbers(draws, thin, error)
    ensemble = _walkers_of(result, progress)
    target = ensemble.target
    target.check_unchanged()
    if not target.problem.holds_all:
        raise DataError(
            "draws are evaluated on all data, and these are a stream. Hold them in memory as "
            "arrays."
        )
    evaluation = DrawValues(target, losses or {}, token_losses or {}, observables or {})
    asked = _Asked(draws, thin, error, keep_params)
    if store is None:
        return _hold(evaluation, ensemble, asked, progress)
    return _write(evaluation, ensemble, asked, store, progress)


class _Asked(NamedTuple):
    """What draws are asked for."""

    draws: int
    thin: int
    error: float
    keep_params: bool


def _check_numbers(draws: int, thin: int, error: float) -> None:
    if draws < 8:
        raise ConfigError(
            f"draws must be at least 8 of each walker, for errors to be told; got {draws}."
        )
    if thin < 2 or thin % 2:
        raise ConfigError(
            "thin must be an even number of steps, as walkers keep their blocks for two; got "
            f"{thin}."
        )
    if not 0 < error < 1:
        raise ConfigError(f"error must be between 0 and 1, as a share of llc; got {error}.")


def _walkers_of(result: LLCEstimate, progress: Report) -> AbstractEnsemble:
    """Return the walkers of an estimate, of a run that is made now where there are none."""
    if result.ensemble is None and result.fitted is not None:
        result = correct(result, "sample", progress=progress)
    if result.ensemble is None:
        raise DataError(
            "this estimate holds no walkers: it was loaded from disk, walked on a stream, is not "
            "the last of a curve, or walked from the localizer in more than half a million "
            "dimensions. Run estimate_llc again, on data in memory or with "
            "sampler={'start': 'fit'}."
        )
    return result.ensemble


def _hold(
    evaluation: DrawValues, ensemble: AbstractEnsemble, asked: _Asked, progress: Report
) -> PosteriorDraws:
    """Draw, and hold what is evaluated in memory."""
    walkers, shapes = ensemble.displacement.shape[0], evaluation.shapes(asked.keep_params)
    check_size(walkers, asked.draws, sum(math.prod(shape) for shape in shapes.values()))
    sink = MemorySink(walkers, asked.draws, shapes)
    begun = ensemble.awake(asked.error), group_means(ensemble.displacement)
    end, means = evaluation.run(*begun, sink, asked.draws, asked.thin, progress)
    found = PosteriorDraws(
        **{name: sink.array(name) for name in TRACES},
        losses={name: sink.array(LOSSES + name) for name in evaluation.losses},
        init_losses=evaluation.init_losses,
        observables={name: sink.array(OBSERVABLES + name) for name in evaluation.observables},
        **evaluation.numbers,
        thin=asked.thin,
        fge=evaluation.fge(end, asked.draws),
        displacement=sink.array("displacement") if "displacement" in shapes else None,
        gradient=sink.array("gradient") if "gradient" in shapes else None,
        as_passed=evaluation.in_full,
        mean_energies=mean_energies(evaluation.target, means.points()),
    )
    return with_findings(found)


def check_size(walkers: int, draws: int, each: int) -> None:
    """Refuse draws that would not fit the memory.

    Raises:
        ConfigError: If they are more than `MOST_NUMBERS`.
    """
    if walkers * draws * each > MOST_NUMBERS:
        raise ConfigError(
            f"{walkers} walkers x {draws} draws x {each:,} numbers are more than the "
            f"{MOST_NUMBERS:,} that are held in memory. Name a folder as store, name fewer "
            "examples, make fewer draws, or reduce what you need to an observable."
        )


def _write(
    evaluation: DrawValues,
    ensemble: AbstractEnsemble,
    asked: _Asked,
    store: Given[str | os.PathLike[str]],
    progress: Report,
) -> PosteriorDraws:
    """Draw, or go on from the draws of a folder, and write what is evaluated there."""
    shapes = evaluation.shapes(asked.keep_params)
    identity = identify_draws(
        evaluation.target,
        ensemble.keys,
        shapes,
        {name: one.problem for name, one in evaluation.losses.items()},
        evaluation.observables,
        {"thin": asked.thin, "error": asked.error},
    )
    plan = DrawPlan(
        identity,
        {**evaluation.numbers, "thin": asked.thin},
        ensemble.displacement.shape[0],
        shapes,
        evaluation.init_losses,
    )
    folder = DrawFolder(store, plan, asked.draws)
    if folder.done < folder.draws or not folder.has_mean_energies:
        ensemble = ensemble.awake(asked.error)
        begun = folder.begin(ensemble, group_means(ensemble.displacement))
        means = evaluation.run(*begun, folder.sink(), folder.draws, asked.thin, progress)[1]
        folder.put_mean_energies(mean_energies(evaluation.target, means.points()))
    return stored_draws(folder.folder, evaluation.in_full)
