"""Is w* a minimum, and does anything bound the posterior?

The direction of least curvature is followed on all data.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from fastvi._typing import Float
from fastvi.geometry.start import Start
from fastvi.target.posterior import LocalPosterior

# Of the largest curvature: smaller ones are zero as far as single precision can tell. At half,
# rounding of a flat direction would be followed as a descent.
CURVATURE_ROUNDING = 1e-5
# Of the localization: a loss that curves down by less than this changes the width of the posterior
# along it by 5 % at most.
HELD = 0.1
# Distances along a direction that curves down, in units at which it is worth a nat; the shorter one
# finds a descent that has turned by then.
NEAR = (1.0, 0.3)
# Distances along a level direction, in root mean squares of w*, or 1 if that is smaller: a loss
# that stays level there bounds no posterior that anybody wants.
FAR = (10.0, 100.0)
LINE_POINTS = 2 * len(NEAR)  # both ways at each distance, of which there are as many FAR as NEAR
# Units in the last place that a difference of mean losses may be off. Half of them take more
# roundings for a fall; twice as many hide falls that are twice as deep.
ROUNDING_UNITS = 8
LEAST_CHANGE = 0.05  # nats that count as a rise or a fall: 5 % of what an llc of 1 weighs


class Bottom(NamedTuple):
    """What the direction of least curvature at w* says.

    Attributes:
        curvature: Of n beta L_n along it, for a unit of displacement; on the examples of the start.
        fall: Nats by which n beta L_n falls along it on all data, both ways averaged; 0 where it
            does not.
        level: Directions that neither the loss (to second order) nor the localizer narrows.
        is_flat: Whether the loss stays as it is along the one that was followed.
        losses: Mean losses on all data that this took.
    """

    curvature: float = math.nan
    fall: float = 0.0
    level: int = 0
    is_flat: bool = False
    losses: int = 0


def look_down(
    posterior: LocalPosterior,
    start: Start,
    reference_loss: float,
    excess: Float[np.ndarray, " points"],
    losses: int,
) -> Bottom:
    """Read what the loss does along the direction of least curvature.

    It is followed where the curvature is negative, or zero without a localizer. What a part of the
    data says of small curvatures is noise; the loss along the line is that of all data.

    Args:
        posterior: The target.
        start: What is known of the curvature.
        reference_loss: L_n(w*).
        excess: L_n at the points of `descent_line`, above that at w*.
        losses: Mean losses on all data that this takes.
    """
    line = descent_line(posterior, start)
    if line is None:
        return Bottom()
    if not line.is_followed:
        return Bottom(line.curvature)
    change = float(posterior.nbeta) * np.asarray(excess, float)
    least = LEAST_CHANGE + rounding_nats(posterior, reference_loss)
    half = LINE_POINTS // 2
    fall = -float(np.min(0.5 * (change[:half] + change[half:])))
    return Bottom(
        curvature=line.curvature,
        fall=fall if line.goes_down and fall > least else 0.0,
        level=line.num_level if line.is_level else 0,
        is_flat=line.is_level and bool(np.all(np.abs(change) <= least)),
        losses=losses,
    )


def rounding_nats(posterior: LocalPosterior, reference_loss: float) -> float:
    """Return the nats of n beta L_n that its dtype may round away in a difference near w*."""
    unit = float(np.finfo(posterior.center.dtype).eps) * abs(float(reference_loss))
    return ROUNDING_UNITS * float(posterior.nbeta) * unit


class Line(NamedTuple):
    """The direction of least curvature; `reach` is how far to go along it."""

    unit: np.ndarray
    curvature: float
    goes_down: bool
    is_level: bool
    num_level: int
    reach: float

    @property
    def is_followed(self) -> bool:
        """Whether the loss falls along it, or nothing holds it."""
        return self.goes_down or self.is_level

    @property
    def points(self) -> Float[np.ndarray, "points dim"]:
        """Displacements along it, both ways: first one way, then the other."""
        distances = self.reach * np.asarray(NEAR if self.goes_down else FAR)
        return np.concatenate([distances, -distances])[:, None] * self.unit


def descent_line(posterior: LocalPosterior, start: Start) -> Line | None:
    """Read the direction off the start, if the start is of this w*."""
    wanted = (
        start.spectrum,
        start.num_values,
        start.lowest,
        start.lowest_direction,
        posterior.gamma,
        posterior.center,
    )
    spectrum, size, lowest, along, gamma, center = (
        np.asarray(leaf, float) for leaf in jax.device_get(wanted)
    )
    length2, values = float(np.sum(along**2)), spectrum[: int(size)]
    # The start of another w* says nothing of this one: its least curvature is NaN.
    if not (np.isfinite(lowest) and length2 > 0):
        return None
    localizer, dim = float(gamma) * length2, center.size
    own = float(lowest) - localizer  # of the loss alone, in whitened coordinates
    rounding = CURVATURE_ROUNDING * max(
        float(np.max(np.abs(values), initial=0.0)), abs(float(lowest))
    )
    goes_down = bool(own < -rounding - HELD * localizer)
    size_of_center = max(1.0, float(np.sqrt(np.mean(center**2))))
    return Line(
        unit=along / math.sqrt(length2),
        curvature=own / length2,
        goes_down=goes_down,
        is_level=bool(gamma == 0 and abs(own) <= rounding),
        num_level=int(dim - np.sum(values > rounding)),
        reach=math.sqrt(2 * length2 / -own) if goes_down else size_of_center,
    )
