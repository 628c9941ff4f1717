"""Losses without a second derivative, and with kinks: right numbers, and no false finding."""

import jax
import jax.numpy as jnp
import numpy as np

import fastvi

RNG = np.random.default_rng(0)
COUNT, DIM = 200, 4
INPUTS = RNG.normal(size=(COUNT, DIM)).astype(np.float32)
TARGETS = (INPUTS @ RNG.normal(size=DIM) + 0.3 * RNG.normal(size=COUNT)).astype(np.float32)


def on_host(w, inputs, targets):
    """A simulator in numpy: the loss, and its gradient by hand."""
    w, inputs, targets = map(np.asarray, (w, inputs, targets))
    errors = inputs @ w - targets
    return np.float32(0.5 * np.mean(errors**2)), (inputs.T @ errors / len(errors)).astype(w.dtype)


@jax.custom_vjp
def simulated(w, batch):
    shape = jax.ShapeDtypeStruct((), w.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype)
    return jax.pure_callback(on_host, shape, w, *batch, vmap_method="sequential")[0]


def _forward(w, batch):
    shape = jax.ShapeDtypeStruct((), w.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype)
    return jax.pure_callback(on_host, shape, w, *batch, vmap_method="sequential")


def _backward(gradient, cotangent):
    return cotangent * gradient, None


simulated.defvjp(_forward, _backward)


def test_a_simulator_on_the_host_has_the_llc_of_its_closed_form():
    nbeta, localization = COUNT / np.log(COUNT), 1.0
    minimum = np.linalg.lstsq(INPUTS, TARGETS)[0]
    # a fit of few steps: a walk would take thousands of calls
    short = {"steps": 200, "batch_size": COUNT, "samples_per_step": 1, "early_stop": False}
    result = fastvi.estimate_llc(
        simulated,
        minimum,
        (INPUTS, TARGETS),
        method="reweight",
        num_chains=1,
        eval_samples=64,
        progress=False,
        **short,
    )
    curvature = nbeta * np.linalg.eigvalsh(INPUTS.T @ INPUTS / COUNT)
    exact = 0.5 * np.sum(curvature / (curvature + localization))
    assert abs(result.llc - exact) < 4 * result.llc_sem
    assert result.llc_sem < 0.03 * exact
    assert "by differences of gradients" in result.summary()
    assert not [finding for finding in result.health if finding.severity != "note"]


def test_a_kink_at_the_minimum_is_no_way_down():
    """The mean absolute error is least where some errors are zero, with a slope on either side."""

    def loss(w, batch):
        return jnp.abs(batch[0] @ w - batch[1])

    truth = np.arange(1.0, DIM + 1, dtype=np.float32)
    data = INPUTS, INPUTS @ truth + 0.1  # all errors are below zero at w*: its side falls
    options = {"method": "variational", "steps": 20, "num_chains": 1, "eval_samples": 32}

    def at(w, targets):
        return fastvi.estimate_llc(loss, w, (INPUTS, targets), progress=False, M=1, r=0, **options)

    exact = at(truth, INPUTS @ truth + 1e-6 * np.sign(RNG.normal(size=COUNT)))
    assert "not_a_minimum" not in [finding.name for finding in exact.health]
    assert exact.curvature.newton_decrement < 0.25
    beside = at(truth + 0.2, data[1])
    assert "not_a_minimum" in [finding.name for finding in beside.health]
