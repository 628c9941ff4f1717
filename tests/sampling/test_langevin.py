"""Langevin dynamics on anchored blocks: exact moments, the heat of noise, unbiased gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import fastvi
from fastvi.api.arguments import make_problem
from fastvi.config import VIConfig
from fastvi.families.base import LinearMap
from fastvi.sampling.dynamics import (
    HOLD,
    Walker,
    heat,
    make_potential,
    refresh,
    run_steps,
    start_tuning,
)
from fastvi.sampling.gradients import (
    anchored_value_and_grad,
    block_counts,
    gradient_noise,
    make_anchor,
    split_data,
)
from fastvi.target.data import hold
from fastvi.target.ravel import ravel_loss

DIM, COUNT, NBETA, GAMMA = 4, 240, 40.0, 2.0


def regression(noise):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(COUNT, DIM)) * [1.0, 0.5, 2.0, 0.2]
    Y = X @ np.ones(DIM) + noise * rng.normal(size=COUNT)
    w = np.linalg.solve(X.T @ X, X.T @ Y)
    data = (jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32))
    objective, center = ravel_loss(
        lambda w, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2),
        jnp.asarray(w, jnp.float32),
        jnp.float32,
    )
    problem = make_problem(center, hold(data), NBETA, GAMMA, VIConfig(batch_size=32), "nbeta")
    return objective, problem, X, X.T @ X / COUNT


def identity_map():
    """Rows of the basis are orthonormal and stretched by nothing: x is v."""
    return LinearMap(jnp.zeros(DIM), jnp.ones(DIM), jnp.eye(DIM)[:1], jnp.zeros((1, 1)))


def round_map(covariance):
    """x is v over its standard deviation in each direction, for a diagonal covariance."""
    return LinearMap(
        jnp.zeros(DIM), jnp.sqrt(jnp.asarray(covariance)), jnp.eye(DIM)[:1], jnp.zeros((1, 1))
    )


def dynamics(
    objective,
    problem,
    linear_map,
    num_blocks,
    rounds,
    walkers=64,
    energy_error=1e-3,
    friction_time=2.0,
):
    """Return the mean over the later half of the rounds of llc, of |v|^2, and the step size."""
    reference = objective.loss(problem.posterior.center, problem.data.examples)
    index = jnp.asarray(split_data(COUNT, num_blocks))
    evaluate = make_potential(objective, problem, linear_map, reference)
    keys = jax.random.split(jax.random.key(1), walkers)
    x, momentum = jax.random.normal(jax.random.key(2), (2, walkers, DIM))
    blank = jnp.zeros(walkers)

    @quick_jit
    def begin():
        anchor = make_anchor(objective, problem, linear_map.center, reference, index)
        walker = Walker(x, momentum, jnp.zeros_like(x), blank, blank)
        return anchor, refresh(evaluate, anchor, walker, keys, jnp.int32(0))

    anchor, state = begin()

    @quick_jit
    def one_round(state, tuning, first):
        return run_steps(
            evaluate,
            linear_map,
            anchor,
            state,
            tuning,
            keys,
            first,
            lambda v, gradient, x, pulled: jnp.stack([v @ gradient]),
            friction_time=jnp.float32(friction_time),
            energy_error=jnp.float32(energy_error),
            bins=4,
            bin_length=16,
        )

    tuning, records = start_tuning(DIM, jnp.float32), []
    for number in range(rounds):
        state, tuning, record = one_round(state, tuning, jnp.int32(64 * number))
        records.append(jax.device_get(record))
    later = records[rounds // 2 :]
    return (
        np.mean([problem.posterior.learning_coefficient(jnp.asarray(r.llc)).mean() for r in later]),
        np.mean([r.radius2.mean() for r in later]),
        np.mean([r.energy_error.mean() for r in later]),
        float(tuning.step),
    )


@pytest.mark.as_users_compile
def test_positions_of_a_quadratic_are_sampled_without_bias():
    """BAOAB's marginal in x is exact at any stable step.

    The energy error is held where it was asked.
    """
    objective, problem, _, hessian = regression(noise=0.0)
    precision = NBETA * hessian + GAMMA * np.eye(DIM)
    linear_map = round_map(1 / np.diag(precision))
    llc, radius2, energy_error, step = dynamics(
        objective, problem, linear_map, 1, rounds=60, energy_error=0.05
    )
    covariance = np.linalg.inv(precision)
    assert step > 0.4
    assert llc == pytest.approx(0.5 * NBETA * np.sum(covariance * hessian), rel=0.015)
    assert radius2 == pytest.approx(np.trace(covariance), rel=0.03)
    assert energy_error == pytest.approx(0.05, rel=0.25)


def test_noise_heats_as_foretold():
    """Blocks of equal Hessians and tilts of different signs.

    Noise that an anchor would take away, here put back.
    """
    tilt = 3.0
    signs = jnp.asarray(np.where(np.arange(COUNT) % 2, 1.0, -1.0), jnp.float32)[:, None] * jnp.ones(
        (1, DIM)
    )
    bent = 5.0  # the slope of each example turns with w: an anchor at w* does not know

    def loss(w, batch):
        return 0.5 * w @ w + jnp.mean(batch[0] @ (tilt / bent * jnp.sin(bent * w + 1.0)))

    objective, center = ravel_loss(loss, jnp.zeros(DIM), jnp.float32)
    problem = make_problem(center, hold((signs,)), 4.0, 1.0, VIConfig(batch_size=32), "nbeta")
    index = jnp.asarray(split_data(COUNT, 8))
    reference = objective.loss(center, problem.data.examples)
    anchor = make_anchor(objective, problem, jnp.zeros(DIM), reference, index)
    scale = 1 / np.sqrt(5.0)
    linear_map = round_map(np.full(DIM, 1 / 5.0))
    points = scale * jax.random.normal(jax.random.key(0), (400, DIM))
    ratio = (index.shape[0] - 1) / index.shape[
        0
    ]  # a block drawn among few has less variance than the estimate of it
    noise = ratio * float(gradient_noise(objective, problem, anchor, points, linear_map.pull_back))
    cold = dynamics(objective, problem, linear_map, 1, rounds=60, energy_error=0.01)
    hot = dynamics(objective, problem, linear_map, 8, rounds=60, energy_error=0.01)
    heated = 0.5 * 5.0 * (hot[1] - cold[1])
    assert HOLD == 2
    assert heat(noise, hot[3], 2.0) > 0.05
    assert heated == pytest.approx(heat(noise, hot[3], 2.0), rel=0.25)


def test_anchored_gradients_are_unbiased_and_belong_to_their_potential():
    objective, problem, _, _ = regression(noise=0.5)
    index = jnp.asarray(split_data(COUNT, 8))
    assert sorted(np.asarray(index).ravel().tolist()) == list(range(COUNT))
    reference = objective.loss(problem.posterior.center, problem.data.examples)
    v, at = jnp.asarray([0.3, -0.2, 0.1, 0.7]), jnp.full(DIM, 0.1)
    anchor = make_anchor(objective, problem, at, reference, index)

    def on_block(v, block):
        return anchored_value_and_grad(objective, problem, anchor, reference, v, block)

    blocks = jnp.arange(8)
    excess, gradient, _ = quick_jit(jax.vmap(on_block, in_axes=(None, 0)))(v, blocks)
    exact = objective.value_and_grad(problem.posterior.center + v, problem.data.examples)
    assert np.mean(excess) == pytest.approx(float(exact[0] - reference), rel=1e-5)
    np.testing.assert_allclose(np.mean(gradient, axis=0), exact[1], rtol=1e-5, atol=1e-6)
    assert np.std(excess) > 1e-3
    slope = quick_jit(jax.grad(lambda v: on_block(v, jnp.int32(3))[2]))(v)
    np.testing.assert_allclose(slope, gradient[3], rtol=1e-4, atol=1e-5)
    at_anchor = quick_jit(on_block)(at, jnp.int32(5))[1]
    np.testing.assert_allclose(at_anchor, anchor.gradient, rtol=1e-5, atol=1e-6)


def test_noise_of_the_gradients_is_that_of_the_blocks():
    objective, problem, X, _ = regression(noise=0.5)
    index = np.asarray(split_data(COUNT, 8))
    reference = objective.loss(problem.posterior.center, problem.data.examples)
    anchor = make_anchor(objective, problem, jnp.zeros(DIM), reference, jnp.asarray(index))
    points = np.random.default_rng(3).normal(size=(3, DIM)).astype(np.float32)
    linear_map = round_map([0.5, 1.0, 2.0, 4.0])
    found = gradient_noise(objective, problem, anchor, jnp.asarray(points), linear_map.pull_back)
    hessians = np.stack([X[rows].T @ X[rows] / len(rows) for rows in index])
    forces = NBETA * np.einsum("bij,pj->pbi", hessians, points) * np.sqrt([0.5, 1.0, 2.0, 4.0])
    assert float(found) == pytest.approx(
        np.mean(np.sum(np.var(forces, axis=1, ddof=1), axis=-1)), rel=1e-3
    )


def test_blocks_have_one_size_and_little_is_left_over():
    for count in (100, 997, 1797, 4096):
        for blocks in block_counts(count, 10):
            index = np.asarray(split_data(count, blocks))
            assert len(np.unique(index)) == index.size
            assert count - index.size <= 0.02 * count
            assert 0.7 < index.shape[0] / blocks < 1.4
    assert block_counts(10, 5) == (1,)
    assert block_counts(10_000, 2**27) == (1,)


def test_a_change_of_block_takes_no_step_back():
    """Blocks whose potentials differ by five thousand nats in 20,000 dimensions.

    Much, and no wall.
    """
    dim, walkers = 20_000, 2
    curvature = jnp.asarray([[1.5]] * 16 + [[0.5]] * 16, jnp.float32)
    objective, center = ravel_loss(
        lambda w, batch: 0.5 * jnp.mean(batch[0]) * jnp.sum(w**2), jnp.zeros(dim), jnp.float32
    )
    problem = make_problem(center, hold((curvature,)), 1.0, 0.0, VIConfig(batch_size=8), "nbeta")
    linear_map = LinearMap(
        center, jnp.ones(dim), jnp.zeros((1, dim)).at[0, 0].set(1.0), jnp.zeros((1, 1))
    )
    anchor = make_anchor(objective, problem, center, jnp.zeros(()), jnp.arange(32).reshape(2, 16))
    evaluate = make_potential(objective, problem, linear_map, jnp.zeros(()))
    keys = jax.random.split(jax.random.key(1), walkers)
    x, momentum = jax.random.normal(jax.random.key(2), (2, walkers, dim))
    state = Walker(x, momentum, jnp.zeros_like(x), jnp.zeros(walkers), jnp.zeros(walkers))

    @quick_jit
    def returned(anchor, state, keys):
        return run_steps(
            evaluate,
            linear_map,
            anchor,
            refresh(evaluate, anchor, state, keys, jnp.int32(0)),
            start_tuning(dim, jnp.float32),
            keys,
            jnp.int32(0),
            lambda v, gradient, x, pulled: jnp.stack([v @ gradient]),
            friction_time=jnp.float32(2.0),
            energy_error=jnp.float32(10.0),
            bins=1,
            bin_length=16,
        )[2].returned

    np.testing.assert_array_equal(returned(anchor, state, keys), 0.0)


def test_walkers_far_outside_come_back():
    """A step that meets a wall of more than a thousand nats is taken back."""
    result = fastvi.estimate_llc(
        lambda w, batch: 0.5 * w @ w + 1e8 * jnp.sum(jnp.maximum(jnp.abs(w) - 0.2, 0.0) ** 2),
        jnp.zeros(3),
        jnp.zeros((1000, 1)),
        localization=1.0,
        progress=False,
        method="sample",
    )
    assert np.isfinite(result.llc)
    nbeta = 1000 / np.log(1000)
    grid = np.linspace(-0.2, 0.2, 4001)
    weight = np.exp(-(nbeta + 1) / 2 * grid**2)
    truth = 3 * nbeta / 2 * np.sum(weight * grid**2) / np.sum(weight)
    assert result.llc == pytest.approx(truth, rel=0.06)
