"""Work in full-gradient equivalents (FGE).

A gradient on b of n examples is b/n, a loss a third, an HVP twice that.
"""

import dataclasses
from typing import Any

from fastvi.config import VIConfig
from fastvi.fitting.calibrate import CALIBRATION_DRAWS
from fastvi.fitting.run import Fit
from fastvi.geometry.whitening import DIAGONAL_PROBES, MOMENT_GRADIENTS
from fastvi.target.checks import LOSS_COST, LossLook
from fastvi.target.data import Problem

HVP_COST = 2.0


@dataclasses.dataclass(frozen=True)
class Work:
    """Counts of everything that a run evaluated; `fge_per_step` is that of one chain.

    `n_cholesky_ridge` counts factorisations during the fit that only a ridge made possible.
    """

    n_full_loss: Any
    n_minibatch_grads: Any
    n_hvp: Any
    n_cholesky_ridge: Any
    fge_look: Any
    fge_curvature: Any
    fge_fit: Any
    fge_evaluation: Any
    fge_per_step: float

    def as_dict(self) -> dict[str, Any]:
        """Return counts and totals; Python numbers unless the run was traced."""
        total = self.fge_look + self.fge_curvature + self.fge_fit + self.fge_evaluation
        return {**dataclasses.asdict(self), "total_fge": total}


def count_work(
    fit: Fit, problem: Problem, config: VIConfig, num_chains: int, look: LossLook = LossLook()
) -> Work:
    """Count the work of a finished fit over all chains."""
    config = config.filled
    num_draws = config.step_draws
    steps = fit.traces["elbo"].shape[1]
    share = problem.batch_size / problem.num_data
    subset = min(1.0, config.hessian_examples / problem.num_data)
    moment = MOMENT_GRADIENTS if config.whitening in ("rmsprop", "adam") and not fit.warm else 0
    diagonal = DIAGONAL_PROBES if config.whitening == "hvp_diag" and not fit.warm else 0
    start_hvp = _concrete(fit.start.num_hvp) + diagonal
    draws = config.evaluation_draws
    evaluation_hvp = 0
    if config.control_variate == "hvp":
        rows = min(fit.family.num_moment_terms, problem.posterior.center.size)
        evaluation_hvp = num_chains * (draws + rows + config.trace_probes)
    at_center = LOSS_COST if fit.outcome.slope is None else 1.0
    return Work(
        n_full_loss=num_chains * draws,
        n_minibatch_grads=steps * num_draws * num_chains,
        n_hvp=start_hvp + evaluation_hvp,
        n_cholesky_ridge=_concrete(fit.traces["cholesky_ridge"].sum())
        if "cholesky_ridge" in fit.traces
        else 0,
        fge_look=look.sample_gradients / problem.num_data,
        fge_curvature=HVP_COST * subset * start_hvp
        + share * (moment + CALIBRATION_DRAWS * _concrete(fit.calibration_rounds)),
        fge_fit=steps * num_draws * num_chains * share,
        fge_evaluation=LOSS_COST * num_chains * draws + at_center + HVP_COST * evaluation_hvp,
        fge_per_step=num_draws * share,
    )


def with_losses(work: Work, losses: int) -> Work:
    """Add losses on all data that looked at the curvature at w*."""
    return dataclasses.replace(
        work,
        n_full_loss=work.n_full_loss + losses,
        fge_curvature=work.fge_curvature + LOSS_COST * losses,
    )


def _concrete(value: Any) -> Any:
    """Return a Python int where the value is known."""
    try:
        return int(value)
    except TypeError:  # jax's concretisation errors are TypeErrors: the run is being traced
        return value
