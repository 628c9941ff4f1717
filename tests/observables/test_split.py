"""Drift and spread of llc, where w* is no minimum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import fastvi
from fastvi.observables.split import GROUPS, group_means, groups_of, split_of

COUNT, DIM, NBETA, GAMMA = 100, 5, 20.0, 3.0
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(COUNT, DIM)) * np.linspace(0.3, 2.0, DIM)
OUTPUTS = INPUTS @ np.ones(DIM) + 0.5 * RNG.normal(size=COUNT)
HESSIAN = INPUTS.T @ INPUTS / COUNT
START = np.linalg.lstsq(INPUTS, OUTPUTS, rcond=None)[0] + np.array([0.5, 0.4, -0.4, 0.3, -0.3])
SLOPE = INPUTS.T @ (INPUTS @ START - OUTPUTS) / COUNT
COVARIANCE = np.linalg.inv(NBETA * HESSIAN + GAMMA * np.eye(DIM))
MEAN = -NBETA * COVARIANCE @ SLOPE
DRIFT = NBETA * (SLOPE @ MEAN + 0.5 * MEAN @ HESSIAN @ MEAN)
SPREAD = 0.5 * NBETA * np.trace(HESSIAN @ COVARIANCE)

TRIALS = 300


def rise(v):
    """Return n beta (L_n(w* + v) - L_n(w*))."""
    return NBETA * (v @ SLOPE + 0.5 * np.sum(v @ HESSIAN * v, axis=-1))


def test_the_drift_of_a_quadratic_is_what_a_newton_step_gains():
    """Less half of the localizer's pull: the closed forms that the others are held to."""
    newton = 0.5 * NBETA**2 * SLOPE @ COVARIANCE @ SLOPE
    assert pytest.approx(-newton - 0.5 * GAMMA * MEAN @ MEAN) == DRIFT
    assert DRIFT < -SPREAD  # llc is negative


@pytest.mark.parametrize("walkers", [8, 37])
def test_parts_have_no_bias_and_their_errors_are_true(walkers):
    """Of few independent draws, so that the noise of their mean would be a fifth of the spread."""
    rng, root, draws = np.random.default_rng(1), np.linalg.cholesky(COVARIANCE), 1
    scores, biased = [], []
    for _ in range(TRIALS):
        v = MEAN + rng.normal(size=(walkers, draws, DIM)) @ root.T
        at = jnp.asarray(v[:, 0], jnp.float32)
        means = group_means(at).with_draw(at)
        points = np.asarray(means.points(), float)
        split = split_of(rise(v), rise(points))
        scores.append(
            [
                (split.drift.value - DRIFT) / split.drift.sem,
                (split.spread.value - SPREAD) / split.spread.sem,
            ]
        )
        biased.append([split.drift.value - DRIFT, rise(points[0]) - DRIFT])
    biased = np.array(biased)
    error = biased.std(axis=0) / np.sqrt(TRIALS)
    assert abs(biased[:, 0].mean()) < 4 * error[0]
    if walkers == 8:
        assert biased[:, 1].mean() == pytest.approx(SPREAD / walkers, abs=4 * error[1])
        assert biased[:, 1].mean() > 4 * error[1]
    share = np.mean(np.abs(scores) < 2, axis=0)
    assert np.all((0.9 < share) & (share <= 1))


def test_groups_are_of_one_size():
    for walkers in range(1, 200):
        count, size = groups_of(walkers)
        assert count <= GROUPS
        assert 0 <= walkers - count * size < max(size, walkers / 8)
    alone = group_means(jnp.ones((1, 3))).with_draw(jnp.ones((1, 3)))
    assert alone.points().shape == (0, 3)


@pytest.fixture(scope="module")
def result():
    return fastvi.estimate_llc(
        lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2,
        jnp.asarray(START, jnp.float32),
        (INPUTS.astype(np.float32), OUTPUTS.astype(np.float32)),
        nbeta=NBETA,
        localization=GAMMA,
        method="sample",
        progress=False,
    )


@pytest.fixture(scope="module")
def draws(result):
    return fastvi.sample_posterior(result, 160, thin=8, progress=False)


def test_a_negative_llc_that_a_newton_step_explains_is_a_warning(result):
    (found,) = (one for one in result.health if one.name == "negative_llc")
    assert found.severity == "warning"


def test_an_estimate_is_split_where_its_walkers_ended(result):
    drift, spread = fastvi.split_llc(result)
    assert abs(drift.value - DRIFT) < 4.5 * drift.sem
    assert abs(spread.value - SPREAD) < 4.5 * spread.sem
    assert drift.value + spread.value == pytest.approx(result.llc)
    assert drift.sem < 0.3 * abs(DRIFT)
    with pytest.raises(fastvi.DataError, match="holds no walkers"):
        fastvi.split_llc(dataclasses.replace(result, ensemble=None))


def test_a_loss_that_has_changed_is_not_split(result):
    target = dataclasses.replace(
        result.ensemble.target, loss=result.ensemble.target.loss._replace(digest="another")
    )
    ensemble = dataclasses.replace(result.ensemble, target=target)
    with pytest.raises(fastvi.DataError, match="computes something else than at the estimate"):
        fastvi.split_llc(dataclasses.replace(result, ensemble=ensemble))


