"""The problems that benchmarks run on: a tanh network, a language model of bytes."""

import math
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

INPUTS = 16
NUM_DATA = 20_000
BATCH = 256
SOLVER_STEPS = 300  # of conjugate gradients, for noise orthogonal to the network's tangents
WITH_BIASES = 11_041  # parameters of the only network here that has biases, an odd number
WIDTHS = {
    1_000: 24,
    10_000: 91,
    WITH_BIASES: 96,
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


def layer_shapes(size: int) -> list[tuple[int, int]]:
    """Return the shapes of the network's matrices."""
    width = WIDTHS[size]
    return [(INPUTS, width), (width, width), (width, 1)]


def predict_by_layers(layers, inputs):
    """Return the network's outputs."""
    first, second, last = layers
    return (jnp.tanh(jnp.tanh(inputs @ first) @ second) @ last)[:, 0]


def _predict_with_biases(parts, inputs):
    """Return the outputs of a network whose matrices have their biases behind them."""
    first, at_first, second, at_second, last, at_last = parts
    hidden = jnp.tanh(jnp.tanh(inputs @ first + at_first) @ second + at_second)
    return (hidden @ last + at_last)[:, 0]


def _predictor(size: int):
    """Return `(flat, inputs) -> outputs` and the number of parameters."""
    shapes, by_parts = layer_shapes(size), predict_by_layers
    if size == WITH_BIASES:
        shapes = [shape for matrix in shapes for shape in (matrix, matrix[1:])]
        by_parts = _predict_with_biases
    ends = np.cumsum([math.prod(shape) for shape in shapes])

    def predict(flat, inputs):
        parts = zip(jnp.split(flat, ends[:-1]), shapes, strict=True)
        return by_parts([part.reshape(shape) for part, shape in parts], inputs)

    return predict, int(ends[-1])


def _mean_square(predict):
    return lambda flat, batch: 0.5 * jnp.mean((predict(flat, batch[0]) - batch[1]) ** 2)


VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 128, 32, 32, 4, 2  # of the byte transformer, d = 34,432
SEQUENCES = 4096


def byte_transformer(num_data: int = SEQUENCES):
    """Return the loss, fresh parameters and data of a language model of bytes.

    The text is what `help()` shows, which ships with Python. The loss is the mean over a sequence's
    next bytes.
    """
    rng = np.random.default_rng(0)

    def matrix(rows, columns):
        return jnp.asarray(rng.normal(size=(rows, columns)) / np.sqrt(rows), jnp.float32)

    def norm():
        return {"scale": jnp.ones(WIDTH), "shift": jnp.zeros(WIDTH)}

    def block():
        return {
            "before": norm(),
            "attention": [matrix(WIDTH, WIDTH) for _ in range(4)],
            "between": norm(),
            "wide": (matrix(WIDTH, 4 * WIDTH), jnp.zeros(4 * WIDTH)),
            "narrow": (matrix(4 * WIDTH, WIDTH), jnp.zeros(WIDTH)),
        }

    params = {
        "bytes": 0.3 * matrix(VOCABULARY, WIDTH) * np.sqrt(VOCABULARY),
        "places": 0.3 * matrix(CONTEXT, WIDTH) * np.sqrt(CONTEXT),
        "blocks": [block() for _ in range(LAYERS)],
        "last": norm(),
        "unembedding": 0.1 * matrix(WIDTH, VOCABULARY),
    }
    return _next_byte_loss, params, (jnp.asarray(_sequences(num_data)),)


def trained_byte_transformer(num_data: int = SEQUENCES, steps: int = 1500):
    """Return the same after training by Adam on batches of 64 with a decaying rate."""
    loss, params, (tokens,) = byte_transformer(num_data)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, num_data)
        updates, state = optimizer.update(jax.grad(loss)(params, (tokens[rows],)), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(
        (params, optimizer.init(params))
    )
    return loss, params, (tokens,)


def _sequences(num_data: int):
    """Cut the topics of `help()` to sequences, one byte longer than the context."""
    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    return codes[: num_data * (CONTEXT + 1)].reshape(num_data, CONTEXT + 1).astype(np.int32)


def _next_byte_loss(params, batch):
    """Return the mean over sequences and places of the cross-entropy of the next byte."""
    inputs, targets = batch[0][:, :-1], batch[0][:, 1:]
    x = params["bytes"][inputs] + params["places"]
    for block in params["blocks"]:
        x = x + _attend(block["attention"], _normalize(block["before"], x))
        (wide, first), (narrow, second) = block["wide"], block["narrow"]
        hidden = jax.nn.gelu(_normalize(block["between"], x) @ wide + first)
        x = x + hidden @ narrow + second
    log_prob = jax.nn.log_softmax(_normalize(params["last"], x) @ params["unembedding"])
    return -jnp.mean(jnp.take_along_axis(log_prob, targets[..., None], axis=-1))


def _normalize(norm, x):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    spread = jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    return centred / spread * norm["scale"] + norm["shift"]


def _attend(matrices, x):
    """Attend causally with `HEADS` heads."""
    split = (*x.shape[:2], HEADS, WIDTH // HEADS)
    query, keys, values = ((x @ one).reshape(split) for one in matrices[:3])
    scores = jnp.einsum("bqhc,bkhc->bhqk", query, keys) / np.sqrt(WIDTH // HEADS)
    seen = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1)
    return jnp.einsum("bhqk,bkhc->bqhc", weights, values).reshape(x.shape) @ matrices[3]
