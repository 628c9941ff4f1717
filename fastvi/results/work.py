"""The work of a fit, finished or planned: counts of calls, and the price of each stage."""

from typing import Any, NamedTuple

from fastvi.config import VIConfig
from fastvi.evaluation.llc import draws_at_once, losses_beside
from fastvi.fitting.calibrate import MAX_ROUNDS, calibration_steps
from fastvi.fitting.run import Fit
from fastvi.geometry.minimum import LINE_POINTS
from fastvi.geometry.start import StartSettings, most_products
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


class FitCounts(NamedTuple):
    """What decides the work of a fit, beside its configuration.

    Attributes:
        steps: Steps of each chain.
        calibration_rounds: Rounds that narrowed the start.
        start_products: Hessian-vector products of the start, the whitening's left out.
        moment_rows: Rows that the control variate "hvp" multiplies with.
        has_slope: Whether the gradient at w* of all data is found.
        descent_losses: Losses on all data that followed the least curvature at w*.
        is_warm: Whether it began at another fit, whose whitening and curvature it took.
    """

    steps: int
    calibration_rounds: Any
    start_products: Any
    moment_rows: int
    has_slope: bool
    descent_losses: int = 0
    is_warm: bool = False


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
    counts = FitCounts(
        fit.traces["elbo"].shape[1],
        _concrete(fit.calibration_rounds),
        _concrete(fit.start.num_hvp),
        fit.family.num_moment_terms,
        fit.outcome.slope is not None,
        descent_losses,
        fit.warm,
    )
    ridges = fit.traces.get("cholesky_ridge")
    work = _price(counts, problem, config, num_chains, look)
    return work._replace(n_cholesky_ridge=0 if ridges is None else _concrete(ridges.sum()))


def bound_work(
    problem: Problem,
    config: VIConfig,
    start: StartSettings,
    num_chains: int,
    look: LossLook = LossLook(),
    is_warm: bool = False,
) -> RunWork:
    """Return the most work that a fit of `estimate_llc` with this configuration can take."""
    filled, center = config.filled, problem.posterior.center
    products = 0 if is_warm else most_products(start, center.size, center.dtype.itemsize)
    # The line that follows the least curvature has w* beside its points.
    beside = losses_beside(LINE_POINTS, filled.evaluation_draws)
    counts = FitCounts(filled.steps, MAX_ROUNDS, products, center.size, True, beside, is_warm)
    return _price(counts, problem, config, num_chains, look)


def _price(
    counts: FitCounts, problem: Problem, config: VIConfig, num_chains: int, look: LossLook
) -> RunWork:
    """Count calls, and price each stage."""
    config, num_data, dim = config.filled, problem.num_data, problem.posterior.center.size
    draws = config.evaluation_draws
    gradients = counts.steps * config.step_draws * num_chains
    # A fit that began at another took its whitening, which that one has paid for.
    whitening = "" if counts.is_warm else config.whitening
    moment = MOMENT_GRADIENTS if whitening in ("rmsprop", "adam") else 0
    start_hvp = counts.start_products + DIAGONAL_PROBES * (whitening == "hvp_diag")
    # One product for each draw, and the trace: the rows exactly, what they leave by probes.
    products = draws + min(counts.moment_rows, dim) + config.trace_probes
    evaluation_hvp = num_chains * products * (config.control_variate == "hvp")
    # Every group of a chain's draws has w* beside it, the first one with the gradient there.
    groups = draws // draws_at_once(draws)
    beside = Work(losses=groups - 1, gradients=1) if counts.has_slope else Work(losses=1)
    calibration = calibration_steps(num_chains, config.step_draws) * num_chains * config.step_draws
    minibatches = moment + calibration * counts.calibration_rounds
    curvature = Work(
        gradients=problem.batch_size * minibatches,
        losses=num_data * counts.descent_losses,
        # The start's Hessian is of a part of the data (docs/math.md, Start).
        hessian_products=min(num_data, config.hessian_examples) * start_hvp,
    )
    # Of evaluations on all data, one is a full-gradient equivalent times its price.
    evaluation = Work(
        num_chains * beside.gradients, num_chains * (draws + beside.losses), evaluation_hvp
    )
    stages = {
        "fge_look": Work(gradients=look.sample_gradients).fge(num_data),
        "fge_curvature": curvature.fge(num_data),
        "fge_fit": Work(gradients=problem.batch_size * gradients).fge(num_data),
        "fge_evaluation": evaluation.sample_gradients,
    }
    return RunWork(
        n_full_loss=num_chains * draws + counts.descent_losses,
        n_minibatch_grads=gradients,
        n_hvp=start_hvp + evaluation_hvp,
        n_cholesky_ridge=0,
        **stages,
        fge_per_step=Work(gradients=problem.batch_size * config.step_draws).fge(num_data),
        total_fge=sum(stages.values()),
    )


def _concrete(value: Any) -> Any:
    """Return a Python int where the value is known."""
    try:
        return int(value)
    # jax's concretisation errors are TypeErrors: the run is being traced.
    except TypeError:
        return value
