"""Monomials, sums of them, and a sphere of minima."""

import functools
import math

import jax.numpy as jnp
import numpy as np

from bench.truth.problem import Problem, default_nbeta, no_data, rotation
from bench.truth.quadrature import even_loss_answer, sphere_answer

CROSSING = "min 1/(2k) over the powers 2k; independent blocks add (Watanabe 2009)"
MORSE_BOTT = "half the codimension of the minima (Morse-Bott)"


def product(*powers: int):
    """Return prod_i w_i^powers[i]."""

    def loss(point):
        return functools.reduce(
            lambda left, right: left * right, (w**p for w, p in zip(point, powers, strict=True))
        )

    return loss


def even_problem(name, loss, dim, theory, count=1000, gamma=1.0, basis=None) -> Problem:
    """Return an even loss at 0; with a basis, the loss of the coordinates in that basis."""

    def loss_fn(params, batch):
        point = params if basis is None else jnp.asarray(basis, params.dtype) @ params
        return loss(tuple(point[i] for i in range(dim)))

    return Problem(
        name,
        loss_fn,
        np.zeros(dim, np.float32),
        no_data(count),
        gamma,
        count,
        theory=theory,
        theory_source=CROSSING,
        exact=lambda: even_loss_answer(loss, dim, default_nbeta(count), gamma),
        exact_method="quadrature",
    )


def sphere(name: str, dim: int, gamma: float = 1.0, count: int = 10_000) -> Problem:
    """Return (|w|^2 - 1)^2 at a point of the unit sphere that is on no axis."""
    center = np.ones(dim) / math.sqrt(dim)
    return Problem(
        name,
        lambda params, batch: (jnp.sum(params**2) - 1) ** 2,
        center.astype(np.float32),
        no_data(count),
        gamma,
        count,
        theory=0.5,
        theory_source=MORSE_BOTT,
        exact=lambda: sphere_answer(dim, default_nbeta(count), gamma),
        exact_method="quadrature",
    )


def half_crossing(point):
    """Return (w1 w2)^2 / 2."""
    return 0.5 * product(2, 2)(point)


def separate_sum(point):
    """Return w1^4 + w2^2 w3^2."""
    return point[0] ** 4 + (point[1] * point[2]) ** 2


EVEN = {
    "crossing_2": (product(2, 2), 2, 0.5),
    "crossing_2_n1e4": (product(2, 2), 2, 0.5, 10_000),
    "crossing_2_n1e6": (product(2, 2), 2, 0.5, 1_000_000),
    "crossing_2_turned": (product(2, 2), 2, 0.5, 1000, 1.0, rotation(5, 2)),
    "half_crossing_2": (half_crossing, 2, 0.5),
    "half_crossing_2_n1e4": (half_crossing, 2, 0.5, 10_000),
    "crossing_3": (product(2, 2, 2), 3, 0.5),
    "quartic": (lambda point: point[0] ** 4, 1, 0.25),
    "crossing_2_4": (product(2, 4), 2, 0.25),
    "quartic_plus_crossing": (separate_sum, 3, 0.75),
}

SINGULAR = {
    name: functools.partial(even_problem, name, *settings) for name, settings in EVEN.items()
} | {
    "sphere_3": lambda: sphere("sphere_3", 3),
    "sphere_10": lambda: sphere("sphere_10", 10),
    "sphere_10_g100": lambda: sphere("sphere_10_g100", 10, gamma=100.0),
}