def test_a_curve_has_drift_and_spread_of_each_checkpoint():
    least = np.linalg.lstsq(INPUTS, OUTPUTS, rcond=None)[0]
    curve = fastvi.llc_curve(
        lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2,
        [jnp.asarray(START, jnp.float32), jnp.asarray(least, jnp.float32)],
        (INPUTS.astype(np.float32), OUTPUTS.astype(np.float32)),
        nbeta=NBETA,
        localization=GAMMA,
        method="sample",
        progress=False,
    )
    assert np.all(np.abs(curve.drift.value - [DRIFT, 0.0]) < 4.5 * curve.drift.sem)
    assert np.all(np.abs(curve.spread.value - SPREAD) < 4.5 * curve.spread.sem)
    assert curve.drift.value[1] > curve.drift.value[0] + 4.5 * curve.drift.sem.sum()
    beside = curve.plot().axes[0].containers[1]
    np.testing.assert_allclose(beside[0].get_ydata(), curve.spread.value)
    unknown = fastvi.LLCCurve(curve.estimates)
    assert np.all(np.isnan(unknown.drift.value))
    assert len(unknown.plot().axes[0].containers) == 1


def test_draws_split_llc_off_the_minimum(draws):
    drift, spread = draws.split
    assert abs(drift.value - DRIFT) < 4.5 * drift.sem
    assert abs(spread.value - SPREAD) < 4.5 * spread.sem
    assert drift.sem < 0.1 * abs(DRIFT)
    assert spread.sem < 0.2 * SPREAD
    assert drift.value + spread.value == pytest.approx(draws.plain.llc_estimate.value, abs=1e-3)
    assert "drift of the mean from w*" in draws.summary()
    assert "off_minimum" in {finding.name for finding in draws.health}


def network(w, inputs):
    return jnp.tanh(inputs * w[:4] + w[4:8]) @ w[8:12] + w[12]


def test_a_network_half_trained_meets_a_long_run():
    """By Metropolis-adjusted Langevin chains of their own, with the same definition."""
    inputs = np.linspace(-2, 2, 80)[:, None].astype(np.float32)
    targets = np.sin(2 * inputs[:, 0]).astype(np.float32)
    nbeta, gamma = 40.0, 20.0

    def loss(w, batch):
        return 0.5 * (network(w, batch[0]) - batch[1]) ** 2

    def mean_loss(w):
        return jnp.mean(loss(w, (inputs, targets)))

    def energy(w, start):
        return nbeta * mean_loss(w) + gamma / 2 * jnp.sum((w - start) ** 2)

    @quick_jit
    def half_trained(w):
        step = lambda w, _: (w - 0.2 * jax.grad(mean_loss)(w), None)  # noqa: E731
        return jax.lax.scan(step, w, length=60)[0]

    @quick_jit
    def chains(start, key):
        def move(state, key):
            w, value, slope = state
            key_noise, key_accept = jax.random.split(key)
            noise = jax.random.normal(key_noise, w.shape)
            new = w - size**2 / 2 * slope + size * noise
            there, back = jax.value_and_grad(energy)(new, start)
            returned = (w - new + size**2 / 2 * back) / size
            log = value - there + 0.5 * jnp.sum(noise**2 - returned**2)
            accept = jnp.log(jax.random.uniform(key_accept)) < log
            state = jax.tree.map(lambda a, b: jnp.where(accept, a, b), (new, there, back), state)
            return state, (state[0], mean_loss(state[0]), accept)

        def chain(key):
            state = (start, *jax.value_and_grad(energy)(start, start))
            return jax.lax.scan(move, state, jax.random.split(key, 2000))[1]

        return jax.vmap(chain)(jax.random.split(key, 32))

    size = 0.12
    start = half_trained(jax.random.normal(jax.random.key(3), (13,)))
    points, losses, accepted = (np.asarray(leaf) for leaf in chains(start, jax.random.key(0)))
    assert accepted.mean() > 0.4
    points, losses = points[:, 500:].astype(float), losses[:, 500:].astype(float)
    least = float(mean_loss(start))
    means = group_means(jnp.zeros((32, 13), jnp.float32))
    for draw in range(0, points.shape[1], 10):
        means = means.with_draw(jnp.asarray(points[:, draw], jnp.float32))
    at_means = [nbeta * (float(mean_loss(one)) - least) for one in means.points()]
    known = split_of(nbeta * (losses - least), np.array(at_means))
    result = fastvi.estimate_llc(
        loss,
        start,
        (inputs, targets),
        nbeta=nbeta,
        localization=gamma,
        sampler={"start": "localizer"},
        progress=False,
    )
    found = fastvi.sample_posterior(result, 120, thin=8, progress=False).split
    assert known.drift.value < -4 * known.drift.sem
    for one, other in zip(found, known, strict=True):
        assert abs(one.value - other.value) < 4 * np.hypot(one.sem, other.sem)
        assert one.sem < 0.25 * abs(other.value)
