"""Exact answers in few dimensions by the trapezoidal rule, refined until it no longer changes."""

from collections.abc import Callable

import numpy as np

LOWEST = -24.0  # log of the smallest |w|: what lies below holds a share of about its exponential
TAIL = 11.0  # standard deviations of the localizer after which its tail is cut
TOLERANCE = 1e-7


def refined(
    rule: Callable[[float], float], spacing: float, halvings: int = 4
) -> tuple[float, float]:
    """Halve the spacing until the value changes by less than `TOLERANCE` of it.

    Returns:
        The last value, and by how much it differs from the one before.

    Raises:
        ArithmeticError: If it still changes after all halvings.
    """
    value, change = rule(spacing), float("inf")
    for _ in range(halvings):
        spacing /= 2
        before, value = value, rule(spacing)
        change = abs(value - before)
        if change < TOLERANCE * abs(value):
            return value, change
    raise ArithmeticError(f"the quadrature still changes by {change:.2g} of {value:.6g}.")


def even_loss_answer(loss: Callable, dim: int, nbeta: float, gamma: float) -> tuple[float, float]:
    """Integrate a loss that is even in each coordinate, minimal at w* = 0 where it is 0.

    With w_i = exp(t_i) the integrand over t is analytic and vanishes at both ends, so the rule
    converges exponentially.

    Args:
        loss: Function of a tuple of arrays that broadcast, one per coordinate.
        dim: 1 to 3.
        nbeta: n times the inverse temperature.
        gamma: Localization.
    """
    highest = np.log(TAIL / np.sqrt(gamma))

    def rule(spacing):
        grid = np.arange(LOWEST, highest, spacing)
        axes = [
            np.exp(grid).reshape([-1 if axis == i else 1 for axis in range(dim)])
            for i in range(dim)
        ]
        mass = moment = 0.0
        for first in np.exp(grid):  # one slice at a time bounds the memory
            point = (np.full((1,) * dim, first), *axes[1:])
            energy = nbeta * loss(point)
            log_weight = (
                -energy - 0.5 * gamma * sum(w * w for w in point) + sum(np.log(w) for w in point)
            )
            weight = np.exp(log_weight)
            mass += weight.sum()
            moment += (weight * energy).sum()
        return float(moment / mass)

    return refined(rule, 0.4 if dim == 3 else 0.2)


def sphere_answer(dim: int, nbeta: float, gamma: float) -> tuple[float, float]:
    """Integrate L = (|w|^2 - 1)^2 around a point of the unit sphere, over radius and angle.

    The weight is r^(d-1) sin(theta)^(d-2) exp(-nbeta (r^2 - 1)^2 - gamma/2 (r^2 + 1 - 2 r cos
    theta)).
    """
    highest = 1.0 + TAIL / np.sqrt(gamma)

    def rule(spacing):
        radius = np.exp(np.arange(LOWEST / dim, np.log(highest), spacing))[:, None]
        nodes, weights = np.polynomial.legendre.leggauss(int(2 / spacing))
        angle, weights = (
            np.pi / 2 * (nodes + 1),
            weights * np.sin(np.pi / 2 * (nodes + 1)) ** (dim - 2),
        )
        energy = nbeta * (radius**2 - 1) ** 2
        distance2 = radius**2 + 1 - 2 * radius * np.cos(angle)
        mass = np.exp(-energy - 0.5 * gamma * distance2) * radius**dim * weights
        return float((mass * energy).sum() / mass.sum())

    return refined(rule, 0.02)


def two_unit_answer(inputs: int, outputs: int, nbeta: float, gamma: float) -> tuple[float, float]:
    """Integrate L = 1/2 |W_2 W_1|^2 for two linear units, over the eigenvalues of W_1 W_1^T.

    W_2 given W_1 is Gaussian and integrates to prod_i (gamma + nbeta e_i)^(-outputs/2); the
    eigenvalues then have the Wishart weight prod_i e_i^((inputs - 3)/2) exp(-gamma e_i / 2) |e_1 -
    e_2|. Here e_2 = e_1 x with x a logistic.
    """
    highest = 2 * np.log((np.sqrt(inputs) + TAIL) / np.sqrt(gamma))

    def rule(spacing):
        largest = np.arange(highest + LOWEST, highest, spacing)[:, None]
        slope = np.arange(LOWEST, -LOWEST, spacing)
        ratio, gap = -np.log1p(np.exp(-slope)), -np.log1p(np.exp(slope))
        logs = (largest, largest + ratio)
        log_weight = (
            3 * largest + ratio + 2 * gap
        )  # dx = x (1 - x) d slope, e_1 - e_2 = e_1 (1 - x), d e_1 = e_1 d log
        energy = np.zeros(())
        for log in logs:
            value = np.exp(log)
            log_weight = log_weight + (inputs - 3) / 2 * log - 0.5 * gamma * value
            log_weight = log_weight - outputs / 2 * np.log(gamma + nbeta * value)
            energy = energy + outputs / 2 * nbeta * value / (gamma + nbeta * value)
        weight = np.exp(log_weight - log_weight.max())
        return float((weight * energy).sum() / weight.sum())

    return refined(rule, 0.08)
