"""A walk over a grid of temperatures and localizations, cell by cell."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi.api.resample import run_details
from fastvi.evaluation.products import nats_of_rounded_products
from fastvi.fitting.protocols import Progress
from fastvi.results.estimate import LLCEstimate
from fastvi.results.findings import Finding, correction_findings
from fastvi.results.parts import Correction
from fastvi.results.progress import tell_sampling
from fastvi.sampling.cells import WalkedCell, walk_cell
from fastvi.sampling.ensemble import BlockEnsemble
from fastvi.target.fingerprint import Fingerprint
from fastvi.target.posterior import LocalPosterior

# Relative difference up to which a cell is the estimate's own: rounding of single precision.
SAME = 1e-6


class Cell(NamedTuple):
    """What a profile keeps of a cell."""

    llc: float
    llc_sem: float
    radius: float
    radius_sem: float
    fge: float
    health: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True)
class GridWalk:
    """The way over the grid: where it begins, and what each cell may take."""

    own: LLCEstimate
    error: float
    budget: float
    loss: Fingerprint

    def over(
        self, grid: tuple[np.ndarray, np.ndarray], report: Callable[[Progress], None] | None
    ) -> dict[tuple[int, int], Cell]:
        """Walk all cells, each from the nearest one that is finished."""
        correction, ensemble = self.own.correction, self.own.ensemble
        assert correction is not None, "walkers have corrected it"
        # without a localizer, the weakest of the grid is the nearest
        own = np.log([self.own.nbeta, self.own.localization or grid[1][0]])
        at = {index: np.log([grid[0][index[0]], grid[1][index[1]]]) for index in cells_of(grid)}
        ahead = sorted(at, key=lambda index: _distance(at[index], own))
        finished, cells = [_Finished(own, ensemble, correction.settled)], {}
        while ahead:
            index, number = ahead.pop(0), len(cells) + 1
            if self._is_own(index, grid):
                cells[index] = _said(self.own, 0.0)
                continue
            stage = f"cell {number} of {len(at)}"
            near = _nearest(finished, at[index])
            tell = tell_sampling(report, stage, 1, self.budget, self.error)
            walked = self._walk(near, index, grid, number, tell)
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

    def _walk(
        self,
        near: "_Finished",
        index: tuple[int, int],
        grid: tuple[np.ndarray, np.ndarray],
        number: int,
        tell: Callable[[float, float, float], None],
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
        posterior = target.problem.posterior
        nbeta, gamma = float(posterior.nbeta), float(posterior.gamma)
        # what a Newton step gains is in proportion to n beta, but for the localizer's part
        gain = own.curvature.newton_decrement * nbeta / own.nbeta
        found = dataclasses.replace(
            own,
            nbeta=nbeta,
            localization=gamma,
            curvature=own.curvature._replace(newton_decrement=gain),
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


def cells_of(grid: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    """Return the indices of all cells, row by row."""
    return [(row, column) for row in range(len(grid[0])) for column in range(len(grid[1]))]


def _said(found: LLCEstimate, fge: float) -> Cell:
    """Keep what a profile has of a cell."""
    details = found.correction
    assert details is not None, "walkers have found it"
    assert details.radius is not None, "they tell how far they are"
    assert details.radius_sem is not None, "and its error"
    return Cell(found.llc, found.llc_sem, details.radius, details.radius_sem, fge, found.health)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return how far walkers have to go between two cells, in powers of e."""
    return float(np.sum(np.abs(one - other)))
