"""When to stop: the trend of the ELBO against its noise, and the phases of a run."""

from typing import NamedTuple

import numpy as np

WINDOW_FRACTION = 0.5  # share of the steps so far that the trend is read from
MIN_WINDOW = 100  # steps: ten for each block mean
# Block means of a window: their scatter about the line has eight degrees of freedom.
NUM_BLOCKS = 10
NOISE_SIGMAS = 1.0  # with looks in a row below: a drift as large as its noise is not missed twice
NEGLIGIBLE_PER_DIMENSION = (
    5e-4  # nats: the noise of an ELBO grows with the dimension, and its last few come slowly
)
FLAT_LOOKS = 2  # in a row, at which the ELBO counts as flat
# A virial off by so much is a variance off by as much where the loss is quadratic.
VIRIAL_TOLERANCE = 0.05
DECAY_FRACTION = 0.25  # steps of the final decay, relative to those before it
MIN_DECAY = 100  # steps
MAX_DECAY_FACTOR = 16  # on the shortest decay, at most, in few dimensions
FEW_DIMENSIONS = 32  # below half of them, more draws and steps cost nothing that shows


class Trend(NamedTuple):
    """Gain of the ELBO over the window, in nats, with its standard error."""

    gain: float
    error: float
    window: int

    def is_flat(self, negligible: float) -> bool:
        """Say whether the gain is indistinguishable from noise, or below `negligible` nats."""
        return self.gain <= max(NOISE_SIGMAS * self.error, negligible)


def elbo_trend(elbo: np.ndarray) -> Trend:
    """Fit a line to block means of the ELBO (chains, steps) over the last part of a run.

    The error comes from the scatter of the block means about the line, chains averaged.
    """
    steps = elbo.shape[1]
    window = max(min(MIN_WINDOW, steps), int(WINDOW_FRACTION * steps))
    window -= window % NUM_BLOCKS
    # Fewer steps than blocks say nothing of a trend.
    if window == 0:
        return Trend(np.inf, 0.0, 0)
    blocks = np.mean(elbo[:, steps - window :], axis=0).reshape(NUM_BLOCKS, -1).mean(axis=1)
    time = np.linspace(-0.5, 0.5, NUM_BLOCKS)
    slope = float(time @ blocks / (time @ time))
    residual = blocks - blocks.mean() - slope * time
    # The line has taken two degrees of freedom.
    error = float(np.sqrt(residual @ residual / (NUM_BLOCKS - 2) / (time @ time)))
    return Trend(slope, error, window)


def negligible_nats(least: float, dim: int) -> float:
    """Return the gain that is not waited for.

    `least`, in many dimensions a small share of the d / 2 nats at stake.
    """
    return max(least, NEGLIGIBLE_PER_DIMENSION * dim)


def is_balanced(virial: np.ndarray) -> bool:
    """Say whether the virial (chains, steps) of the latest steps is 1 within tolerance or noise.

    A q that is too wide or too narrow still has somewhere to go, however noisy the ELBO.
    """
    means = virial.reshape(virial.shape[0], -1, virial.shape[1] // NUM_BLOCKS or 1).mean(
        axis=(0, 2)
    )
    error = float(np.std(means, ddof=1) / np.sqrt(means.size)) if means.size > 1 else np.inf
    return abs(float(means.mean()) - 1) <= max(VIRIAL_TOLERANCE, 2 * error)


def few_dimensions_factor(dim: int, most: int) -> int:
    """Return how many times more work to do in few dimensions, where it is cheap and tails matter.

    1 elsewhere.
    """
    return min(most, max(1, (FEW_DIMENSIONS // dim) ** 2))


def decay_length(steps_before: int, dim: int) -> int:
    """Return the length of the final decay after `steps_before` steps at the peak rate.

    In few dimensions steps are cheap, and a single direction whose scale is still noisy shows in
    the estimate.
    """
    shortest = MIN_DECAY * few_dimensions_factor(dim, MAX_DECAY_FACTOR)
    return max(shortest, int(DECAY_FRACTION * steps_before))
