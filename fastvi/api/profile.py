"""`profile`: llc over temperatures and localizations, walkers carried from cell to cell."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._modes import in_own_modes
from fastvi._typing import Float, Given
from fastvi.api.arguments import positive_scalar
from fastvi.api.plan import default_budget
from fastvi.api.resample import correct, run_details
from fastvi.evaluation.products import nats_of_rounded_products
from fastvi.fitting.protocols import Progress
from fastvi.results.estimate import LLCEstimate
from fastvi.results.findings import Finding, correction_findings
from fastvi.results.llc_profile import LLCProfile
from fastvi.results.parts import Correction
from fastvi.results.progress import reporting
from fastvi.sampling.cells import WalkedCell, walk_cell
from fastvi.sampling.ensemble import BlockEnsemble
from fastvi.target.fingerprint import Fingerprint, fingerprint_loss
from fastvi.target.posterior import LocalPosterior

# Multiples of the estimate's own n beta and localization that a profile has by default. From one to
# the next llc of a direction that both hold changes by a factor of up to 4; at half of that, the
# same range takes twice the cells, at double, walkers have further to go between them. n beta ends
# at 4 n / log n, near n itself, and localization begins at a quarter: below, walkers take long.
NBETA_FACTORS = (1 / 16, 1 / 4, 1.0, 4.0)
LOCALIZATION_FACTORS = (1 / 4, 1.0, 4.0, 16.0)
# Relative difference up to which a cell is the estimate's own: rounding of single precision.
SAME = 1e-6


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
    own = _walked(result, error, budget, progress)
    posterior = own.ensemble.target.problem.posterior
    grid = (
        _axis("nbetas", nbetas, NBETA_FACTORS, float(posterior.nbeta)),
        _axis("localizations", localizations, LOCALIZATION_FACTORS, float(posterior.gamma)),
    )
    if error is not None and not 0 < error < 1:
        raise ConfigError(f"error must be between 0 and 1, as a share of llc; got {error}.")
    if budget is not None:
        positive_scalar("budget", budget)
    walk = _Walk(
        own,
        error or own.config.error,
        budget or own.config.budget or default_budget(own.n_data),
        fingerprint_loss(own.fitted.objective, own.fitted.problem),
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
    result.fit_for("go on from").check_unchanged()
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


class _Cell(NamedTuple):
    """What a profile keeps of a cell."""

    llc: float
    llc_sem: float
    radius: float
    radius_sem: float
    fge: float
    health: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The way over the grid: where it begins, and what each cell may take."""

    own: LLCEstimate
    error: float
    budget: float
    loss: Fingerprint

    def over(
        self, grid: tuple[np.ndarray, np.ndarray], report: Callable[[Progress], None] | None
    ) -> dict[tuple[int, int], _Cell]:
        """Walk all cells, each from the nearest one that is finished."""
        correction, ensemble = self.own.correction, self.own.ensemble
        assert correction is not None, "walkers have corrected it"
        # without a localizer, the weakest of the grid is the nearest
        own = np.log([self.own.nbeta, self.own.localization or grid[1][0]])
        at = {index: np.log([grid[0][index[0]], grid[1][index[1]]]) for index in _cells(grid)}
        ahead = sorted(at, key=lambda index: _distance(at[index], own))
        finished, cells = [_Finished(own, ensemble, correction.settled)], {}
        while ahead:
            index, number = ahead.pop(0), len(cells) + 1
            if self._is_own(index, grid):
                cells[index] = _said(self.own, 0.0)
                continue
            stage = f"cell {number} of {len(at)}"
            near = _nearest(finished, at[index])
            walked = self._walk(near, index, grid, number, self._telling(report, stage))
            cells[index] = _said(self._as_estimate(walked), walked.work / self.own.n_data)
            if math.isfinite(cells[index].llc):  # else nothing can begin there
                finished.append(_Finished(at[index], walked.ensemble, not walked.check.unmet))
            # walkers from which nothing will begin are let go
            wanted = [_nearest(finished, at[other]) for other in ahead]
            finished = [one for one in finished if any(one is other for other in wanted)]
        return cells

    def _is_own(self, index: tuple[int, int], grid: tuple[np.ndarray, np.ndarray]) -> bool:
        """Say whether the estimate itself is what a cell asks for."""
        own = self.own.nbeta, self.own.localization
        values = [axis[number] for axis, number in zip(grid, index, strict=True)]
        is_exact = self.own.llc_sem <= self.error * abs(self.own.llc)
        return is_exact and bool(np.allclose(values, own, rtol=SAME, atol=0))

    def _telling(
        self, report: Callable[[Progress], None] | None, stage: str
    ) -> Callable[[float, float], None]:
        def tell(done: float, llc: float) -> None:
            if report is not None:
                report(Progress(stage, int(done), int(self.budget), llc))

        return tell

    def _walk(
        self,
        near: "_Finished",
        index: tuple[int, int],
        grid: tuple[np.ndarray, np.ndarray],
        number: int,
        tell: Callable[[float, float], None],
    ) -> WalkedCell:
        """Walk a cell from the walkers of another."""
        center = near.ensemble.target.problem.posterior.center
        nbeta, gamma = (axis[one] for axis, one in zip(grid, index, strict=True))
        posterior = LocalPosterior(
            center, jnp.asarray(nbeta, center.dtype), jnp.asarray(gamma, center.dtype)
        )
        return walk_cell(
            near.ensemble,
            posterior,
            number,
            is_settled=near.is_settled,
            error=self.error,
            budget=self.budget,
            report=tell,
        )

    def _as_estimate(self, walked: WalkedCell) -> LLCEstimate:
        """Put a cell into the form that findings are read from: what is of a fit is left empty."""
        target, own, analysis = walked.ensemble.target, self.own, walked.check.analysis
        assert own.correction is not None, "walkers have corrected it"
        rounding = nats_of_rounded_products(
            target.objective, self.loss, target.problem, lambda: walked.ensemble.displacement
        )
        parts = analysis.parts.plus(evaluation=rounding)
        correction = Correction(
            method="sample",
            khat=math.nan,
            narrow_dtype=own.correction.narrow_dtype,
            product_rounding=rounding,
            **run_details(walked.run, walked.run.setup.settings, 0.0),
        )
        found = dataclasses.replace(
            own,
            llc=analysis.llc,
            llc_sem=parts.total,
            error_parts=parts,
            correction=correction,
            llc_vi=math.nan,
            health=(),
            config=own.config.replace(error=self.error, budget=self.budget),
        )
        return dataclasses.replace(found, health=correction_findings(found))


