"""The work of a finished fit: counts of calls, and the price of each stage."""

from typing import Any, NamedTuple

from fastvi.config import VIConfig
from fastvi.evaluation.llc import draws_at_once
from fastvi.fitting.calibrate import calibration_steps
from fastvi.fitting.run import Fit
from fastvi.geometry.whitening import DIAGONAL_PROBES, MOMENT_GRADIENTS
from fastvi.target.checks import LossLook
from fastvi.target.data import Problem
from fastvi.target.work import Work


class RunWork(NamedTuple):
    """Calls and FGE of all chains; Python numbers unless the run was traced.

    Attributes:
        n_full_loss: Losses on all data.
        n_minibatch_grads: Minibatch gradients of the fit.
        n_hvp: Hessian-vector products.
        n_cholesky_ridge: Factorisations during the fit that only a ridge made possible.
        fge_look: Checks of the loss before anything is compiled for long.
        fge_curvature: Curvature at w*, whitening, calibration, and the way down from a saddle.
        fge_fit: All steps of the fit.
        fge_evaluation: Losses under q, and L_n(w*).
        fge_per_step: One step of one chain.
        total_fge: All stages.
        fge_correction: Sampling of the posterior itself.
    """

    n_full_loss: int
    n_minibatch_grads: int
    n_hvp: int
    n_cholesky_ridge: int
    fge_look: float
    fge_curvature: float
    fge_fit: float
    fge_evaluation: float
    fge_per_step: float
    total_fge: float
    fge_correction: float = 0.0

    def with_correction(self, fge: float) -> "RunWork":
        """Add the work of sampling the posterior, to that of an earlier time if there was one."""
        return self._replace(
            fge_correction=self.fge_correction + fge, total_fge=self.total_fge + fge
        )


def count_work(
    fit: Fit,
    problem: Problem,
    config: VIConfig,
    num_chains: int,
    look: LossLook = LossLook(),
    descent_losses: int = 0,
) -> RunWork:
    """Count the work of a finished fit over all chains.

    Args:
        fit: The fit.
        problem: Target and data.
        config: The configuration that ran.
        num_chains: Number of chains.
        look: The checks of the loss.
        descent_losses: Losses on all data that followed the least curvature at w*.
    """
    config, num_data = config.filled, problem.num_data
    steps, draws = fit.traces["elbo"].shape[1], config.evaluation_draws
    gradients = steps * config.step_draws * num_chains
    whitening = "" if fit.warm else config.whitening
    # a fit that began at another one took its whitening and its curvature from there
    moment = MOMENT_GRADIENTS if whitening in ("rmsprop", "adam") else 0
    start_hvp = _concrete(fit.start.num_hvp) + DIAGONAL_PROBES * (whitening == "hvp_diag")
    evaluation_hvp = 0
    if config.control_variate == "hvp":
        rows = min(fit.family.num_moment_terms, problem.posterior.center.size)
        evaluation_hvp = num_chains * (draws + rows + config.trace_probes)
    # of each chain: every group of draws has w* beside it, the first one with the gradient there
    groups = draws // draws_at_once(draws)
    own = Work(losses=draws + 1)
    if fit.outcome.slope is not None:
        own = Work(losses=draws + groups - 1, gradients=1)
    calibration = calibration_steps(num_chains, config.step_draws) * num_chains * config.step_draws
    minibatches = moment + calibration * _concrete(fit.calibration_rounds)
    curvature = Work(
        gradients=problem.batch_size * minibatches,
        losses=num_data * descent_losses,
        hessian_products=min(num_data, config.hessian_examples) * start_hvp,
    )
    # of evaluations on all data, one is a full-gradient equivalent times its price
    evaluation = Work(num_chains * own.gradients, num_chains * own.losses, evaluation_hvp)
    ridges = fit.traces.get("cholesky_ridge")
    stages = {
        "fge_look": Work(gradients=look.sample_gradients).fge(num_data),
        "fge_curvature": curvature.fge(num_data),
        "fge_fit": Work(gradients=problem.batch_size * gradients).fge(num_data),
        "fge_evaluation": evaluation.sample_gradients,
    }
    return RunWork(
        n_full_loss=num_chains * draws + descent_losses,
        n_minibatch_grads=gradients,
        n_hvp=start_hvp + evaluation_hvp,
        n_cholesky_ridge=0 if ridges is None else _concrete(ridges.sum()),
        **stages,
        fge_per_step=Work(gradients=problem.batch_size * config.step_draws).fge(num_data),
        total_fge=sum(stages.values()),
    )


def _concrete(value: Any) -> Any:
    """Return a Python int where the value is known."""
    try:
        return int(value)
    except TypeError:  # jax's concretisation errors are TypeErrors: the run is being traced
        return value
