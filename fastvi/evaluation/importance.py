"""Pareto-smoothed importance sampling: can draws of q stand for the posterior?"""

from typing import NamedTuple

import numpy as np

from fastvi._typing import Float

# Bounds of k-hat: below the first the variance of the weights is finite, below the second the
# error falls with the number of draws at a useful rate (Vehtari et al., 2024).
GOOD, USABLE = 0.5, 0.7
MIN_TAIL = 5  # draws: a fit of two parameters to fewer says nothing (Vehtari et al., 2024)
# weights that differ by less have no tail: float32 log densities of 100 nats are rounded by 1e-5
ALIKE = 1e-4


class Importance(NamedTuple):
    """How well draws of q stand for the posterior.

    K-hat, a word for it, and how many draws count.
    """

    khat: float
    word: str
    effective_draws: float


def assess_importance(log_weights: Float[np.ndarray, "*chains draws"]) -> Importance:
    """Judge importance weights by the tail of all chains' draws together.

    The words are Stan's: "good" below 0.5, "ok" below 0.7, "unreliable" above or where a weight is
    not finite.

    Args:
        log_weights: log p(w) - log q(w) at draws of q, in nats and up to a constant.

    Returns:
        k-hat, its word, and the number of equal draws that the weighted ones are worth.
    """
    pooled = np.ravel(log_weights)
    if not np.all(np.isfinite(pooled)):
        return Importance(float("inf"), "unreliable", 0.0)
    weights, khat = pareto_smooth(pooled)
    word = "good" if khat < GOOD else "ok" if khat < USABLE else "unreliable"
    return Importance(khat, word, float(1 / np.sum(weights**2)))


def pareto_smooth(
    log_weights: Float[np.ndarray, " draws"],
) -> tuple[Float[np.ndarray, " draws"], float]:
    """Smooth the largest weights by a fitted generalised Pareto tail.

    Args:
        log_weights: log p(w) - log q(w) at independent draws of q, up to a constant.

    Returns:
        Normalised weights, and the shape k-hat of their tail: below 0.5 good, below 0.7 usable,
        infinite where there are too few draws to tell.

    References:
        Vehtari et al., Pareto Smoothed Importance Sampling (2024), algorithm 1.
    """
    shifted = np.asarray(log_weights, float) - np.max(log_weights)
    count = shifted.size
    # The tail of Vehtari et al. (2024): 3 sqrt(n) of n draws, a fifth where they are few.
    tail = int(min(np.ceil(0.2 * count), np.ceil(3 * np.sqrt(count))))
    order = np.argsort(shifted)
    cutoff = shifted[order[-tail - 1]] if tail < count else -np.inf
    shape = np.inf
    if tail >= MIN_TAIL:
        excess = np.exp(shifted[order[-tail:]]) - np.exp(cutoff)
        if not excess[-1] >= ALIKE:
            shape = -np.inf
        else:
            shape, scale = fit_pareto(excess)
            quantiles = (np.arange(tail) + 0.5) / tail
            # The second form is the limit of the first at shape 0.
            smooth = (
                scale * np.expm1(-shape * np.log1p(-quantiles)) / shape
                if shape
                else -scale * np.log1p(-quantiles)
            )
            # No smoothed weight exceeds the largest raw one, which is 1 here.
            shifted[order[-tail:]] = np.minimum(np.log(smooth + np.exp(cutoff)), 0.0)
    weights = np.exp(shifted)
    return weights / weights.sum(), float(shape)


def fit_pareto(excess: Float[np.ndarray, " tail"]) -> tuple[float, float]:
    """Fit shape and scale of a generalised Pareto distribution to ascending values.

    Some of them may be tied at zero.

    References:
        Zhang & Stephens (2009); the weak prior on the shape is that of Vehtari et al. (2024).
    """
    count = excess.size
    grid = 30 + int(np.sqrt(count))
    # Candidates for -shape / scale, where Zhang & Stephens place them.
    theta = 1 - np.sqrt(grid / (np.arange(grid) + 0.5))
    # Where a quarter is tied at zero, the smallest positive value is the scale.
    quartile = max(
        excess[int(count / 4 + 0.5) - 1], np.min(excess, where=excess > 0, initial=excess[-1])
    )
    theta = theta / (3 * quartile) + 1 / excess[-1]
    shapes = np.mean(np.log1p(-theta[:, None] * excess), axis=1)
    profile = count * (np.log(-(theta / shapes)) - shapes - 1)
    weights = np.exp(profile - profile.max())
    theta_hat = float(np.sum(theta * weights) / np.sum(weights))
    shape = float(np.mean(np.log1p(-theta_hat * excess)))
    return (shape * count + 0.5 * 10) / (count + 10), -shape / theta_hat
