"""`split_llc`: the llc of an estimate off a minimum, by drift and spread."""

import math

import numpy as np

from fastvi._errors import DataError
from fastvi._modes import in_own_modes
from fastvi.observables.covariance import Estimate
from fastvi.observables.evaluate import mean_energies
from fastvi.observables.split import Split, drift_of, group_means
from fastvi.results.estimate import LLCEstimate


@in_own_modes
def split_llc(result: LLCEstimate) -> Split:
    """Split llc into the drift of the posterior's mean from w*, and the spread about that mean.

    With m the mean of the posterior, llc = nbeta (L_n(m) - L_n(w*)) + nbeta (E[L_n(w)] - L_n(m)).
    The first part is near 0 at a minimum and negative at a checkpoint in the middle of training,
    the second what llc is at a minimum. The mean is that of the walkers where they ended, so that
    the drift is known to about llc over their number; `sample_posterior(result).split` averages
    along draws and knows it better.

    Args:
        result: An estimate of this process whose llc walkers have found.

    Returns:
        Both parts, with errors.

    Raises:
        DataError: If the result holds no walkers, one alone, its data are a stream, or its loss has
            changed since.

    Cost:
        At most 18 losses on all data.
    """
    ensemble = result.ensemble
    if ensemble is None or not ensemble.target.problem.holds_all:
        raise DataError(
            "this estimate holds no walkers whose mean could be evaluated: it was loaded from "
            'disk, made without them or on a stream. Run estimate_llc with method="sample" on data '
            "in memory."
        )
    ensemble.target.check_unchanged()
    displacement = ensemble.displacement
    points = group_means(displacement).with_draw(displacement).points()
    if not len(points):
        raise DataError("one walker does not tell drift from spread: take two or more.")
    drift = drift_of(mean_energies(ensemble.target, points))
    # the two errors are added: walkers that are off one way make both parts so
    error = math.hypot(result.llc_sem, float(drift.sem))
    return Split(drift, Estimate(np.asarray(result.llc - drift.value), np.asarray(error)))
