"""Exact sampling of two linear layers: each is Gaussian where the other is known."""

import numpy as np

CHAINS, SWEEPS, WARM_UP = 64, 4000, 400


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
        precision = nbeta * np.swapaxes(above, 1, 2) @ above + gamma * np.eye(above.shape[2])
        pull = nbeta * np.swapaxes(above, 1, 2) @ aim + gamma * center
        root = np.swapaxes(np.linalg.inv(np.linalg.cholesky(precision)), 1, 2)
        noise = rng.normal(size=(len(above), *center.shape))
        return np.linalg.solve(precision, pull) + root @ noise

    one, two = (np.repeat(layer[None].astype(float), CHAINS, axis=0) for layer in (first, second))
    values = np.zeros((SWEEPS, CHAINS))
    for sweep in range(WARM_UP + SWEEPS):
        one = draw(two, target, first)
        two = np.swapaxes(draw(np.swapaxes(one, 1, 2), target.T, second.T), 1, 2)
        if sweep >= WARM_UP:
            excess = 0.5 * np.sum((two @ one - target) ** 2, axis=(1, 2))
            values[sweep - WARM_UP] = nbeta * excess
    means = values.mean(axis=0)
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(CHAINS))
