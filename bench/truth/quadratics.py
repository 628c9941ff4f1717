"""Quadratic losses: the posterior is Gaussian and the answer a sum over curvatures."""

import functools

import jax.numpy as jnp
import numpy as np

from bench.truth.problem import Problem, default_nbeta, no_data, rotation

COUNT = 10_000
CURVED = "half the number of curved directions"


def quadratic_answer(curvatures, nbeta: float, gamma: float) -> float:
    """Return 1/2 sum_i nbeta h_i / (nbeta h_i + gamma)."""
    scaled = nbeta * np.asarray(curvatures, np.float64)
    return float(0.5 * np.sum(scaled / (scaled + gamma)))


def quadratic(name: str, curvatures, dim: int, gamma: float, size: str = "fast") -> Problem:
    """Return 1/2 v^T H v with len(curvatures) curved directions of dim, at a w* off the origin."""
    rng = np.random.default_rng(dim)
    center = rng.normal(size=dim)
    basis = np.linalg.qr(rng.normal(size=(dim, len(curvatures))))[0].T

    def loss_fn(params, batch):
        return 0.5 * jnp.sum(curvatures * (basis @ (params - center.astype(params.dtype))) ** 2)

    return Problem(
        name,
        loss_fn,
        center.astype(np.float32),
        no_data(COUNT),
        gamma,
        COUNT,
        theory=len(curvatures) / 2,
        theory_source=CURVED,
        exact=lambda: (quadratic_answer(curvatures, default_nbeta(COUNT), gamma), 0.0),
        exact_method="closed form",
        size=size,
    )


def least_squares(name: str, dim: int = 20, count: int = 1000, gamma: float = 1.0) -> Problem:
    """Return linear regression with noise at its least-squares solution."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(count, dim)) @ (rotation(2, dim) * np.logspace(-1, 0.5, dim))
    outputs = inputs @ rng.normal(size=dim) + 0.3 * rng.normal(size=count)
    solution = np.linalg.solve(inputs.T @ inputs, inputs.T @ outputs)
    curvatures = np.linalg.eigvalsh(inputs.T @ inputs / count)

    def loss_fn(params, batch):
        return 0.5 * jnp.mean((batch[0] @ params - batch[1]) ** 2)

    return Problem(
        name,
        loss_fn,
        solution.astype(np.float32),
        (inputs.astype(np.float32), outputs.astype(np.float32)),
        gamma,
        count,
        theory=dim / 2,
        theory_source=CURVED,
        exact=lambda: (quadratic_answer(curvatures, default_nbeta(count), gamma), 0.0),
        exact_method="closed form",
    )


def _full(name, dim, condition):
    return quadratic(name, np.logspace(-np.log10(condition), 0, dim), dim, gamma=1.0)


QUADRATICS = {
    f"quadratic_d{dim}_c{condition}": functools.partial(
        _full, f"quadratic_d{dim}_c{condition}", dim, condition
    )
    for dim in (10, 50)
    for condition in (1, 100, 10_000)
} | {
    "quadratic_5of50": lambda: quadratic("quadratic_5of50", np.logspace(-1, 1, 5), 50, gamma=1.0),
    "quadratic_30of1000": lambda: quadratic(
        "quadratic_30of1000", np.logspace(-1, 1, 30), 1000, 1.0, "medium"
    ),
    "least_squares_20": lambda: least_squares("least_squares_20"),
}
