"""Langevin dynamics on anchored blocks: exact moments, the heat of noise, unbiased gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import fastvi
from bench.truth.gibbs import linear_network_answer
from fastvi.api.arguments import make_problem
from fastvi.config import VIConfig
from fastvi.families.moments import LinearMap
from fastvi.sampling.gradients import (
    Blocks,
    block_counts,
    block_variances,
    draw_pair,
    estimate_gradient,
    make_anchor,
    split_data,
)
from fastvi.sampling.programs import blank_evaluation, make_evaluate, run_steps
from fastvi.sampling.settings import SamplerSettings
from fastvi.sampling.tuning import HOLD, first_step_size, noise_bias
from fastvi.sampling.walkers import Walkers
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


def one_column(linear_map, position, displacement, gradient):
    return jnp.sum(displacement * gradient, axis=-1, keepdims=True)


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
    is_balanced=True,
):
    """Return means over the later half of the rounds: llc, |v|^2 and energy error; the step size.

    What noise heats is left where it is not balanced.
    """
    reference = objective.loss(problem.posterior.center, problem.data.examples)
    blocks, dim = split_data(problem.num_data, num_blocks), problem.posterior.center.size
    keys = jax.random.split(jax.random.key(1), walkers)
    x, momentum = jax.random.normal(jax.random.key(2), (2, walkers, dim))
    step_size = first_step_size(dim, jnp.float32)
    zero = jnp.zeros(walkers)
    state = Walkers(linear_map, x, momentum, zero, step_size, keys, zero)
    here = blank_evaluation(state, 1, is_noisy=is_balanced and num_blocks > 1)
    anchor = None
    if num_blocks > 1:
        anchor = quick_jit(
            lambda: make_anchor(objective, problem, linear_map.center, reference, blocks)
        )()

    @quick_jit
    def one_round(anchor, state, here, start, first):
        evaluate = make_evaluate(objective, problem, linear_map, anchor, reference, one_column)
        return run_steps(
            evaluate if is_balanced else lambda *at: evaluate(*at)._replace(spread=None),
            state,
            here,
            first,
            start,
            jnp.int32(64),
            num_blocks=blocks.rows.shape[0],
            friction_time=jnp.float32(friction_time),
            energy_error=jnp.float32(energy_error),
            bins=4,
            bin_length=16,
        )

    records = []
    for number in range(rounds):
        start = jnp.int32(0 if number else -1)
        state, here, record = one_round(anchor, state, here, start, jnp.int32(64 * number))
        records.append(jax.device_get(record))
    later = records[rounds // 2 :]
    return (
        np.mean([problem.posterior.learning_coefficient(jnp.asarray(r.llc)).mean() for r in later]),
        np.mean([r.radius2.mean() for r in later]),
        np.mean([r.energy_error.mean() for r in later]),
        float(state.step_size.step),
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
    blocks = split_data(COUNT, 16)
    reference = objective.loss(center, problem.data.examples)
    anchor = make_anchor(objective, problem, jnp.zeros(DIM), reference, blocks)
    scale = 1 / np.sqrt(5.0)
    linear_map = round_map(np.full(DIM, 1 / 5.0))
    points = scale * jax.random.normal(jax.random.key(0), (400, DIM))
    noise = pair_variance(objective, problem, anchor, points, linear_map, blocks)
    cold = dynamics(objective, problem, linear_map, 1, rounds=60, energy_error=0.01)
    hot = dynamics(
        objective, problem, linear_map, 16, rounds=60, energy_error=0.01, is_balanced=False
    )
    bias = 0.5 * 5.0 * (hot[1] - cold[1])
    assert HOLD == 2
    assert noise_bias(noise, hot[3], 2.0) > 0.05
    assert bias == pytest.approx(noise_bias(noise, hot[3], 2.0), rel=0.25)


def test_friction_along_the_noise_takes_the_heat_off():
    """Linear regression on thirty-two blocks, whose llc has a closed form."""
    objective, problem, _, hessian = regression(noise=0.5)
    precision = NBETA * hessian + GAMMA * np.eye(DIM)
    covariance = np.linalg.inv(precision)
    exact = 0.5 * NBETA * np.sum(covariance * hessian)
    linear_map, blocks = round_map(1 / np.diag(precision)), split_data(COUNT, 32)
    anchor = make_anchor(objective, problem, jnp.zeros(DIM), 0.0, blocks)
    points = np.random.default_rng(0).multivariate_normal(np.zeros(DIM), covariance, size=400)
    points = jnp.asarray(points, jnp.float32)
    variance = pair_variance(objective, problem, anchor, points, linear_map, blocks)
    hot, cool = (
        dynamics(
            objective,
            problem,
            linear_map,
            32,
            rounds=60,
            energy_error=2e-4,
            is_balanced=is_balanced,
        )
        for is_balanced in (False, True)
    )
    foretold = noise_bias(variance, hot[3], 2.0)
    assert foretold > 0.1 * exact
    assert hot[0] - exact == pytest.approx(foretold, rel=0.25)
    assert cool[0] - exact == pytest.approx(0, abs=0.25 * foretold)


WIDTH = 4


def test_noise_that_follows_the_walkers_heats_nothing():
    """Two linear layers of rank 1: noise of rank one, in other directions at each walker.

    Less injected noise, by the mean variance of each coordinate, leaves half of the heat here.
    """
    rng, count, nbeta, gamma = np.random.default_rng(0), 2000, 300.0, 5.0
    inputs = np.linalg.qr(rng.normal(size=(count, WIDTH)))[0] * np.sqrt(count)
    turns = [np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] for _ in range(3)]
    first, second = (np.outer(a[0], b[0]) for a, b in zip(turns[1:], turns, strict=False))
    target = second @ first
    outputs = inputs @ target.T
    objective, center = ravel_loss(
        lambda w, batch: 0.5 * jnp.mean(jnp.sum((batch[0] @ (w[1] @ w[0]).T - batch[1]) ** 2, 1)),
        [jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)],
        jnp.float32,
    )
    data = hold((jnp.asarray(inputs, jnp.float32), jnp.asarray(outputs, jnp.float32)))
    problem = make_problem(center, data, nbeta, gamma, VIConfig(batch_size=32), "nbeta")
    dim = center.size
    linear_map = LinearMap(jnp.zeros(dim), jnp.full(dim, 0.1), jnp.eye(dim)[:1], jnp.zeros((1, 1)))
    exact, error = linear_network_answer([first, second], nbeta, gamma)
    hot, balanced = (
        dynamics(
            objective,
            problem,
            linear_map,
            64,
            rounds=60,
            energy_error=5e-3,
            is_balanced=is_balanced,
        )[0]
        for is_balanced in (False, True)
    )
    assert error < 0.01 * exact
    assert hot - exact > 0.05 * exact
    assert balanced == pytest.approx(exact, abs=0.25 * float(hot - exact))


def pair_variance(objective, problem, anchor, points, linear_map, blocks):
    """Return the variance of the mean gradient of two different blocks."""
    count = blocks.rows.shape[0]
    of_block = mean_noise(objective, problem, anchor, points, linear_map, blocks)
    return of_block / 2 * (1 - 2 / count)


def mean_noise(objective, problem, anchor, points, linear_map, blocks):
    """Average the noise of gradients on the blocks over points in model coordinates."""

    @quick_jit
    @jax.vmap
    def noise(point):
        at_point = make_anchor(objective, problem, point, 0.0, blocks).block_gradient
        nbeta = problem.posterior.nbeta
        parts = block_variances(linear_map, nbeta, anchor.block_gradient, at_point)
        return jnp.sum(parts)

    return float(np.mean(noise(points)))


@pytest.mark.parametrize("kept", [(), (3, 7, 50, 51, 52, 120, 200, 239)])
def test_anchored_gradients_are_unbiased_and_belong_to_their_potential(kept):
    """Over all pairs of blocks, whether or not some examples are in every gradient."""
    objective, problem, _, _ = regression(noise=0.5)
    blocks = split_data(COUNT, 8, np.asarray(kept, np.int32))
    assert sorted([*np.asarray(blocks.rows).ravel().tolist(), *kept]) == list(range(COUNT))
    reference = objective.loss(problem.posterior.center, problem.data.examples)
    v, at = jnp.asarray([0.3, -0.2, 0.1, 0.7]), jnp.full(DIM, 0.1)
    anchor = make_anchor(objective, problem, at, reference, blocks)

    def on_pair(v, pair):
        return estimate_gradient(objective, problem, anchor, reference, v, pair)

    pairs = jnp.asarray([(i, j) for i in range(8) for j in range(8) if i != j])
    found = quick_jit(jax.vmap(on_pair, in_axes=(None, 0)))(v, pairs)
    exact = objective.value_and_grad(problem.posterior.center + v, problem.data.examples)
    assert np.mean(found.excess) == pytest.approx(float(exact[0] - reference), rel=1e-5)
    np.testing.assert_allclose(np.mean(found.gradient, axis=0), exact[1], rtol=1e-5, atol=1e-6)
    assert np.std(found.excess) > 1e-3
    slope = quick_jit(jax.grad(lambda v: on_pair(v, pairs[3]).surrogate))(v)
    np.testing.assert_allclose(slope, found.gradient[3], rtol=1e-4, atol=1e-5)
    at_anchor = quick_jit(on_pair)(at, pairs[5]).gradient
    there = objective.grad(problem.posterior.center + at, problem.data.examples)
    np.testing.assert_allclose(at_anchor, there, rtol=1e-5, atol=1e-6)
    # over all pairs, draws of the noise have the covariance of the noise
    noise, spread = np.asarray(found.gradient - exact[1], float), np.asarray(found.spread, float)
    np.testing.assert_allclose(spread.T @ spread, noise.T @ noise, rtol=1e-3, atol=1e-5)


def test_pairs_are_of_two_blocks_each_as_likely():
    keys = jax.random.split(jax.random.key(0), 6000)
    pairs = np.asarray(quick_jit(jax.vmap(lambda key: draw_pair(key, 4, 7)))(keys))
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(pairs.T), 1)
    assert np.all(np.diag(counts) == 0)
    off = counts[~np.eye(4, dtype=bool)]
    assert np.all(np.abs(off - 500) < 5 * np.sqrt(500))
    assert draw_pair(jax.random.key(0), 1, 0).tolist() == [0]


def test_the_anchor_knows_all_data_where_blocks_leave_examples_over():
    objective, problem, _, _ = regression(noise=0.5)
    order = np.random.default_rng(0).permutation(COUNT).astype(np.int32)
    blocks = Blocks(order[:231].reshape(7, 33), order[231:], order[:0])
    reference = objective.loss(problem.posterior.center, problem.data.examples)
    at = jnp.full(DIM, 0.1)
    anchor = make_anchor(objective, problem, at, reference, blocks)
    point = problem.posterior.center + at
    exact = objective.value_and_grad(point, problem.data.examples)
    assert float(anchor.excess) == pytest.approx(float(exact[0] - reference), rel=1e-4)
    np.testing.assert_allclose(anchor.gradient, exact[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heavy", [pytest.param([7], marks=pytest.mark.slow), [11, 5000, 5001]])
def test_examples_that_make_the_noise_are_in_every_gradient(heavy):
    """A regression in which a few examples of 20,000 are a hundred times as long as the others."""
    rng, count = np.random.default_rng(0), 20_000
    X = rng.normal(size=(count, DIM))
    X[heavy] *= 100
    Y = X @ np.ones(DIM) + rng.normal(size=count)
    w = np.linalg.lstsq(X, Y, rcond=None)[0]
    nbeta = count / np.log(count)
    values = nbeta * np.linalg.eigvalsh(X.T @ X / count)
    exact = 0.5 * np.sum(values / (values + GAMMA))
    result = fastvi.estimate_llc(
        lambda w, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2),
        jnp.asarray(w, jnp.float32),
        (X.astype(np.float32), Y.astype(np.float32)),
        localization=GAMMA,
        method="sample",
        sampler={"start": "fit"},
        error=0.05,
        key=0,
        progress=False,
    )
    assert abs(result.llc - exact) < 4 * result.llc_sem
    assert result.llc_sem < 0.06 * exact
    assert result.correction.kept_examples == len(heavy)
    assert result.correction.data_blocks > 1
    # on all data, as many steps as these took would be 30 times as dear
    assert result.work.total_fge < 400
    assert result.ensemble.setup.kept.tolist() == heavy
    draws = fastvi.sample_posterior(result, 20, thin=2, progress=False)
    # of which gradients on all data take as many as draws, and steps little
    assert draws.fge < 1.3 * draws.num_walkers * draws.num_draws + 60
    assert abs(draws.llc_estimate.value - exact) < 4.5 * draws.llc_estimate.sem


def test_noise_of_the_gradients_is_that_of_the_blocks():
    objective, problem, X, _ = regression(noise=0.5)
    blocks = split_data(COUNT, 8)
    anchor = make_anchor(objective, problem, jnp.zeros(DIM), 0.0, blocks)
    points = np.random.default_rng(3).normal(size=(3, DIM)).astype(np.float32)
    linear_map = round_map([0.5, 1.0, 2.0, 4.0])
    found = mean_noise(objective, problem, anchor, jnp.asarray(points), linear_map, blocks)
    hessians = np.stack([X[rows].T @ X[rows] / len(rows) for rows in blocks.rows])
    forces = NBETA * np.einsum("bij,pj->pbi", hessians, points) * np.sqrt([0.5, 1.0, 2.0, 4.0])
    variances = np.var(forces, axis=1, ddof=1).sum(axis=-1)
    assert found == pytest.approx(float(variances.mean()), rel=1e-3)


def test_blocks_have_one_size_and_little_is_left_over():
    settings = SamplerSettings()
    for count in (100, 997, 1797, 4096):
        for blocks in block_counts(count, 10, settings):
            rows, rest, _ = split_data(count, blocks)
            assert sorted([*rows.ravel(), *rest]) == list(range(count))
            assert rest.size <= 0.02 * count
            assert 0.7 < rows.shape[0] / blocks < 1.4
    assert block_counts(10, 5, settings) == (1,)
    assert block_counts(10_000, 2**27, settings) == (1,)
    assert block_counts(10_000, 5, SamplerSettings(max_blocks=8)) == (8, 4, 1)
    assert block_counts(100, 5, SamplerSettings(min_block=25)) == (4, 1)


def test_a_change_of_block_takes_no_step_back():
    """Blocks whose potentials differ by five thousand nats in 20,000 dimensions.

    Much, and no wall.
    """
    dim, walkers = 20_000, 2
    curvature = jnp.asarray([[1.5]] * 16 + [[0.5]] * 16, jnp.float32)  # of two pairs of blocks
    objective, center = ravel_loss(
        lambda w, batch: 0.5 * jnp.mean(batch[0]) * jnp.sum(w**2), jnp.zeros(dim), jnp.float32
    )
    problem = make_problem(center, hold((curvature,)), 1.0, 0.0, VIConfig(batch_size=8), "nbeta")
    linear_map = LinearMap(
        center, jnp.ones(dim), jnp.zeros((1, dim)).at[0, 0].set(1.0), jnp.zeros((1, 1))
    )
    blocks = Blocks(jnp.arange(32).reshape(4, 8), *jnp.zeros((2, 0), jnp.int32))
    anchor = make_anchor(objective, problem, center, jnp.zeros(()), blocks)
    keys = jax.random.split(jax.random.key(1), walkers)
    x, momentum = jax.random.normal(jax.random.key(2), (2, walkers, dim))
    step_size = first_step_size(dim, jnp.float32)
    zero = jnp.zeros(walkers)
    state = Walkers(linear_map, x, momentum, zero, step_size, keys, zero)

    @quick_jit
    def returned(anchor, state):
        return run_steps(
            make_evaluate(objective, problem, linear_map, anchor, jnp.zeros(()), one_column),
            state,
            blank_evaluation(state, 1, is_noisy=True),
            jnp.int32(0),
            jnp.int32(-1),
            jnp.int32(16),
            num_blocks=4,
            friction_time=jnp.float32(2.0),
            energy_error=jnp.float32(10.0),
            bins=1,
            bin_length=16,
        )[2].returned

    np.testing.assert_array_equal(returned(anchor, state), 0.0)


def test_walkers_far_outside_come_back():
    """A step that meets a wall of more than a thousand nats is taken back."""
    result = fastvi.estimate_llc(
        lambda w, batch: 0.5 * w @ w + 1e8 * jnp.sum(jnp.maximum(jnp.abs(w) - 0.2, 0.0) ** 2),
        jnp.zeros(3),
        jnp.zeros((1000, 1)),
        localization=1.0,
        progress=False,
        method="sample",
        error=0.04,
    )
    nbeta = 1000 / np.log(1000)
    grid = np.linspace(-0.2, 0.2, 4001)
    weight = np.exp(-(nbeta + 1) / 2 * grid**2)
    truth = 3 * nbeta / 2 * np.sum(weight * grid**2) / np.sum(weight)
    assert abs(result.llc - truth) < 4 * result.llc_sem
    assert result.llc_sem < 0.04 * truth
