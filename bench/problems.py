"""The problem that benchmarks run on: regression by a tanh network with two hidden layers."""

import jax.numpy as jnp
import numpy as np

INPUTS = 16
NUM_DATA = 20_000
BATCH = 256
WIDTHS = {1_000: 24, 10_000: 91, 100_000: 308, 1_000_000: 992}  # hidden width for about so many parameters


def tanh_network(size: int, num_data: int = NUM_DATA):
    """Return the loss, parameters near zero, and data for about `size` parameters."""
    width = WIDTHS[size]
    shapes = [(INPUTS, width), (width, width), (width, 1)]
    ends = np.cumsum([rows * columns for rows, columns in shapes])

    def loss(flat, batch):
        inputs, outputs = batch
        first, second, last = (
            part.reshape(shape) for part, shape in zip(jnp.split(flat, ends[:-1]), shapes, strict=True)
        )
        predicted = jnp.tanh(jnp.tanh(inputs @ first) @ second) @ last
        return 0.5 * jnp.mean((predicted[:, 0] - outputs) ** 2)

    rng = np.random.default_rng(0)
    center = jnp.asarray(0.1 * rng.normal(size=ends[-1]), jnp.float32)
    inputs = jnp.asarray(rng.normal(size=(num_data, INPUTS)), jnp.float32)
    outputs = jnp.asarray(rng.normal(size=num_data), jnp.float32)
    return loss, center, (inputs, outputs)
