"""Networks of quadratic units, sum_k (w_k . x)^2, fitted to a teacher of fewer units.

The network is x^T W^T W x, and units rotate among each other without effect.
"""

import jax.numpy as jnp
import numpy as np

from bench.truth.problem import Problem, no_data, rotation

COUNT = 1000
UNITS, INPUTS, RANK = 4, 6, 2
SPLIT = (
    "of W in the teacher's basis, W^T W fixes r (r + 1) / 2 + r (d - r) coordinates, 1/2 each; "
    "the loss is a positive quartic form of (k - r) (d - r) more, 1/4 each"
)


def learning_coefficient(units: int, inputs: int, rank: int) -> float:
    """Count the coordinates that the loss is quadratic and quartic in."""
    fixed = rank * (rank + 1) / 2 + rank * (inputs - rank)
    return fixed / 2 + (units - rank) * (inputs - rank) / 4


def units_at_teacher() -> np.ndarray:
    """Return W of rank 2, its rows mixed by a rotation."""
    teacher = rotation(41, INPUTS)[:RANK] * np.array([[1.0], [0.8]])
    return (rotation(42, UNITS)[:, :RANK] @ teacher).astype(np.float32)


def quadratic_units(name: str, gamma: float) -> Problem:
    """Return the population loss of Gaussian inputs, which does not look at the data."""
    params = units_at_teacher()
    target = params.T @ params

    def loss_fn(params, batch):
        return population_loss(params.T @ params - target)

    return Problem(
        name,
        loss_fn,
        params,
        no_data(COUNT),
        gamma,
        COUNT,
        theory=learning_coefficient(UNITS, INPUTS, RANK),
        theory_source=SPLIT,
    )


def population_loss(difference):
    """Average (x^T A x)^2 / 2 over Gaussian x, A symmetric."""
    return jnp.sum(difference**2) + 0.5 * jnp.trace(difference) ** 2


def quadratic_units_on_data(name: str, gamma: float, noise: float = 0.3) -> Problem:
    """Return the mean squared error on examples, with noise that no quadratic form can fit."""
    params, rng = units_at_teacher(), np.random.default_rng(43)
    inputs = rng.normal(size=(COUNT, INPUTS)).astype(np.float32)
    rows, columns = np.triu_indices(INPUTS)
    basis = np.linalg.qr(inputs[:, rows].astype(float) * inputs[:, columns])[0]
    errors = noise * rng.normal(size=COUNT)
    errors -= basis @ (basis.T @ errors)
    outputs = np.sum((inputs @ params.T).astype(float) ** 2, axis=1) + errors

    def loss_fn(params, batch):
        outputs = jnp.sum((batch[0] @ params.T) ** 2, axis=1)
        return 0.5 * jnp.mean((outputs - batch[1]) ** 2)

    return Problem(
        name,
        loss_fn,
        params,
        (inputs, outputs.astype(np.float32)),
        gamma,
        COUNT,
        theory=learning_coefficient(UNITS, INPUTS, RANK),
        theory_source=SPLIT,
    )


QUADRATIC_UNITS = {
    "quadratic_units_g1": lambda: quadratic_units("quadratic_units_g1", 1.0),
    "quadratic_units_data_g10": lambda: quadratic_units_on_data("quadratic_units_data_g10", 10.0),
}
