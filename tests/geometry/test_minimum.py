"""Is w* a minimum, and is the posterior proper.

The decrement on all data, the direction of least curvature.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.geometry.minimum import descent_line, look_down
from fastvi.geometry.start import StartSettings, make_start, newton_step
from fastvi.results.findings import LEAST_GAIN
from fastvi.target.data import hold
from fastvi.target.objective import make_flat_objective
from fastvi.target.posterior import LocalPosterior

DIM, SUBSET = 5, 512


def logistic(w, batch):
    logits = batch[0] @ w
    return jnp.mean(jnp.logaddexp(0.0, logits) - batch[1] * logits)


def squares(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def problem(seed, count, loss):
    """Noisy data, the minimum in double precision, and the Hessian of n beta L_n there."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(count, DIM)) * [1.0, 0.5, 2.0, 0.3, 1.5]
    logits, w, nbeta = X @ np.ones(DIM), np.zeros(DIM), count / math.log(count)
    if loss is squares:
        Y = logits + 2.0 * rng.normal(size=count)
        w, hessian = np.linalg.lstsq(X, Y)[0], X.T @ X
        return X, Y, w, nbeta * hessian / count
    Y = (rng.uniform(size=count) < 1 / (1 + np.exp(-logits))).astype(float)
    for _ in range(12):
        p = 1 / (1 + np.exp(-X @ w))
        hessian = (X * (p * (1 - p))[:, None]).T @ X
        step = np.linalg.solve(hessian, X.T @ (p - Y))
        w = w - step
        if np.max(np.abs(step)) < 1e-9:
            break
    return X, Y, w, nbeta * hessian / count


def decrement_program(loss):
    """The subset has one shape: its program, the larger one, serves data of all sizes."""
    objective = make_flat_objective(loss)

    @jax.jit
    def start_at(posterior, subset):
        return make_start(
            objective, posterior, subset, lambda key: None, StartSettings(), jax.random.key(0)
        )

    slope_at = jax.jit(objective.grad)

    def decrement(center, data, nbeta):
        posterior = LocalPosterior(center, nbeta, jnp.ones(()))
        subset = hold(tuple(leaf[:SUBSET] for leaf in data))
        return newton_step(start_at(posterior, subset), posterior, slope_at(center, data)).gain

    return decrement


@pytest.mark.parametrize("loss", [logistic, squares])
def test_the_decrement_is_of_all_data(loss):
    """At the minimum of noisy data nothing is gained, a nat off something is.

    N from 512 to 1e5, 20 seeds.
    """
    decrement = decrement_program(loss)
    for count in (512, 3000, 20_000, 100_000):
        for seed in range(20):
            X, Y, w, hessian = problem(seed, count, loss)
            data = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
            nbeta = jnp.float32(count / math.log(count))
            direction = np.random.default_rng(seed + 1).normal(size=DIM)
            off = direction * math.sqrt(2 / (direction @ hessian @ direction))
            assert float(decrement(jnp.asarray(w, jnp.float32), data, nbeta)) < 1e-3, (count, seed)
            assert (
                float(decrement(jnp.asarray(w + off, jnp.float32), data, nbeta)) > 2 * LEAST_GAIN
            ), (count, seed)


def test_an_estimate_looks_at_all_data():
    X, Y, w, hessian = problem(3, 20_000, logistic)
    data = X.astype(np.float32), Y.astype(np.float32)
    options = {
        "progress": False,
        "method": "variational",
        "num_chains": 1,
        "steps": 20,
        "eval_samples": 32,
        "M": 1,
        "r": 0,
        "curvature_examples": SUBSET,
    }
    at = fastvi.estimate_llc(logistic, jnp.asarray(w, jnp.float32), data, **options)
    off = w + np.eye(DIM)[2] * math.sqrt(2 / hessian[2, 2])
    beside = fastvi.estimate_llc(logistic, jnp.asarray(off, jnp.float32), data, **options)
    assert "not_a_minimum" not in [finding.name for finding in at.health]
    assert at.curvature.newton_decrement < 1e-3
    assert "not_a_minimum" in [finding.name for finding in beside.health]
    assert beside.curvature.newton_decrement == pytest.approx(1.0, rel=0.15)


NO_DATA = hold(jnp.zeros(1))


@functools.cache
def looks(loss):
    """Return the programs that start at a posterior's center and that evaluate points along it."""
    objective = make_flat_objective(lambda w, batch: loss(w))

    def start_at(posterior):
        return make_start(
            objective, posterior, NO_DATA, lambda key: None, StartSettings(), jax.random.key(0)
        )

    def excess_along(center, points):
        return jax.vmap(lambda v: loss(center + v) - loss(center))(points)

    return jax.jit(start_at), jax.jit(excess_along)


