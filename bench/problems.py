"""The problem that benchmarks run on: regression by a tanh network with two hidden layers."""

import jax
import jax.numpy as jnp
import numpy as np

INPUTS = 16
NUM_DATA = 20_000
BATCH = 256
SOLVER_STEPS = 300  # of conjugate gradients, for noise orthogonal to the network's tangents
WIDTHS = {
    1_000: 24,
    10_000: 91,
    100_000: 308,
    1_000_000: 992,
}  # hidden width for about so many parameters


def tanh_network(size: int, num_data: int = NUM_DATA):
    """Return the loss, parameters near zero, and data for about `size` parameters."""
    predict, dim = _predictor(size)
    rng = np.random.default_rng(0)
    center = jnp.asarray(0.1 * rng.normal(size=dim), jnp.float32)
    inputs = jnp.asarray(rng.normal(size=(num_data, INPUTS)), jnp.float32)
    outputs = jnp.asarray(rng.normal(size=num_data), jnp.float32)
    return _mean_square(predict), center, (inputs, outputs)


def trained_tanh_network(size: int, num_data: int = NUM_DATA, noise: float = 0.3):
    """Return the same network at a minimum.

    Outputs are its own plus noise that no small change of it can fit.
    """
    predict, dim = _predictor(size)
    _, center, (inputs, errors) = tanh_network(size, num_data)
    fitted, tangent = jax.linearize(lambda flat: predict(flat, inputs), center)
    transposed = jax.linear_transpose(tangent, center)
    explained, _ = jax.scipy.sparse.linalg.cg(
        lambda change: transposed(tangent(change))[0], transposed(errors)[0], maxiter=SOLVER_STEPS
    )
    return _mean_square(predict), center, (inputs, fitted + noise * (errors - tangent(explained)))


def _predictor(size: int):
    """Return `(flat, inputs) -> outputs` and the number of parameters."""
    width = WIDTHS[size]
    shapes = [(INPUTS, width), (width, width), (width, 1)]
    ends = np.cumsum([rows * columns for rows, columns in shapes])

    def predict(flat, inputs):
        first, second, last = (
            part.reshape(shape)
            for part, shape in zip(jnp.split(flat, ends[:-1]), shapes, strict=True)
        )
        return (jnp.tanh(jnp.tanh(inputs @ first) @ second) @ last)[:, 0]

    return predict, int(ends[-1])


def _mean_square(predict):
    return lambda flat, batch: 0.5 * jnp.mean((predict(flat, batch[0]) - batch[1]) ** 2)
