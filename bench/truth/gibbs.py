"""Exact sampling of two factors: each is Gaussian where the other is known."""

from collections.abc import Callable

import numpy as np

CHAINS, SWEEPS, WARM_UP = 64, 4000, 400


def gaussian(rng, precision: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """Draw each column from the density of `w^T precision w / 2 - pull . w`."""
    root = np.swapaxes(np.linalg.inv(np.linalg.cholesky(precision)), -1, -2)
    noise = rng.normal(size=pull.shape)
    return np.linalg.solve(precision, pull) + root @ noise


def sweep_mean(
    sweep: Callable, energy: Callable, *factors: np.ndarray, sweeps: int = SWEEPS
) -> tuple[float, float]:
    """Average the energy over chains that start at the given factors.

    Args:
        sweep: `(factors) -> factors`, of all chains, the axis in front.
        energy: `(factors) -> energy of each chain`.
        factors: At w*.
        sweeps: Of each chain, after a warm-up.

    Returns:
        The mean, and its standard error over independent chains.
    """
    chains = tuple(np.repeat(factor[None].astype(float), CHAINS, axis=0) for factor in factors)
    values = np.zeros((sweeps, CHAINS))
    for count in range(-WARM_UP, sweeps):
        chains = sweep(*chains)
        if count >= 0:
            values[count] = energy(*chains)
    means = values.mean(axis=0)
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(CHAINS))


def two_layer_answer(
    first: np.ndarray, second: np.ndarray, nbeta: float, gamma: float, seed: int = 0
) -> tuple[float, float]:
    """Sample `exp(-nbeta/2 |W_2 W_1 - T|^2 - gamma/2 |W - W*|^2)` by Gibbs sampling.

    A layer is drawn whole, so that walkers change between the arms of the posterior at once.

    Args:
        first: W_1 at w*.
        second: W_2 at w*; T is their product.
        nbeta: n times the inverse temperature.
        gamma: Localization.
        seed: Of the draws.

    Returns:
        The llc, and its standard error over independent chains.
    """
    rng = np.random.default_rng(seed)
    target = second @ first

    def draw(above, aim, center):
        """Draw W from the density of `nbeta/2 |above W - aim|^2 + gamma/2 |W - center|^2`."""
        below = np.swapaxes(above, 1, 2)
        precision = nbeta * below @ above + gamma * np.eye(above.shape[2])
        return gaussian(rng, precision, nbeta * below @ aim + gamma * center)

    def sweep(one, two):
        one = draw(two, target, first)
        return one, np.swapaxes(draw(np.swapaxes(one, 1, 2), target.T, second.T), 1, 2)

    def energy(one, two):
        return 0.5 * nbeta * np.sum((two @ one - target) ** 2, axis=(1, 2))

    return sweep_mean(sweep, energy, first, second)


def factorization_answer(
    left: np.ndarray,
    right: np.ndarray,
    weights: np.ndarray,
    nbeta: float,
    gamma: float,
    seed: int = 0,
    sweeps: int = SWEEPS,
) -> tuple[float, float]:
    """Sample `exp(-nbeta/2 sum(weights (U V^T - T)^2) - gamma/2 |w - w*|^2)` by Gibbs sampling.

    Given the other factor, the rows of a factor are independent.

    Args:
        left: U at w*.
        right: V at w*; T is U V^T.
        weights: Of each entry; 0 where it is not observed.
        nbeta: n times the inverse temperature.
        gamma: Localization.
        seed: Of the draws.
        sweeps: Of each chain, after a warm-up.

    Returns:
        The llc, and its standard error over independent chains.
    """
    rng = np.random.default_rng(seed)
    target = left @ right.T

    def draw(other, weights, aim, center):
        """Draw the rows of the factor whose products with those of `other` aim at `aim`."""
        rank = other.shape[2]
        outer = (other[..., :, None] * other[..., None, :]).reshape(*other.shape[:2], -1)
        curvature = (weights @ outer).reshape(len(other), -1, rank, rank)
        pull = nbeta * (weights * aim) @ other + gamma * center
        return gaussian(rng, nbeta * curvature + gamma * np.eye(rank), pull[..., None])[..., 0]

    def sweep(one, two):
        one = draw(two, weights, target, left)
        return one, draw(one, weights.T, target.T, right)

    def energy(one, two):
        missed = one @ np.swapaxes(two, 1, 2) - target
        return 0.5 * nbeta * np.sum(weights * missed**2, axis=(1, 2))

    return sweep_mean(sweep, energy, left, right, sweeps=sweeps)
