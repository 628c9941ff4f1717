"""A run at another temperature and localization that begins where walkers of a finished run are."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from fastvi._errors import ConfigError
from fastvi.sampling.ensemble import BlockEnsemble
from fastvi.sampling.run import Check, SamplerResult, begin, run_walkers
from fastvi.sampling.tempering import temper_walkers
from fastvi.target.posterior import LocalPosterior


class WalkedCell(NamedTuple):
    """A finished run of a cell, and its walkers."""

    run: SamplerResult
    ensemble: BlockEnsemble

    @property
    def check(self) -> Check:
        """What its averages say."""
        return self.run.check

    @property
    def work(self) -> float:
        """Sample gradients that it took."""
        return self.run.end.work


def walk_cell(
    ensemble: BlockEnsemble,
    posterior: LocalPosterior,
    number: int,
    *,
    is_settled: bool,
    error: float,
    budget: float,
    report: Callable[[float, float, float], None],
) -> WalkedCell:
    """Take walkers over to a posterior, let them burn in there, and average.

    Args:
        ensemble: Where they are.
        posterior: The new one, about the same w*.
        number: Distinguishes their keys from those of other cells.
        is_settled: Whether they had settled: they need not agree anew as closely.
        error: Standard error that is wanted, relative to llc.
        budget: Sample gradients that the run never exceeds.
        report: Receives the work so far, llc and its error.

    Raises:
        ConfigError: If the budget pays for no run.
    """
    target, before = ensemble.target, ensemble.target.problem
    problem = dataclasses.replace(before, posterior=posterior)
    setup = ensemble.callable_setup
    setup = dataclasses.replace(
        setup,
        problem=setup.programs.layout.share(problem),
        error=error,
        budget=budget,
        report=report,
        agreed_before=is_settled,
    )
    walkers = temper_walkers(ensemble.walkers, before.posterior, posterior, number)
    start = begin(setup, walkers)
    if not setup.pays(start):
        least = setup.least_budget(start, setup.counts[0])
        raise ConfigError(
            f"budget={budget:.4g} sample gradients pay for no walk of a cell. {least:.0f} are "
            "enough."
        )
    run = run_walkers(setup, walkers)
    target = dataclasses.replace(target, problem=problem)
    return WalkedCell(run, BlockEnsemble.parked(target, run))
