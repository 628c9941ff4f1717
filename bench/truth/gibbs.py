"""Exact sampling of factors of a product: each is Gaussian where the others are known."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

GIBBS = "Gibbs sampling"
CHAINS, SWEEPS, WARM_UP = 64, 4000, 400


def gaussian(rng, precision: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """Draw each column from the density of `w^T precision w / 2 - pull . w`."""
    root = np.swapaxes(np.linalg.inv(np.linalg.cholesky(precision)), -1, -2)
    noise = rng.normal(size=pull.shape)
    return np.linalg.solve(precision, pull) + root @ noise


def sweep_mean(
    sweep: Callable,
    energy: Callable,
    *factors: np.ndarray,
    sweeps: int = SWEEPS,
    chains: int = CHAINS,
) -> tuple[float, float]:
    """Average the energy over chains that start at the given factors.

    Args:
        sweep: `(factors) -> factors`, of all chains, the axis in front.
        energy: `(factors) -> energy of each chain`.
        factors: At w*.
        sweeps: Of each chain, after a warm-up.
        chains: Independent chains.

    Returns:
        The mean, and its standard error over independent chains.
    """
    state = tuple(np.repeat(factor[None].astype(float), chains, axis=0) for factor in factors)
    values = np.zeros((sweeps, chains))
    for count in range(-WARM_UP, sweeps):
        state = sweep(*state)
        if count >= 0:
            values[count] = energy(*state)
    means = values.mean(axis=0)
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(chains))


def linear_network_answer(
    layers: Sequence[np.ndarray],
    nbeta: float,
    gamma: float,
    seed: int = 0,
    sweeps: int = SWEEPS,
    chains: int = CHAINS,
) -> tuple[float, float]:
    """Sample `exp(-nbeta/2 |W_L ... W_1 - T|^2 - gamma/2 |W - W*|^2)` by Gibbs sampling.

    A layer is drawn whole, given the product A above it and the product B below it: in the bases of
    the eigenvectors of A^T A and B B^T its entries are independent, of precision
    `nbeta a_i b_j + gamma`. So walkers change between the arms of the posterior at once.

    Args:
        layers: W_1, ..., W_L at w*; T is their product.
        nbeta: n times the inverse temperature.
        gamma: Localization.
        seed: Of the draws.
        sweeps: Of each chain, after a warm-up.
        chains: Independent chains.

    Returns:
        The llc, and its standard error over chains.
    """
    rng = np.random.default_rng(seed)
    centers = [layer.astype(float) for layer in layers]
    target = product(centers)

    def draw(above, below, center):
        """Draw W from the density of `nbeta/2 |above W below - target|^2 + the localizer`."""
        transposed = np.swapaxes(above, 1, 2), np.swapaxes(below, 1, 2)
        a, left = np.linalg.eigh(transposed[0] @ above)
        b, right = np.linalg.eigh(below @ transposed[1])
        pull = nbeta * transposed[0] @ target @ transposed[1] + gamma * center
        # rounding makes eigenvalues of zero negative
        precision = nbeta * np.maximum(a[:, :, None] * b[:, None, :], 0.0) + gamma
        mean = np.swapaxes(left, 1, 2) @ pull @ right / precision
        turned = mean + rng.normal(size=mean.shape) / np.sqrt(precision)
        return left @ turned @ np.swapaxes(right, 1, 2)

    def identity(size):
        return np.eye(size)[None]  # the same for all chains

    def sweep(*drawn):
        drawn = list(drawn)
        for place, center in enumerate(centers):
            above = product([identity(center.shape[0]), *drawn[place + 1 :]])
            below = product([identity(target.shape[1]), *drawn[:place]])
            drawn[place] = draw(above, below, center)
        return tuple(drawn)

    def energy(*drawn):
        return 0.5 * nbeta * np.sum((product(drawn) - target) ** 2, axis=(1, 2))

    return sweep_mean(sweep, energy, *centers, sweeps=sweeps, chains=chains)


def product(layers):
    """Multiply W_L ... W_1."""
    return functools.reduce(lambda below, layer: layer @ below, layers)


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
