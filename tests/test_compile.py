"""A second estimate of the same shapes and loss compiles nothing."""

import jax
import jax.numpy as jnp
import numpy as np

import fastvi
from fastvi.compilation import CLOCK

DATA = (np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32),)
SETTINGS = {"num_chains": 2, "steps": 50, "early_stop": False, "progress": False}


def loss(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w["a"]) ** 2)


def test_nothing_is_compiled_twice():
    def estimate(seed, shift, **changes):
        data = (DATA[0] + shift,)
        return fastvi.estimate_llc(
            loss, {"a": jnp.zeros(4)}, data, **({"key": jax.random.key(seed)} | SETTINGS | changes)
        )

    first = estimate(0, 0.0)
    compiled = CLOCK.programs
    assert compiled > 0
    second = estimate(1, 0.0)
    assert CLOCK.programs == compiled
    assert second.llc != first.llc
    # neither do other data, nbeta or localization of the same shapes
    estimate(2, 0.1, nbeta=20.0, localization=3.0)
    assert CLOCK.programs == compiled
    assert second.timings["compile"] < first.timings["compile"]
