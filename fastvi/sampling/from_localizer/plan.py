"""Small functions that choose coordinates, step and batch, each with a known answer."""

import math
from typing import NamedTuple

import jax
import numpy as np

from fastvi._typing import Float, Vector
from fastvi._vectors import Leaves
from fastvi.sampling.from_localizer.setup import FRICTION_TIME, WalkSetup
from fastvi.sampling.run import HEAT_SHARE

# Step size, in standard deviations of the posterior, at most: four steps a radian. At half, the
# same time costs twice as much; at double, the walk is unstable from a stiffness of 10 on.
LARGEST_STEP = 0.3
# Step size times the square root of one plus the stiffness; the walk is unstable at 2. At half,
# stiff walks cost twice as much; at double, rounding and curvature that varies may end them.
LARGEST_ANGLE = 1.1
# Standard deviation of the share of a quadratic loss's heat that a loss has, which may be anything
# from 0.3 to 1; `HEAT_SHARE` of it is taken off.
HEAT_DOUBT = 0.2
# What the doubt of a heat as large as llc has beside: with it, a third of llc is the error.
LARGE_HEAT_DOUBT = 0.3
# Heat over the most that noise as large as that of the losses may have: measured on language models
# 0.4 to 0.8, on digits 0.8. Where a measurement before the walk says less, it has missed rare
# examples. Half leaves half of what they heat unseen; double overrules sound measurements.
SEEN_SHARE = 0.5
# Share of the wanted error that the doubt of the heat may take: at half, batches are twice as
# large; at double, the doubt alone is the error that was asked for.
DOUBT_SHARE = 0.5
TINY = 1e-30  # keeps quotients of zero by zero from NaN


class Measured(NamedTuple):
    """What a few gradients say of the posterior.

    Attributes:
        curvature: nbeta times the mean curvature of L_n in each array of parameters, at least 0.
        stiffness: Largest eigenvalue of the Hessian of nbeta L_n that was met, in round
            coordinates.
        decrement: Nats of log posterior that a step from w* along the gradient would gain.
        decrement_error: Its standard error.
        noise: Variance of the gradient of nbeta L on a part of a batch at w*, summed over
            directions in round coordinates.
        anchored_noise: The same at draws of the start, less what the same examples say at w*;
            infinite where it was not measured.
    """

    curvature: Float[np.ndarray, " leaves"]
    stiffness: float
    decrement: float
    decrement_error: float
    noise: float
    anchored_noise: float


def round_scale(setup: WalkSetup, curvature: Float[np.ndarray, " leaves"]) -> Vector:
    """Return the unit of each coordinate, `1 / sqrt(gamma + curvature)`, one for each array."""
    units = (1 / np.sqrt(float(setup.posterior.gamma) + curvature)).astype(setup.dtype)
    # put on the device, for which nothing is compiled
    if isinstance(setup.posterior.center, Leaves):
        return setup.programs.layout.share(Leaves(tuple(units)))
    return setup.programs.layout.share(jax.device_put(np.repeat(units, setup.leaf_sizes)))


def plan_step(stiffness: float) -> float:
    """Return the step size: stable in the stiffest direction that was met."""
    return min(LARGEST_STEP, LARGEST_ANGLE / math.sqrt(1 + stiffness))


def position_heat(
    step_size: float, friction_time: float, curvature: Float[np.ndarray, " directions"]
) -> Float[np.ndarray, " directions"]:
    """Return what gradient noise of unit variance adds to the mean square of a position.

    In units of its variance without noise, in directions of this total curvature, when every step
    draws the noise anew: `step^2 coth(step / (2 friction_time)) / 4` as the curvature goes to zero.
    """
    kept = math.exp(-step_size / friction_time)
    slow = step_size**2 * (1 + kept) / (4 * (1 - kept))
    return slow / (1 - np.minimum(step_size**2 * curvature / 4, 0.5))


def noise_heat(noise: float, step_size: float) -> float:
    """Return the most that noise of this variance, summed over directions, adds to llc."""
    return 0.5 * noise * float(position_heat(step_size, FRICTION_TIME, np.ones(1))[0])


def seen_heat(
    llc: Float[np.ndarray, "steps walkers"], step_size: float, is_anchored: bool
) -> tuple[float, float]:
    """Return what a walk's own losses say that the noise of its gradients adds to llc.

    Beside it is the standard error, by how walkers differ.

    Batches are fresh at every step, so half the mean square of the change of nbeta (L_B(w) -
    L_B(w*)) from step to step is the variance of that loss over batches, beside a small part by
    which the walkers move. A walk reads thousands of batches, and rare examples among them. The
    loss is the slope along the displacement, which is as long as it is wide in round coordinates:
    its variance is that of the gradient, summed over directions, and a quarter of it where the
    slope at w* has been taken off, since what is left grows with the distance.
    """
    if llc.shape[0] < 2:
        return 0.0, 0.0
    of_loss = 0.5 * np.mean(np.square(np.diff(llc, axis=0)), axis=0)
    of_one = SEEN_SHARE * noise_heat(4.0 if is_anchored else 1.0, step_size)
    error = float(np.std(of_loss, ddof=1)) / math.sqrt(of_loss.size) if of_loss.size > 1 else 0.0
    return of_one * float(np.mean(of_loss)), of_one * error


def wanted_parts(setup: WalkSetup, measured: Measured) -> float:
    """Return the parts that a raw batch should have, by its noise at w* and the curvatures."""
    sizes, gamma = np.asarray(setup.leaf_sizes), float(setup.posterior.gamma)
    llc = 0.5 * float(np.sum(sizes * measured.curvature / (gamma + measured.curvature)))
    step_size = plan_step(measured.stiffness)
    heat = noise_heat(measured.noise, step_size)
    return HEAT_DOUBT * heat / max(DOUBT_SHARE * setup.error * llc, TINY)


def plan_parts(heat_of_one: float, wanted: float, most: int) -> int:
    """Return the parts of a batch: as few as keep the doubt of the heat within what is wanted."""
    doubtful = HEAT_DOUBT * max(heat_of_one, 0.0)
    return int(np.clip(math.ceil(doubtful / max(wanted, TINY)), 1, most))


def heat_share(heat: float, llc: float, missed: float = 0.0) -> tuple[float, float]:
    """Return what the average takes off llc for the heat, and the standard deviation of the rest.

    A heat is part of the llc that was seen, so that one near it or above is known no better than to
    be between nothing and all of it. What a measurement has `missed` of the heat is doubted whole.
    """
    seen = abs(llc)
    share = -math.expm1(-max(heat, 0.0) / seen) if seen > 0 else 0.0
    doubt = HEAT_DOUBT + share**2 * LARGE_HEAT_DOUBT
    return HEAT_SHARE * share * seen, math.hypot(doubt * share * seen, HEAT_SHARE * missed)
