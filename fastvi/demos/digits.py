"""Train a small classifier on handwritten digits, and estimate its learning coefficient."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from fastvi._optional import import_optional
from fastvi._typing import Array, Batch, Float, PyTree, Scalar
from fastvi.config import VIConfig
from fastvi.demos.base import AbstractDemo, Say, check
from fastvi.results.estimate import LLCEstimate

# scikit-learn's digits: 8 x 8 pixels, of 0 to 16.
PIXELS, CLASSES, BRIGHTEST = 64, 10, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsDemo(AbstractDemo):
    """Train a small digits classifier and estimate its learning coefficient.

    The model is a 64-hidden-10 tanh network on the 1797 digits of scikit-learn.

    Attributes:
        hidden: Units of the hidden layer.
        train_steps: Full-batch Adam steps of the training, with a cosine decay to zero.
        train_lr: Peak learning rate of the training.
    """

    out: Path = Path("runs/demo-digits")
    hidden: int = 16
    train_steps: int = 4000
    train_lr: float = 1e-2

    def check_options(self) -> None:
        """Raise ConfigError where an option of the demo's own is impossible."""
        check(self.hidden >= 1, "hidden", "1 or more", self.hidden)
        check(self.train_steps >= 1, "train_steps", "1 or more", self.train_steps)
        check(0 < self.train_lr < float("inf"), "train_lr", "a positive number", self.train_lr)

    def produce(self, config: VIConfig, say: Say) -> tuple[LLCEstimate, str]:
        """Train and estimate."""
        data = load_digits()
        params = init_network(jax.random.key(self.seed), self.hidden)
        say(
            f"training       {PIXELS}-{self.hidden}-{CLASSES} tanh network on {len(data[1]):,} "
            f"digits, {self.train_steps:,} full-batch steps ..."
        )
        trained_at = time.perf_counter()
        # jax returns before the work is done, and the seconds are those of the work.
        params = jax.block_until_ready(train(params, data, self.train_steps, self.train_lr))
        seconds = time.perf_counter() - trained_at
        loss, right = float(cross_entropy(params, data)), float(accuracy(params, data))
        say(f"trained        loss {loss:.3g} nats, accuracy {100 * right:.1f} %, {seconds:.1f} s")
        say("estimating     under a minute on two idle cores, most of it compiling ...")
        return self.estimate(cross_entropy, params, data, config), ""


def target() -> tuple[Callable[[PyTree, Batch], Scalar], PyTree, Batch]:
    """Train the demo's network and return loss, parameters and data, as `fastvi llc` takes them."""
    data, defaults = load_digits(), DigitsDemo()
    params = init_network(jax.random.key(defaults.seed), defaults.hidden)
    return cross_entropy, train(params, data, defaults.train_steps, defaults.train_lr), data


def load_digits() -> Batch:
    """Return images, scaled to [0, 1], and labels."""
    datasets = import_optional(
        "sklearn.datasets", extra="cli", distribution="scikit-learn", purpose="the digits demo"
    )
    images, labels = datasets.load_digits(return_X_y=True)
    return jnp.asarray(images / BRIGHTEST, jnp.float32), jnp.asarray(labels, jnp.int32)


def init_network(key: Array, hidden: int) -> PyTree:
    """Draw weights of variance 1 / fan-in; biases start at zero."""
    key_hidden, key_out = jax.random.split(key)
    return {
        "hidden": {
            "w": jax.random.normal(key_hidden, (PIXELS, hidden)) / PIXELS**0.5,
            "b": jnp.zeros(hidden),
        },
        "out": {
            "w": jax.random.normal(key_out, (hidden, CLASSES)) / hidden**0.5,
            "b": jnp.zeros(CLASSES),
        },
    }


def logits(
    params: PyTree, images: Float[Array, "examples pixels"]
) -> Float[Array, "examples classes"]:
    """Apply the network."""
    features = jnp.tanh(images @ params["hidden"]["w"] + params["hidden"]["b"])
    return features @ params["out"]["w"] + params["out"]["b"]


def cross_entropy(params: PyTree, batch: Batch) -> Scalar:
    """Evaluate the mean loss per example, in nats."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean()


def accuracy(params: PyTree, batch: Batch) -> Scalar:
    """Evaluate the share of digits classified rightly."""
    images, labels = batch
    return jnp.mean(jnp.argmax(logits(params, images), axis=-1) == labels)


@partial(jax.jit, static_argnames="steps")
def train(params: PyTree, data: Batch, steps: int, lr: Scalar | float) -> PyTree:
    """Minimise the cross-entropy on all data by Adam with a cosine decay."""
    # A rate that has decayed to zero leaves w* at a minimum, where llc is defined.
    optimizer = optax.adam(lambda count: lr * optax.cosine_decay_schedule(1.0, steps)(count))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(cross_entropy)(params, data), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return params