def bottom(loss, dim, gamma, nbeta=50.0):
    posterior = LocalPosterior(jnp.zeros(dim), jnp.float32(nbeta), jnp.float32(gamma))
    start_at, excess_along = looks(loss)
    start = start_at(posterior)
    excess = excess_along(posterior.center, descent_line(posterior, start).points)
    reference = float(loss(posterior.center))
    return look_down(posterior, start, reference, np.asarray(excess), losses=8)


def test_a_saddle_curves_down_whatever_holds_it():
    def saddle(w):
        return 0.5 * jnp.sum(w[:3] ** 2) + 0.02 * ((w[3] ** 2 - 1) ** 2 - 1)

    for gamma in (1.0, 10.0):
        found = bottom(saddle, 4, gamma)
        assert found.curvature == pytest.approx(50 * -0.08, rel=1e-3)
        assert found.fall == pytest.approx(
            0.75, abs=0.1
        )  # where the curvature alone would give a nat
        assert (found.level, found.is_flat, found.losses) == (0, False, 8)


def test_minima_do_not():
    assert bottom(lambda w: jnp.sum(jnp.arange(4.0) * w**2), 4, 1.0).losses == 0
    assert bottom(lambda w: jnp.sum(w**4), 3, 1.0).losses == 0
    # down by less than a tenth of the localizer: nothing that llc would feel
    assert bottom(lambda w: 0.5 * jnp.sum(jnp.array([1.0, 1.0, -0.001]) * w**2), 3, 1.0).losses == 0


def test_without_a_localizer_flat_directions_are_counted():
    flat = bottom(lambda w: 0.5 * jnp.sum(jnp.array([4.0, 2.0, 0.0, 0.0]) * w**2), 4, 0.0)
    assert (flat.level, flat.is_flat) == (2, True)
    bounded = bottom(lambda w: jnp.sum(w**4), 1, 0.0)
    assert (bounded.level, bounded.is_flat) == (1, False)
    assert bottom(lambda w: 0.5 * w @ w, 3, 0.0).level == 0


OPTIONS = {
    "progress": False,
    "method": "reweight",
    "num_chains": 1,
    "steps": 20,
    "eval_samples": 32,
    "M": 1,
    "r": 0,
}
DATA = (jnp.ones((300, 1)),)


def names(result):
    return {finding.name: finding for finding in result.health}


def test_a_saddle_is_still_one_after_a_correction():
    def saddle(w, batch):
        return (0.5 * jnp.sum(w[:3] ** 2) + 0.02 * ((w[3] ** 2 - 1) ** 2 - 1)) * jnp.mean(batch[0])

    result = fastvi.estimate_llc(saddle, jnp.zeros(4), DATA, **OPTIONS)
    assert result.correction.method == "reweight"
    assert "saddle" in names(result)["negative_curvature"].observed
    assert result.curvature.lowest == pytest.approx(-0.08 * result.nbeta + 1, rel=1e-3)


@pytest.mark.parametrize(
    ("localization", "name"), [(1.0, "constant_loss"), (0.0, "improper_posterior")]
)
def test_a_loss_without_parameters_is_called_so(localization, name):
    result = fastvi.estimate_llc(
        lambda w, batch: 1.0 + 0.0 * jnp.sum(w) + 0.0 * jnp.mean(batch[0]),
        jnp.zeros(4),
        DATA,
        localization=localization,
        **OPTIONS,
    )
    assert names(result)[name].severity == "error"
    if localization == 0:
        assert "4 of 4 directions" in names(result)[name].observed
        assert result.correction is None  # no draw stands for an improper posterior


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_gain_is_no_more_than_the_loss_shows(scale):
    """Beside the logarithm's pole: a Newton step from there leaves its domain, or overshoots."""

    def loss(w, batch):
        return 0.5 * jnp.mean((jnp.log(w[0]) - batch) ** 2)

    observed = 1.4 + 0.1 * np.random.default_rng(0).normal(size=200)
    options = {"method": "variational", "num_chains": 1, "steps": 20, "M": 1, "r": 0}
    w = jnp.asarray([10.0])
    found = fastvi.estimate_llc(
        loss, w, observed, nbeta=scale * 10.0, eval_samples=32, progress=False, **options
    )
    most = scale * 10.0 * (float(loss(w, observed)) - 0.5 * observed.var())
    assert 0 < found.curvature.newton_decrement < most
    assert "not_a_minimum" in [finding.name for finding in found.health]
