"""Toy models of superposition: six features in two dimensions, at a pentagon and a hexagon.

Elhage et al. 2022; the population loss and its critical points: Chen, Lau, Mendel, Wei & Murfet
2023.
"""

import functools

import jax.numpy as jnp
import numpy as np
import scipy.optimize

from bench.truth.problem import Problem, no_data

FEATURES, COUNT = 6, 1000
# length of a vertex and its bias, near which the minimum lies
STARTS = {5: (1.2, -0.3), 6: (1.3, -0.5)}
MORSE_BOTT = "half the rank of the Hessian: the minima are a circle, the rotations (Morse-Bott)"


def active_moments(slope, bias, xp=jnp):
    """Integrate 1, u and u^2 over the u in [0, 1] where slope u + bias > 0."""
    at_zero, at_one = bias > 0, slope + bias > 0
    # where the sign changes |slope| is at least |bias|, so that nothing overflows
    root = -bias / xp.where(at_zero != at_one, slope, 1.0)
    low = xp.where(at_zero, 0.0, xp.where(at_one, root, 0.0))
    high = xp.where(at_one, 1.0, xp.where(at_zero, root, 0.0))
    return tuple((high**power - low**power) / power for power in (1, 2, 3))


def population_loss(params, xp=jnp):
    """Average |x - ReLU(W^T W x + b)|^2 over x = u e_i, i of six, u uniform on [0, 1].

    An output that is on misses its input, u or 0, by a line in u; one that is off by all of it.
    """
    eye, bias = xp.eye(FEATURES), params["b"][:, None]
    slope = params["W"].T @ params["W"]
    zeroth, first, second = active_moments(slope, bias, xp)
    excess = slope - eye
    on = excess**2 * second + 2 * excess * bias * first + bias**2 * zeroth
    return xp.sum(on + eye * (1 / 3 - second)) / FEATURES


def population_gradient(params):
    """Differentiate `population_loss`: where an output goes off, both its misses are the same."""
    bias = params["b"][:, None]
    slope = params["W"].T @ params["W"]
    zeroth, first, second = active_moments(slope, bias, np)
    excess = slope - np.eye(FEATURES)
    by_slope = 2 * (excess * second + bias * first) / FEATURES
    by_bias = 2 * (excess * first + bias * zeroth) / FEATURES
    return {"W": params["W"] @ (by_slope + by_slope.T), "b": by_bias.sum(axis=1)}


def unravel(flat):
    """Cut a vector into W and b."""
    return {"W": flat[: 2 * FEATURES].reshape(2, FEATURES), "b": flat[2 * FEATURES :]}


def polygon(vertices: int) -> dict[str, np.ndarray]:
    """Descend in float64 from a regular polygon to the minimum beside it.

    A feature that is no vertex has no direction; its output is its mean.
    """
    length, bias = STARTS[vertices]
    angles = 2 * np.pi * np.arange(vertices) / vertices
    columns = np.zeros((2, FEATURES))
    columns[:, :vertices] = length * np.stack([np.cos(angles), np.sin(angles)])
    biases = np.where(np.arange(FEATURES) < vertices, bias, 1 / (2 * FEATURES))
    found = scipy.optimize.minimize(
        lambda flat: population_loss(unravel(flat), np),
        np.concatenate([columns.ravel(), biases]),
        jac=lambda flat: np.concatenate(
            [part.ravel() for part in population_gradient(unravel(flat)).values()]
        ),
        options={"gtol": 1e-12},
    )
    return unravel(found.x)


def superposition(name: str, vertices: int, gamma: float) -> Problem:
    """Return the loss, which does not look at the data, at a polygon."""
    params = {key: value.astype(np.float32) for key, value in polygon(vertices).items()}
    return Problem(
        name,
        lambda params, batch: population_loss(params),
        params,
        no_data(COUNT),
        gamma,
        COUNT,
        theory=8.5,
        theory_source=MORSE_BOTT,
    )


SUPERPOSITION = {
    f"superposition_{vertices}gon_g{gamma:g}": functools.partial(
        superposition, f"superposition_{vertices}gon_g{gamma:g}", vertices, gamma
    )
    for vertices, gamma in ((5, 10.0), (6, 1.0))
}
