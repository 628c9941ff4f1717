"""Estimates of a gradient that are named are the ones that walkers step by."""

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.target import stream as streaming

COUNT, DIM = 512, 8
X = np.random.default_rng(1).normal(size=(COUNT, DIM)).astype(np.float32)
PRECISION = 40.0 * X.T @ X / COUNT
EXACT = 0.5 * np.trace(PRECISION @ np.linalg.inv(PRECISION + 10 * np.eye(DIM)))


def loss_fn(w, batch):
    return 0.5 * jnp.mean((batch @ w) ** 2)


def estimate(gradients, data=X, **options):
    return fastvi.estimate_llc(
        loss_fn,
        jnp.zeros(DIM),
        data,
        nbeta=40.0,
        localization=10.0,
        error=0.05,
        progress=False,
        sampler={"gradients": gradients, **options},
    )


@pytest.mark.parametrize("gradients", ["fresh", "anchored", "blocks", "full"])
def test_named_gradients_find_the_llc(gradients):
    result = estimate(gradients)
    assert abs(result.llc - EXACT) < 4 * result.llc_sem
    assert result.has_fit == (gradients in ("blocks", "full"))
    walk = result.correction
    if gradients == "full":
        assert walk.data_blocks == 1
    elif gradients == "blocks":
        assert walk.data_blocks > 1
    else:
        # of each example a gradient, and at w* a loss or another
        price = 2 if gradients == "anchored" else 4 / 3
        steps = walk.steps * walk.walkers * walk.batch * price
        assert steps <= result.sample_gradients
    assert estimate(gradients).llc == result.llc


def test_anchored_batches_cost_two_gradients():
    fresh, anchored = (estimate(name) for name in ("fresh", "anchored"))
    cost = [
        one.sample_gradients
        / (one.correction.steps * one.correction.walkers * one.correction.batch)
        for one in (fresh, anchored)
    ]
    assert cost[1] > 1.3 * cost[0]


def test_gradients_and_start_must_agree():
    with pytest.raises(fastvi.ConfigError, match="^sampler.start must be 'fit' beside"):
        estimate("full", start="localizer")
    with pytest.raises(fastvi.ConfigError, match="^sampler.gradients must be one of"):
        estimate("exact")
    with pytest.raises(fastvi.ConfigError, match="gradients='fresh' makes no fit, and M is of one"):
        fastvi.estimate_llc(
            loss_fn, jnp.zeros(DIM), X, M=2, sampler={"gradients": "fresh"}, progress=False
        )


def test_a_walk_has_no_chains():
    """Before, the fit ran first, and its result was refused then."""

    def never(w, batch):
        raise AssertionError("the loss was called")

    with pytest.raises(fastvi.ConfigError, match="makes no fit, and num_chains is of"):
        fastvi.estimate_llc(
            never, jnp.zeros(DIM), X, sampler={"start": "localizer"}, progress=False, num_chains=2
        )


def test_few_examples_have_no_blocks():
    with pytest.raises(fastvi.ConfigError, match="four blocks of min_block=8 examples"):
        estimate("blocks", data=X[:20])
    result = estimate("full", data=X[:20])
    with pytest.raises(fastvi.ConfigError, match='Take "full", or change'):
        fastvi.correct(result, "sample", sampler={"gradients": "blocks"}, progress=False)


def test_a_stream_has_no_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 1)
    batches = [X[:256], X[256:]] * 100
    with pytest.raises(fastvi.ConfigError, match="blocks of all data, which a stream"):
        estimate("blocks", data=iter(batches))


def test_a_correction_goes_on_from_a_fit():
    result = estimate("full")
    with pytest.raises(fastvi.ConfigError, match="of walks from the localizer"):
        fastvi.correct(result, "sample", sampler={"gradients": "anchored"}, progress=False)
