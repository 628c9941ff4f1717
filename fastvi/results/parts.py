"""The parts of an estimate: the one place of the names that summaries, pages and files read."""

from typing import Any, NamedTuple

import numpy as np

from fastvi.sampling.averages import standard_error
from fastvi.sampling.run import Check, Unmet


class Curvature(NamedTuple):
    """What is known of the spectrum of n beta L_n + localizer at w*.

    Attributes:
        rank: Rows of the core.
        wanted_rank: Directions that stand out from the rest of the spectrum.
        explained: Share of the trace that the core explains.
        trace: Trace of the precision, estimated by probes.
        spectrum: Leading eigenvalues, whitened if a whitening is on.
        newton_decrement: Nats of log posterior that a Newton step from w* would gain.
        lowest: Least curvature that was met, for a unit of displacement.
        products: How products with the Hessian were found; "none" of a walk without a fit.
    """

    rank: int
    wanted_rank: int
    explained: float
    trace: float
    spectrum: list[float]
    newton_decrement: float
    lowest: float
    products: str


class ChainValues(NamedTuple):
    """What each chain's q says by itself, one number for each chain.

    Attributes:
        elbo: ELBO on all data, in nats.
        llc: LLC under q, with control variates.
        llc_mc: The same without control variates.
        variance_reduction: Variance of `llc_mc` over that of `llc`.
        trace_term: What the control variates contribute, coefficients times expectations.
        log_weight_sd: Standard deviation of log p - log q over draws of q, in nats.
    """

    elbo: list[float]
    llc: list[float]
    llc_mc: list[float]
    variance_reduction: list[float]
    trace_term: list[float]
    log_weight_sd: list[float]


class Timings(NamedTuple):
    """Seconds of each stage; `compile` is a part of the others."""

    compile: float
    adaptation: float
    sampling: float
    evaluation: float
    total: float
    correction: float = 0.0

    def with_correction(self, seconds: float, compiling: float) -> "Timings":
        """Add the time of sampling the posterior, to that of an earlier time if there was one."""
        return self._replace(
            compile=self.compile + compiling,
            total=self.total + seconds,
            correction=self.correction + seconds,
        )


class DrawValues(NamedTuple):
    """The draws that q was evaluated at, arrays of shape (chains, draws).

    Attributes:
        excess_loss: L_n(w) - L_n(w*), in nats.
        log_q: Log density of q.
        resp_entropy: Entropy of which component the draw belongs to.
    """

    excess_loss: np.ndarray
    log_q: np.ndarray
    resp_entropy: np.ndarray


class Correction(NamedTuple):
    """How the posterior's own value was found; a field that its method lacks is None.

    Attributes:
        method: "reweight" or "sample".
        khat: Shape of the tail of the importance weights of q's draws.
        in_memory: Whether all data were at hand, so that sampling was possible.
        effective_draws: Draws that the weights leave.
        settled: Whether the walkers met all criteria.
        unmet: Criterion, value and bound of each that was not met.
        least_budget: Sample gradients of the shortest exact run.
        rhat: Split R-hat of llc.
        rhat_radius: Split R-hat of |w - w*|^2.
        rhat_core: Split R-hat of the width along q's low-rank directions.
        drift_z: Change from the first half to the second, in standard errors.
        virial_z: How far the posterior's virial identity is off, in standard errors.
        variance_reduction: By the virial control variates.
        walkers: Number of walkers.
        steps: Steps of each.
        first_step: Number of the first step that `walk_llc` is of, which with the key gives the
            noise of each step.
        burn_in: Steps that the averages leave out.
        radius: Root mean square of |w - w*|.
        radius_sem: Its standard error.
        data_blocks: Parts that the data were split into, of which a step takes two; 1 where
            gradients were those of all data.
        kept_examples: Examples that every step has beside its blocks, as they make most of the
            noise.
        energy_error: Mean square, per effective dimension, that the step size was held at, nats^2,
            beside `rounding`.
        step_size: Step of the dynamics in the walkers' coordinates.
        rounding: Root mean square of the energy errors that were allowed for rounding of the loss,
            in nats; 0 where no short steps have shown any.
        returned: Steps that were taken back, all walkers together.
        batch: Examples of a walker's minibatch, where each step draws them anew.
        stiffness: Largest eigenvalue of the Hessian of nbeta L_n in the walk's coordinates that a
            walk without a fit met.
        narrow_dtype: Half-precision type in which the loss sees parameters.
        product_rounding: Nats that llc has where walkers are for the digits that the model's
            products of matrices leave out; 0 where they keep all of single precision.
    """

    method: str
    khat: float
    in_memory: bool = True
    effective_draws: float | None = None
    settled: bool = True
    unmet: tuple[Unmet, ...] = ()
    least_budget: float | None = None
    rhat: float | None = None
    rhat_radius: float | None = None
    rhat_core: float | None = None
    drift_z: float | None = None
    virial_z: float | None = None
    variance_reduction: float | None = None
    walkers: int | None = None
    steps: int | None = None
    first_step: int | None = None
    burn_in: int | None = None
    radius: float | None = None
    radius_sem: float | None = None
    data_blocks: int | None = None
    kept_examples: int | None = None
    energy_error: float | None = None
    step_size: float | None = None
    rounding: float | None = None
    returned: float | None = None
    batch: int | None = None
    stiffness: float | None = None
    narrow_dtype: str | None = None
    product_rounding: float | None = None


def said_by_walkers(check: Check, bin_length: int, end: int) -> dict[str, Any]:
    """Return the fields of `Correction` that the last look at walkers says.

    Args:
        check: That look.
        bin_length: Steps of a bin.
        end: Steps that walkers had made by then.
    """
    analysis, llc, radius2, unmet = check
    radius, radius_sem = _root_mean(radius2[:, analysis.burn_in :])
    return {
        "settled": not unmet,
        "unmet": unmet,
        "rhat": analysis.rhat,
        "rhat_radius": analysis.rhat_radius,
        "rhat_core": analysis.rhat_core,
        "drift_z": analysis.drift_z,
        "virial_z": analysis.virial_z,
        "variance_reduction": analysis.variance_reduction,
        "walkers": llc.shape[0],
        # The look is at means over bins.
        "steps": llc.shape[1] * bin_length,
        "first_step": end - llc.shape[1] * bin_length,
        "burn_in": analysis.burn_in * bin_length,
        "radius": radius,
        "radius_sem": radius_sem,
    }


def _root_mean(squares: np.ndarray) -> tuple[float, float]:
    """Return the root of a mean over walkers and bins, and its error by the root's derivative."""
    if not np.all(np.isfinite(squares)):
        return float("nan"), float("nan")
    root = float(np.sqrt(squares.mean()))
    return root, standard_error(squares) / (2 * root) if root else 0.0
