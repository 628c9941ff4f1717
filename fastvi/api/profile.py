"""`profile`: llc over temperatures and localizations, walkers carried from cell to cell."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._modes import in_own_modes
from fastvi._typing import Float, Given
from fastvi.api.arguments import positive_scalar
from fastvi.api.grid import Cell, GridWalk, cells_of
from fastvi.api.plan import default_budget
from fastvi.api.resample import correct
from fastvi.fitting.protocols import Progress
from fastvi.results.estimate import LLCEstimate
from fastvi.results.llc_profile import LLCProfile
from fastvi.results.progress import reporting
from fastvi.sampling.ensemble import BlockEnsemble

# Multiples of the estimate's own n beta and localization that a profile has by default. From one to
# the next llc of a direction that both hold changes by a factor of up to 4; at half of that, the
# same range takes twice the cells, at double, walkers have further to go between them. n beta ends
# at 4 n / log n, near n itself, and localization begins at a quarter: below, walkers take long.
NBETA_FACTORS = (1 / 16, 1 / 4, 1.0, 4.0)
LOCALIZATION_FACTORS = (1 / 4, 1.0, 4.0, 16.0)


@in_own_modes
def profile(
    result: LLCEstimate,
    nbetas: Given[Sequence[float] | None] = None,
    localizations: Given[Sequence[float] | None] = None,
    *,
    error: Given[float | None] = None,
    budget: Given[float | None] = None,
    progress: Given[bool | Callable[[Progress], None]] = True,
) -> LLCProfile:
    """Estimate llc over a grid of n beta and localization.

    The walkers of an estimate go on from cell to cell, each time from the nearest one that is
    finished. Their coordinates are made round anew by the curvature that those before imply, and
    nothing is fitted. In every cell they burn in, average and end as in `correct`. The estimate's
    own cell is taken over where it is as exact as asked.

    Args:
        result: An estimate of this process by a fit, from `estimate_llc`.
        nbetas: n times the inverse temperatures; 1/16, 1/4, 1 and 4 times the estimate's own when
            left out.
        localizations: Strengths of the localizer, above 0; 1/4, 1, 4 and 16 times the estimate's
            own when left out.
        error: Standard error of each cell that ends it, relative to llc; that of the estimate when
            left out.
        budget: Sample gradients of each cell, at most; that of the estimate when left out.
        progress: Whether to show a status line on stderr, or a function that receives `Progress`.

    Returns:
        llc of each cell with its error, slopes between cells, and findings.

    Raises:
        ConfigError: If a number is impossible, or the budget pays for no walk.
        DataError: If the result holds no walkers of a fit (it was loaded from disk, or walked from
            the localizer), or its loss has changed since.

    Cost:
        For each cell a walk from walkers that are near. On a digits network all cells together took
        two thirds of the work of new estimates at an error of 5 %, and nine tenths at 3 %, where
        averaging is most of it.
    """
    grid = (
        _axis("nbetas", nbetas, NBETA_FACTORS, result.nbeta),
        _axis("localizations", localizations, LOCALIZATION_FACTORS, result.localization),
    )
    if error is not None and not 0 < error < 1:
        raise ConfigError(f"error must be between 0 and 1, as a share of llc; got {error}.")
    if budget is not None:
        positive_scalar("budget", budget)
    own = _walked(result, error, budget, progress)
    walk = GridWalk(
        own,
        error or own.config.error,
        budget or own.config.budget or default_budget(own.n_data),
        own.fit_for("go on from").check_unchanged(),
    )
    with reporting(progress) as report:
        cells = walk.over(grid, report)
    return _assembled(own, grid, cells)


def _walked(
    result: LLCEstimate,
    error: float | None,
    budget: float | None,
    progress: bool | Callable[[Progress], None],
) -> LLCEstimate:
    """Return an estimate that holds walkers, of a run that is made now where there are none."""
    result.fit_for("go on from")
    if result.ensemble is None:
        result = correct(result, "sample", error=error, budget=budget, progress=progress)
    if not isinstance(result.ensemble, BlockEnsemble):
        least = result.correction.least_budget if result.correction else None
        raise DataError(
            "this estimate holds no walkers, as its budget paid for none"
            + (f": {math.ceil(least)} sample gradients are enough." if least else ".")
        )
    return result


def _axis(
    name: str, given: Sequence[float] | None, factors: tuple[float, ...], own: float
) -> Float[np.ndarray, " values"]:
    """Return the values of an axis of the grid, rising."""
    if given is None:
        if own <= 0:
            raise ConfigError(
                f"{name} are multiples of the estimate's own by default, and that is {own}: pass "
                f"{name}."
            )
        return own * np.array(factors)
    if not np.size(given):
        raise ConfigError(f"{name} must hold at least one number; got {given!r}.")
    values = [positive_scalar(f"each of {name}", one) for one in given]
    if len(set(values)) < len(values):
        raise ConfigError(f"{name} must differ from each other; got {given!r}.")
    return np.sort(np.asarray(values, float))


def _assembled(
    own: LLCEstimate, grid: tuple[np.ndarray, np.ndarray], cells: dict[tuple[int, int], Cell]
) -> LLCProfile:
    """Put the cells into arrays."""
    shape = tuple(map(len, grid))

    def array(name: str) -> np.ndarray:
        values = [getattr(cells[index], name) for index in cells_of(grid)]
        return np.array(values, float).reshape(shape)

    return LLCProfile(
        nbetas=grid[0],
        localizations=grid[1],
        llc=array("llc"),
        llc_sem=array("llc_sem"),
        radius=array("radius"),
        radius_sem=array("radius_sem"),
        fge=array("fge"),
        fge_before=own.work.total_fge,
        health=tuple(
            tuple(cells[row, column].health for column in range(shape[1]))
            for row in range(shape[0])
        ),
        nbeta=own.nbeta,
        localization=own.localization,
        dim=own.dim,
        n_data=own.n_data,
    )
