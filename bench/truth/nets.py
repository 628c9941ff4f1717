"""Small nonlinear networks.

Tanh and ReLU students of a teacher inside them, and classifiers of digits.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from bench.truth.problem import Problem

COUNT = 1000
WEIGHTS = pathlib.Path(__file__).parent / "weights"
DIGITS_STEPS, DIGITS_LR, DIGITS_SEED = 4000, 1e-2, 0
UNKNOWN = "none known at this point"
ZERO_TEACHER = (
    "Aoyagi & Watanabe 2005: (h + i^2 + i) / (4 i + 2), "
    "i the largest with i^2 <= h, one input and output"
)


def hidden_layer(params, inputs, activation):
    """Return the network's output, one column."""
    return activation(inputs @ params["w"] + params["b"]) @ params["out"]


def squared_loss(activation):
    """Return half the mean squared error of a network with one hidden layer."""

    def loss_fn(params, batch):
        return 0.5 * jnp.mean((hidden_layer(params, batch[0], activation) - batch[1]) ** 2)

    return loss_fn


def teacher_in_student(width: int, inputs: int = 2, teacher: int = 2) -> dict[str, np.ndarray]:
    """Return a teacher's units beside idle ones, whose outgoing weights are 0."""
    rng = np.random.default_rng(30)
    out = np.concatenate([[1.0, -0.7], np.zeros(width - teacher)])
    return {"w": rng.normal(size=(inputs, width)), "b": 0.3 * rng.normal(size=width), "out": out}


def tanh_student(name: str, width: int, gamma: float, noise: float = 0.1) -> Problem:
    """Return a tanh student trained from the teacher inside it to the minimum on noisy data."""
    rng = np.random.default_rng(31)
    start = teacher_in_student(width)
    inputs = rng.normal(size=(COUNT, 2))
    outputs = hidden_layer(start, inputs, np.tanh) + noise * rng.normal(size=COUNT)
    params = _descend(start, inputs, outputs)
    data = (inputs.astype(np.float32), outputs.astype(np.float32))
    return Problem(name, squared_loss(jnp.tanh), params, data, gamma, COUNT, theory_source=UNKNOWN)


def _descend(start, inputs, outputs):
    """Minimise the squared error by Levenberg-Marquardt in float64."""
    shapes = {key: value.shape for key, value in start.items()}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]

    def unravel(flat):
        return {
            key: part.reshape(shape)
            for (key, shape), part in zip(shapes.items(), np.split(flat, ends), strict=True)
        }

    def residuals(flat):
        return hidden_layer(unravel(flat), inputs, np.tanh) - outputs

    def jacobian(flat):
        params = unravel(flat)
        features = np.tanh(inputs @ params["w"] + params["b"])
        slopes = (1 - features**2) * params["out"]
        weights = inputs[:, :, None] * slopes[:, None, :]
        return np.concatenate([weights.reshape(len(inputs), -1), slopes, features], axis=1)

    flat = np.concatenate([value.ravel() for value in start.values()])
    tolerances = {"xtol": 1e-12, "ftol": 1e-15, "gtol": 1e-12, "max_nfev": 20_000}
    found = scipy.optimize.least_squares(residuals, flat, jacobian, method="lm", **tolerances)  # pyright: ignore
    return {key: value.astype(np.float32) for key, value in unravel(found.x).items()}


def realizable(name, activation, params, gamma, theory=None, source=UNKNOWN) -> Problem:
    """Return a student at parameters that fit noiseless data exactly.

    Inputs are as many as its first layer takes.
    """
    inputs = np.random.default_rng(32).normal(size=(COUNT, len(params["w"]))).astype(np.float32)
    params = {key: value.astype(np.float32) for key, value in params.items()}
    outputs = np.asarray(hidden_layer(params, jnp.asarray(inputs), activation))
    loss_fn = squared_loss(activation)
    return Problem(
        name, loss_fn, params, (inputs, outputs), gamma, COUNT, theory=theory, theory_source=source
    )


def tanh_zero(name: str, width: int, gamma: float) -> Problem:
    """Return sum_i a_i tanh(b_i x) fitted to zero, at zero, without biases."""
    rng = np.random.default_rng(33)
    inputs = rng.normal(size=(COUNT, 1)).astype(np.float32)
    params = {"w": np.zeros((1, width), np.float32), "out": np.zeros(width, np.float32)}
    root = math.isqrt(width)

    def loss_fn(params, batch):
        return 0.5 * jnp.mean((jnp.tanh(batch[0] @ params["w"]) @ params["out"] - batch[1]) ** 2)

    return Problem(
        name,
        loss_fn,
        params,
        (inputs, np.zeros(COUNT, np.float32)),
        gamma,
        COUNT,
        theory=(width + root**2 + root) / (4 * root + 2),
        theory_source=ZERO_TEACHER,
    )


def digits(name: str, hidden: int, gamma: float) -> Problem:
    """Return a 64-hidden-10 tanh classifier of digits, at the stored end of its training."""
    from fastvi.demos.digits import cross_entropy, load_digits

    data = tuple(np.asarray(part) for part in load_digits())
    params = digits_weights(hidden)
    return Problem(
        name, cross_entropy, params, data, gamma, len(data[1]), theory_source=UNKNOWN, size="medium"
    )


def digits_weights(hidden: int):
    """Return the weights of the classifier."""

    def train():
        from fastvi.demos import digits as demo

        start = demo.init_network(jax.random.key(DIGITS_SEED), hidden)
        return demo.train(start, demo.load_digits(), DIGITS_STEPS, DIGITS_LR)

    return stored_weights(f"digits_{hidden}", train)


def stored_weights(name: str, train: Callable[[], Any]) -> dict[str, dict[str, np.ndarray]]:
    """Load trained weights by layer and part; train and store them where they are missing.

    They are stored because training amplifies rounding: another machine would end at another
    minimum.
    """
    path = WEIGHTS / f"{name}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        parts = {
            f"{layer}_{part}": np.asarray(leaf, np.float32)
            for layer, leaves in train().items()
            for part, leaf in leaves.items()
        }
        np.savez(path, **parts)
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as stored:
        for key, leaf in stored.items():
            layer, part = key.split("_")
            found.setdefault(layer, {})[part] = leaf
    return found


NETS = {
    "tanh_3_g1": lambda: tanh_student("tanh_3_g1", 3, 1.0),
    "tanh_3_g10": lambda: tanh_student("tanh_3_g10", 3, 10.0),
    "tanh_4_g1": lambda: tanh_student("tanh_4_g1", 4, 1.0),
    "tanh_realizable_3_g1": lambda: realizable(
        "tanh_realizable_3_g1", jnp.tanh, teacher_in_student(3), 1.0
    ),
    "tanh_zero_1": lambda: tanh_zero("tanh_zero_1", 1, 1.0),
    "tanh_zero_3": lambda: tanh_zero("tanh_zero_3", 3, 1.0),
    "relu_realizable_4_g1": lambda: realizable(
        "relu_realizable_4_g1", jax.nn.relu, teacher_in_student(4), 1.0
    ),
} | {
    f"digits_{hidden}_g{gamma:g}": functools.partial(
        digits, f"digits_{hidden}_g{gamma:g}", hidden, gamma
    )
    for hidden, gammas in ((16, (0.1, 1.0, 10.0, 100.0, 1000.0)), (64, (1.0, 100.0)))
    for gamma in gammas
}
