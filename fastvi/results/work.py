"""The work of a finished fit: counts of calls, and the price of each stage."""

import dataclasses
from typing import Any, NamedTuple

from fastvi.config import VIConfig
from fastvi.fitting.calibrate import calibration_steps
from fastvi.fitting.run import Fit
from fastvi.geometry.whitening import DIAGONAL_PROBES, MOMENT_GRADIENTS
from fastvi.target.checks import LossLook
from fastvi.target.data import Problem
from fastvi.target.work import Work


class Counts(NamedTuple):
    """Calls of all chains, whatever the number of examples of each.

    Attributes:
        n_full_loss: Losses on all data.
        n_minibatch_grads: Minibatch gradients of the fit.
        n_hvp: Hessian-vector products.
        n_cholesky_ridge: Factorisations during the fit that only a ridge made possible.
    """

    n_full_loss: Any
    n_minibatch_grads: Any
    n_hvp: Any
    n_cholesky_ridge: Any


@dataclasses.dataclass(frozen=True)
class RunWork:
    """The counts of a run and the work of its stages; `fge_per_step` is that of one chain."""

    counts: Counts
    stages: dict[str, Work]
    fge_per_step: float
    num_data: int

    def as_dict(self) -> dict[str, Any]:
        """Return counts and FGE; Python numbers unless the run was traced."""
        fge = {f"fge_{name}": work.fge(self.num_data) for name, work in self.stages.items()}
        total = sum(fge.values())
        return {
            **self.counts._asdict(),
            **fge,
            "fge_per_step": self.fge_per_step,
            "total_fge": total,
        }


def count_work(
    fit: Fit, problem: Problem, config: VIConfig, num_chains: int, look: LossLook = LossLook()
) -> RunWork:
    """Count the work of a finished fit over all chains."""
    config, num_data = config.filled, problem.num_data
    steps, draws = fit.traces["elbo"].shape[1], config.evaluation_draws
    gradients = steps * config.step_draws * num_chains
    whitening = "" if fit.warm else config.whitening
    moment = MOMENT_GRADIENTS if whitening in ("rmsprop", "adam") else 0
    start_hvp = _concrete(fit.start.num_hvp) + DIAGONAL_PROBES * (whitening == "hvp_diag")
    evaluation_hvp = 0
    if config.control_variate == "hvp":
        rows = min(fit.family.num_moment_terms, problem.posterior.center.size)
        evaluation_hvp = num_chains * (draws + rows + config.trace_probes)
    at_center = Work(losses=num_data) if fit.outcome.slope is None else Work(gradients=num_data)
    calibration = calibration_steps(num_chains, config.step_draws) * num_chains * config.step_draws
    minibatches = moment + calibration * _concrete(fit.calibration_rounds)
    stages = {
        "look": Work(gradients=look.sample_gradients),
        "curvature": Work(
            gradients=problem.batch_size * minibatches,
            hessian_products=min(num_data, config.hessian_examples) * start_hvp,
        ),
        "fit": Work(gradients=problem.batch_size * gradients),
        "evaluation": at_center
        + Work(losses=num_data * num_chains * draws, hessian_products=num_data * evaluation_hvp),
    }
    ridges = fit.traces.get("cholesky_ridge")
    counts = Counts(
        n_full_loss=num_chains * draws,
        n_minibatch_grads=gradients,
        n_hvp=start_hvp + evaluation_hvp,
        n_cholesky_ridge=0 if ridges is None else _concrete(ridges.sum()),
    )
    per_step = Work(gradients=problem.batch_size * config.step_draws).fge(num_data)
    return RunWork(counts, stages, per_step, num_data)


def with_losses(work: RunWork, losses: int) -> RunWork:
    """Add losses on all data that looked at the curvature at w*."""
    counts = work.counts._replace(n_full_loss=work.counts.n_full_loss + losses)
    curvature = work.stages["curvature"] + Work(losses=losses * work.num_data)
    return dataclasses.replace(work, counts=counts, stages={**work.stages, "curvature": curvature})


def _concrete(value: Any) -> Any:
    """Return a Python int where the value is known."""
    try:
        return int(value)
    except TypeError:  # jax's concretisation errors are TypeErrors: the run is being traced
        return value
