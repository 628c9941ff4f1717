"""What is known of the loss near w*: whether it falls, and how it curves."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._compilation import PROGRAMS
from fastvi.evaluation.llc import losses_beside
from fastvi.fitting.run import Fit
from fastvi.geometry.minimum import LINE_POINTS, Bottom, look_down
from fastvi.geometry.start import NewtonStep, newton_step
from fastvi.observables.evaluate import mean_energies
from fastvi.results.findings import LEAST_GAIN
from fastvi.sampling.ensemble import Target
from fastvi.target.hessian import second_derivative
from fastvi.target.losses import take_examples

# Shares of a Newton step at which its gain is measured. A quadratic gains at the whole step; one
# whose curvature was found too small by up to thirty times gains at the last share at least.
SHARES = np.array([1.0, 0.25, 0.0625])


class Minimum(NamedTuple):
    """What is known of the loss near w*.

    Attributes:
        bottom: What the direction of least curvature says.
        newton_gain: Nats of the log posterior that a Newton step gains, 0 at a minimum.
        products: How products with the Hessian were found.
        losses: Mean losses on all data that this took.
    """

    bottom: Bottom
    newton_gain: float
    products: str
    losses: int


def look_at_minimum(target: Target, fit: Fit, evaluation_draws: int) -> Minimum:
    """Read what a fit found of the loss near w*, and measure what it leaves open.

    Args:
        target: The posterior, and the data.
        fit: The finished fit.
        evaluation_draws: Draws of its evaluation, beside which the loss at w* was found.

    Cost:
        Four losses on all data where a Newton step promises a gain.
    """
    posterior, outcome = target.problem.posterior, fit.outcome
    assert outcome.slope is not None, "the loss on all data is a mean of loss_fn"
    bottom = look_down(
        posterior,
        fit.start,
        float(outcome.reference_loss),
        np.asarray(outcome.beside),
        losses_beside(LINE_POINTS, evaluation_draws),
    )
    nats, losses = _measured_gain(target, newton_step(fit.start, posterior, outcome.slope))
    return Minimum(bottom, nats, products_of(target), bottom.losses + losses)


def _measured_gain(target: Target, step: NewtonStep) -> tuple[float, int]:
    """Return what a Newton step gains, and how many losses on all data it took to know that.

    At a minimum where the loss has a kink, a gradient says nothing of where the loss falls: each
    side has its own, and a step along either rises. So a gain is believed if a loss confirms it.
    """
    if not step.gain > LEAST_GAIN or not target.problem.holds_all:
        return step.gain, 0
    posterior = target.problem.posterior
    points = SHARES[:, None] * step.displacement
    rises = mean_energies(target, jnp.asarray(points, posterior.center.dtype))
    held = 0.5 * float(posterior.gamma) * np.sum(points**2, axis=1)
    # where the loss is not finite nothing is gained
    gains = np.where(np.isfinite(rises), -rises - held, 0.0)
    return min(step.gain, max(float(np.max(gains)), 0.0)), len(SHARES) + 1


def products_of(target: Target) -> str:
    """Say how products with the Hessian of a loss are found."""
    center = target.problem.posterior.center
    few = take_examples(target.problem.data.examples, slice(1))
    return PROGRAMS.find(
        target.loss,
        ("second derivative",),
        (target.objective,),
        lambda objective: second_derivative(objective, center, few).value,
    )
