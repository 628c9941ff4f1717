"""A convolutional classifier of digits, and a model of the next token on ragged sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree

from bench.truth.nets import UNKNOWN, stored_weights
from bench.truth.problem import Problem

CHANNELS, KERNEL, POOL, SIDE, CLASSES = 4, 3, 3, 8, 10
# without smoothing the network separates the digits, and the loss has no minimum
DIGITS, SMOOTHING, STEPS, LR = 600, 0.1, 3000, 1e-2
# token VOCABULARY comes before the first
VOCABULARY, EMBEDDING, HIDDEN, SEQUENCES, LONGEST = 6, 3, 5, 300, 6


def conv_logits(params, images):
    """Apply a convolution, tanh, a mean over patches and a linear layer."""
    features = jax.lax.conv_general_dilated(
        images.reshape(-1, SIDE, SIDE, 1).astype(params["conv"]["w"].dtype),
        params["conv"]["w"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    features = jnp.tanh(features + params["conv"]["b"])
    patches = (SIDE - KERNEL + 1) // POOL
    pooled = features.reshape(-1, patches, POOL, patches, POOL, CHANNELS).mean(axis=(2, 4))
    return pooled.reshape(len(pooled), -1) @ params["out"]["w"] + params["out"]["b"]


def conv_loss(params, batch):
    """Evaluate the mean cross-entropy to smoothed labels."""
    images, labels = batch
    targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), SMOOTHING)
    return optax.softmax_cross_entropy(conv_logits(params, images), targets).mean()


def start_conv(rng):
    """Draw weights of variance 1 / fan-in."""
    pooled = CHANNELS * ((SIDE - KERNEL + 1) // POOL) ** 2
    return {
        "conv": {"w": rng.normal(size=(KERNEL, KERNEL, 1, CHANNELS)) / KERNEL, "b": np.zeros(4)},
        "out": {"w": rng.normal(size=(pooled, CLASSES)) / pooled**0.5, "b": np.zeros(CLASSES)},
    }


def conv_digits(name: str, gamma: float) -> Problem:
    """Return a convolutional classifier of digits, at the stored end of its training."""
    from fastvi.demos.digits import load_digits

    data = tuple(np.asarray(part[:DIGITS]) for part in load_digits())
    start = start_conv(np.random.default_rng(70))
    params = stored_weights("conv_digits", lambda: minimum(conv_loss, start, data))
    return Problem(
        name, conv_loss, params, data, gamma, DIGITS, theory_source=UNKNOWN, size="medium"
    )


def minimum(loss_fn, params, data):
    """Descend by Adam, then in float64 until the gradient is small."""
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree_util.tree_map(jnp.asarray, params))
        held = jax.tree_util.tree_map(jnp.asarray, data)
        optimizer = optax.adam(optax.cosine_decay_schedule(LR, STEPS))

        def value_and_grad(flat, held):
            return jax.value_and_grad(lambda flat: loss_fn(unravel(flat), held))(flat)

        @jax.jit
        def descend(flat, held):
            def step(carry, _):
                flat, state = carry
                updates, state = optimizer.update(value_and_grad(flat, held)[1], state)
                return (flat + updates, state), None

            return jax.lax.scan(step, (flat, optimizer.init(flat)), length=STEPS)[0][0]

        compiled, near = jax.jit(value_and_grad), descend(flat, held)
        options = {"gtol": 1e-6, "maxiter": 4000}
        found = scipy.optimize.minimize(compiled, near, (held,), jac=True, options=options)
        return unravel(jnp.asarray(found.x))


def pairs_before(tokens):
    """Return the token before each one and the one before that."""
    before = jnp.pad(tokens, ((0, 0), (2, 0)), constant_values=VOCABULARY)
    return jnp.stack([before[:, 1:-1], before[:, :-2]], axis=-1)


def next_token_logits(params, tokens):
    """Return logits of each token given the two before it."""
    vectors = jnp.asarray(params["embedding"])[pairs_before(tokens)].reshape(*tokens.shape, -1)
    features = jnp.tanh(vectors @ params["hidden"]["w"] + params["hidden"]["b"])
    return features @ params["out"]["w"] + params["out"]["b"]


def next_token_losses(params, batch):
    """Return the cross-entropy of each token's targets, and the mask."""
    tokens, targets, mask = batch
    return optax.softmax_cross_entropy(next_token_logits(params, tokens), targets), mask


def start_tokens(rng):
    """Draw weights of variance 1 / fan-in; larger ones at the end, by which tokens are told."""
    return {
        "embedding": rng.normal(size=(VOCABULARY + 1, EMBEDDING)),
        "hidden": {
            "w": rng.normal(size=(2 * EMBEDDING, HIDDEN)) / (2 * EMBEDDING) ** 0.5,
            "b": np.zeros(HIDDEN),
        },
        "out": {
            "w": 1.5 * rng.normal(size=(HIDDEN, VOCABULARY)),
            "b": np.zeros(VOCABULARY),
        },
    }


def sequences(teacher):
    """Draw ragged sequences from a model, padded with zeros, and their mask."""
    rng = np.random.default_rng(71)
    tokens = np.zeros((SEQUENCES, LONGEST), np.int32)
    for i in range(LONGEST):
        logits = np.asarray(next_token_logits(teacher, tokens), np.float64)[:, i]
        tokens[:, i] = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
    mask = np.arange(LONGEST) < rng.integers(2, LONGEST + 1, size=SEQUENCES)[:, None]
    return np.where(mask, tokens, 0).astype(np.int32), mask.astype(np.float32)


def noisy_targets(teacher, tokens, mask):
    """Return the tokens as targets, shifted so that after equal pairs their mean is the model's.

    No model fits better than this one, and its gradient on some of the sequences is not zero.
    """
    logits = np.asarray(next_token_logits(teacher, tokens), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    noise = (tokens[..., None] == np.arange(VOCABULARY)) - chances
    before = np.asarray(pairs_before(tokens))
    sums = np.zeros((VOCABULARY + 1, VOCABULARY + 1, VOCABULARY))
    counts = np.zeros((VOCABULARY + 1, VOCABULARY + 1, 1))
    places = before[..., 0], before[..., 1]
    np.add.at(sums, places, mask[..., None] * noise)
    np.add.at(counts, places, mask[..., None])
    return (chances + noise - (sums / np.maximum(counts, 1))[places]).astype(np.float32)


def token_model(name: str, gamma: float) -> Problem:
    """Return a model of the next token, whose loss is a mean over tokens, not over sequences."""
    teacher = jax.tree_util.tree_map(np.float32, start_tokens(np.random.default_rng(70)))
    tokens, mask = sequences(teacher)
    data = tokens, noisy_targets(teacher, tokens, mask), mask
    dim = sum(leaf.size for leaf in jax.tree_util.tree_leaves(teacher))
    # bases of the embedding, its origin, which the bias takes up, and that of the logits
    symmetries = EMBEDDING**2 + EMBEDDING + HIDDEN + 1
    return Problem(
        name,
        next_token_losses,
        teacher,
        data,
        gamma,
        SEQUENCES,
        theory=(dim - symmetries) / 2,
        theory_source="half the rank of the Hessian: the minima are its symmetries (Morse-Bott)",
    )


TRAINED = {
    "conv_digits_g100": functools.partial(conv_digits, "conv_digits_g100", 100.0),
    "tokens_g1": functools.partial(token_model, "tokens_g1", 1.0),
}
