"""What stochastic gradient Langevin dynamics does to a quadratic: see docs/math.md, "Sampling".

w <- w - lr/2 (nbeta grad L_B(w) + gamma (w - w*)) + sqrt(lr) noise
"""

import dataclasses
import functools
import math

import numpy as np

from fastvi._typing import Float

BISECTIONS = 60  # a float64 has 52 bits: half are visible in a step, double add nothing


@dataclasses.dataclass(frozen=True)
class QuadraticSGLD:
    """SGLD on a quadratic whose spectrum is known by Gauss rules, some of which estimate it each.

    Biases are in units of llc, by each rule.

    Attributes:
        curvatures: Eigenvalues h of the Hessian of L_n, shape (rules, nodes).
        counts: How many directions each stands for; of one rule they add up to d.
        noisy: Eigenvalues in whose directions gradients are noisy.
        variances: Variance of one example's gradient that each stands for.
        nbeta: n times the inverse temperature.
        localization: gamma.
        lr: Step size.
        batch_size: Examples of a minibatch, drawn with replacement; None for all data.
    """

    curvatures: Float[np.ndarray, "rules nodes"]
    counts: Float[np.ndarray, "rules nodes"]
    noisy: Float[np.ndarray, "rules noisy"]
    variances: Float[np.ndarray, "rules noisy"]
    nbeta: float
    localization: float
    lr: float = 0.0
    batch_size: int | None = None

    @functools.cached_property
    def llc(self) -> Float[np.ndarray, " rules"]:
        """Llc of the posterior: half of nbeta h / (gamma + nbeta h) in each direction."""
        return np.sum(self.counts * self._held(self.curvatures), axis=1) / 2

    @functools.cached_property
    def widening(self) -> Float[np.ndarray, " rules"]:
        """What finite steps add: a variance 1 / a becomes 1 / (a (1 - lr a / 4))."""
        return np.sum(self._widening, axis=1)

    @functools.cached_property
    def heat(self) -> Float[np.ndarray, " rules"]:
        """What the noise of minibatches adds: 1 / a times lr nbeta^2 V / 4, and widened."""
        return np.sum(self._heat, axis=1)

    @property
    def largest_lr(self) -> float:
        """The step beyond which the steepest direction that was met diverges."""
        steepest = max(np.max(self.curvatures), np.max(self.noisy), 0.0)
        return 4 / (self.localization + self.nbeta * float(steepest))

    def widenings(self, curvatures: np.ndarray) -> np.ndarray:
        """Return the stationary variance over that of the posterior, without noise."""
        return 1 / self._slack(curvatures)

    def remaining(self, steps: float) -> float:
        """Return the share of the stationary mean that is missing so many steps after w*."""
        return self._share_of(lambda kept: kept**steps)

    def missing(self, burn_in: int, num_steps: int) -> float:
        """Return the share that is missing from the mean of `num_steps` after `burn_in`."""
        return self._share_of(
            lambda kept: kept**burn_in * (1 - kept**num_steps) / (num_steps * (1 - kept))
        )

    def burn_in_for(self, share: float) -> int:
        """Return the steps after which less than this share is missing."""
        low, high = 0.0, 1.0
        while self.remaining(high) > share:
            high *= 2
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.remaining(middle) <= share else (middle, high)
        return math.ceil(high)

    def lr_for(self, bias: float) -> float:
        """Return the largest step at which widening and heat add no more than this."""
        low, high = 0.0, self.largest_lr
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            there = dataclasses.replace(self, lr=middle)
            is_within = float(np.mean(there.widening + there.heat)) <= bias
            low, high = (middle, high) if is_within else (low, middle)
        return low

    @functools.cached_property
    def _widening(self) -> np.ndarray:
        added = self.lr / 4 * self.widenings(self.curvatures)
        return self.counts * self.nbeta * self.curvatures / 2 * added

    @functools.cached_property
    def _heat(self) -> np.ndarray:
        if self.batch_size is None:
            return np.zeros_like(self.noisy)
        added = self.lr * self.nbeta**2 / 4 * self.variances / self.batch_size
        return added * self._held(self.noisy) / 2 * self.widenings(self.noisy)

    def _held(self, curvatures: np.ndarray) -> np.ndarray:
        """Return nbeta h / (gamma + nbeta h), and where the loss curves down its tangent at 0.

        A direction that the localizer does not hold at w* is held by what the loss does further
        out, of which a quadratic knows nothing.
        """
        pull = self.nbeta * curvatures
        return pull / (self.localization + np.maximum(pull, 0.0))

    def _slack(self, curvatures: np.ndarray) -> np.ndarray:
        return 1 - self.lr * (self.localization + self.nbeta * curvatures) / 4

    def _share_of(self, average) -> float:
        """Return the share of the stationary mean that is missing on an average over steps.

        Args:
            average: Of what remains of the variance after one step in a direction, to the average
                of what remains.
        """
        parts = (
            (self.curvatures, self.counts * self._held(self.curvatures) / 2 + self._widening),
            (self.noisy, self._heat),
        )
        missing = total = 0.0
        for curvatures, energy in parts:
            energy = np.maximum(energy, 0.0)  # what curves down has no stationary mean
            precision = self.localization + self.nbeta * np.maximum(curvatures, 0.0)
            kept = (1 - self.lr * precision / 2) ** 2
            missing, total = missing + np.sum(energy * average(kept)), total + np.sum(energy)
        return float(missing / total) if total > 0 else 0.0