class _Finished(NamedTuple):
    """A finished cell: where it is, by logarithms, and its walkers."""

    at: np.ndarray
    ensemble: BlockEnsemble
    is_settled: bool


def _nearest(finished: list[_Finished], at: np.ndarray) -> _Finished:
    return min(finished, key=lambda one: _distance(one.at, at))


def _cells(grid: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return [(row, column) for row in range(len(grid[0])) for column in range(len(grid[1]))]


def _said(found: LLCEstimate, fge: float) -> _Cell:
    """Keep what a profile has of a cell."""
    details = found.correction
    assert details is not None, "walkers have found it"
    assert details.radius is not None, "they tell how far they are"
    assert details.radius_sem is not None, "and its error"
    return _Cell(found.llc, found.llc_sem, details.radius, details.radius_sem, fge, found.health)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return how far walkers have to go between two cells, in powers of e."""
    return float(np.sum(np.abs(one - other)))


def _assembled(
    own: LLCEstimate, grid: tuple[np.ndarray, np.ndarray], cells: dict[tuple[int, int], Any]
) -> LLCProfile:
    """Put the cells into arrays."""
    shape = tuple(map(len, grid))

    def array(name: str) -> np.ndarray:
        values = [getattr(cells[index], name) for index in _cells(grid)]
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
