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
from fastvi.sampling.averages import standard_error
from fastvi.sampling.cells import WalkedCell, walk_cell
from fastvi.sampling.ensemble import BlockEnsemble
from fastvi.sampling.run import Check
from fastvi.target.fingerprint import Fingerprint, fingerprint_loss

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
        For each cell a walk from walkers that are near: a third to a half of a new estimate.
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
        own = np.log([self.own.nbeta, self.own.localization])
        at = {
            (row, column): np.log([nbeta, gamma])
            for row, nbeta in enumerate(grid[0])
            for column, gamma in enumerate(grid[1])
        }
        assert self.own.correction is not None, "walkers have corrected it"
        begins = {None: (own, self.own.ensemble, self.own.correction.settled)}
        cells: dict[tuple[int, int], _Cell] = {}
        for number, cell in enumerate(sorted(at, key=lambda one: _distance(at[one], own)), 1):

            def tell(done: float, llc: float, number: int = number) -> None:
                if report is not None:
                    report(
                        Progress(f"cell {number} of {len(at)}", int(done), int(self.budget), llc)
                    )

            _, before, is_settled = min(
                begins.values(), key=lambda one, cell=cell: _distance(one[0], at[cell])
            )
            walked = self._walk(before, cell, grid, number, is_settled, tell)
            cells[cell] = self._said(walked)
            begins[cell] = at[cell], walked.ensemble, not walked.check.unmet
        return cells

    def _walk(
        self,
        before: BlockEnsemble,
        cell: tuple[int, int],
        grid: tuple[np.ndarray, np.ndarray],
        number: int,
        is_settled: bool,
        tell: Callable[[float, float], None],
    ) -> WalkedCell:
        """Walk a cell from the walkers of another."""
        old = before.target.problem.posterior
        values = (
            jnp.asarray(axis[index], old.center.dtype)
            for axis, index in zip(grid, cell, strict=True)
        )
        posterior = type(old)(old.center, *values)
        return walk_cell(
            before,
            posterior,
            number,
            is_settled=is_settled,
            error=self.error,
            budget=self.budget,
            report=tell,
        )

    def _said(self, walked: WalkedCell) -> _Cell:
        """Read off what a cell says, with its findings."""
        target, num_data = walked.ensemble.target, self.own.n_data
        rounding = nats_of_rounded_products(
            target.objective, self.loss, target.problem, lambda: walked.ensemble.displacement
        )
        analysis, before = walked.check.analysis, self.own.correction
        assert before is not None, "walkers have corrected it"
        parts = analysis.parts.plus(evaluation=rounding)
        correction = Correction(
            method="sample",
            khat=math.nan,
            narrow_dtype=before.narrow_dtype,
            product_rounding=rounding,
            **run_details(walked.run, walked.run.setup.settings, 0.0),
        )
        posterior = target.problem.posterior
        # findings of the fit are of another posterior, and so is its q
        as_estimate = dataclasses.replace(
            self.own,
            llc=analysis.llc,
            llc_sem=parts.total,
            error_parts=parts,
            nbeta=float(posterior.nbeta),
            localization=float(posterior.gamma),
            correction=correction,
            llc_vi=math.nan,
            health=(),
            config=self.own.config.replace(error=self.error, budget=self.budget),
        )
        radius = _radius(walked.check)
        fge = walked.work / num_data
        return _Cell(analysis.llc, parts.total, *radius, fge, correction_findings(as_estimate))


def _radius(check: Check) -> tuple[float, float]:
    """Return the root mean square of |w - w*| and its error."""
    kept = check.radius2[:, check.analysis.burn_in :]
    root = float(np.sqrt(kept.mean()))
    return root, standard_error(kept) / (2 * root)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return how far walkers have to go between two cells, in powers of e."""
    return float(np.sum(np.abs(one - other)))


def _assembled(
    own: LLCEstimate, grid: tuple[np.ndarray, np.ndarray], cells: dict[tuple[int, int], Any]
) -> LLCProfile:
    """Put the cells into arrays."""
    shape = tuple(map(len, grid))

    def array(name: str) -> np.ndarray:
        values = [getattr(cells[index], name) for index in np.ndindex(*shape)]
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
