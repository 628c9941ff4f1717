"""No estimate exceeds its budget, the look and the fit among what it pays for."""

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.api.plan import walk_budget

COUNT, DIM = 600, 8
rng = np.random.default_rng(5)
X = rng.normal(size=(COUNT, DIM)).astype(np.float32)
Y = (np.tanh(X @ np.linspace(-1, 1, DIM)) + 0.1 * rng.normal(size=COUNT)).astype(np.float32)
CENTER = np.linspace(-1, 1, DIM).astype(np.float32)


def loss_fn(w, batch):
    return 0.5 * jnp.mean((jnp.tanh(batch[0] @ w) - batch[1]) ** 2)


def estimate(budget, **options):
    return fastvi.estimate_llc(
        loss_fn, CENTER, (X, Y), budget=budget, error=1e-3, progress=False, throw=False, **options
    )


@pytest.mark.parametrize("budget", [2e3, 3e4, 1.2e5, 2e5, 4e5])
def test_the_whole_estimate_keeps_to_its_budget(budget):
    result = estimate(budget)
    assert result.sample_gradients <= budget
    assert result.sample_gradients == pytest.approx(result.work.total_fge * COUNT)
    # a walk from the localizer where a budget pays for no fit
    assert result.has_fit == (budget > 5e4)


@pytest.mark.parametrize("budget", [1.5e5, 2e5])
def test_a_fit_that_is_asked_for_is_paid_by_the_budget(budget):
    result = estimate(budget, sampler={"start": "fit"})
    assert result.has_fit
    assert result.sample_gradients <= budget
    needs = [finding for finding in result.health if "Raise budget to" in str(finding.next_step)]
    for finding in needs:
        least = float(finding.next_step.split("Raise budget to ")[1].split(" ")[0])
        assert least > budget


def test_a_budget_that_may_not_pay_for_the_fit_is_refused():
    with pytest.raises(fastvi.ConfigError, match="do not pay for the fit, which may take"):
        estimate(2e4, sampler={"start": "fit"})
    with pytest.raises(fastvi.ConfigError, match="leave out what asks for a fit"):
        estimate(2e4, M=2)


@pytest.mark.parametrize(
    ("num_data", "dim", "budget"),
    [
        (1797, 4810, 1e7),
        (None, 4810, 1e6),
        (10**6, 34_432, 5e10 / 34_432),
        (60_000, 2 * 10**6, 1e6),
    ],
)
def test_a_walk_without_a_budget_ends_after_minutes(num_data, dim, budget):
    assert walk_budget(num_data, dim) == budget
    assert walk_budget(30, dim) == 30 * 20_000


def test_a_long_fit_leaves_the_default_budget_to_the_walkers():
    """It takes three times 20,000 n by itself."""
    few = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    result = fastvi.estimate_llc(
        lambda w, batch: 0.5 * jnp.mean((batch @ w) ** 2),
        jnp.zeros(16),
        few,
        method="sample",
        steps=1000,
        samples_per_step=64,
        progress=False,
    )
    precision = few.T @ few / np.log(40)
    exact = 0.5 * np.trace(precision @ np.linalg.inv(precision + np.eye(16)))
    assert result.correction.method == "sample"
    assert not result.health
    assert abs(result.llc - exact) < 4 * result.llc_sem + 1e-4


def test_what_goes_on_has_a_budget_of_its_own():
    first = estimate(2e5)
    more = fastvi.correct(first, "sample", budget=5e4, progress=False, throw=False)
    assert first.sample_gradients < more.sample_gradients <= first.sample_gradients + 5e4
