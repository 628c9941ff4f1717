"""What rounded products add to llc, on losses that say which products they were traced with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi._modes import EXACT, in_own_modes
from fastvi.evaluation import products
from fastvi.target.data import Problem, hold
from fastvi.target.fingerprint import fingerprint_loss
from fastvi.target.posterior import LocalPosterior
from fastvi.target.ravel import ravel_loss

DIM, COUNT, SURPLUS = 6, 200, 0.25
POINTS = np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32)


def rounded_loss(w, batch):
    """A quadratic that is steeper where products are not exact, as on a GPU by jax's default."""
    is_exact = jax.config.jax_default_matmul_precision in EXACT
    square = jnp.sum(w**2)
    return 0.5 * jnp.mean((batch @ w) ** 2) + (0.0 if is_exact else SURPLUS) * square


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(products, "their_product_eps", lambda: 2.0**-10)


@in_own_modes
def measure(displacement):
    """Return the nats of the loss above at nbeta 10."""
    objective, center = ravel_loss(rounded_loss, jnp.zeros(DIM), jnp.float32)
    posterior = LocalPosterior(center, jnp.float32(10.0), jnp.float32(1.0))
    problem = Problem(posterior, hold(jnp.asarray(POINTS)), 32)
    loss = fingerprint_loss(objective, problem)
    return products.nats_of_rounded_products(objective, loss, problem, displacement)


def test_nats_are_those_of_the_two_losses(on_a_gpu):
    v = jnp.asarray(np.random.default_rng(1).normal(size=(8, DIM)), jnp.float32)
    exact = 10.0 * SURPLUS * np.mean(np.sum(np.asarray(v) ** 2, axis=1))
    assert measure(lambda: v) == pytest.approx(exact, rel=1e-3)
    with jax.default_matmul_precision("highest"):
        assert measure(lambda: v) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("start", ["fit", "localizer"])
def test_rounded_products_are_told_and_are_part_of_the_error(on_a_gpu, start):
    result = fastvi.estimate_llc(
        rounded_loss,
        jnp.zeros(DIM),
        POINTS,
        nbeta=10.0,
        method="sample",
        sampler={"start": start},
        key=0,
        progress=False,
    )
    rounding = result.correction.product_rounding
    assert 0 < rounding < 10.0 * result.llc
    assert result.error_parts.evaluation >= rounding
    assert "rounded_products" in [finding.name for finding in result.health]


def test_nothing_is_measured_where_products_are_exact():
    def unused():
        raise AssertionError("nothing is to be measured")

    assert measure(unused) == 0.0
