"""One step of the dynamics, with gradients from outside: numpy here, a jitted loss elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvi.sampling.dynamics import (
    MOST_OWED,
    MOST_TAKEN,
    Evaluation,
    State,
    first_half_step,
    kinetic_energy,
    second_half_step,
    take_heat_off,
)
from fastvi.sampling.tuning import HOLD

PRECISION = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]])
MEAN = np.array([1.0, -2.0, 0.5])


def by_numpy(position):
    """Evaluate a Gaussian's potential in numpy, as another framework would."""
    away = np.asarray(position, float) - MEAN
    force = away @ PRECISION
    potential = 0.5 * np.sum(away * force, axis=-1)
    position = jnp.asarray(position)
    return Evaluation(jnp.asarray(potential), jnp.asarray(force), position)


def start(walkers, seed=0):
    rng = np.random.default_rng(seed)
    position = jnp.asarray(rng.normal(size=(walkers, 3)))
    return State(position, jnp.asarray(rng.normal(size=(walkers, 3))), by_numpy(position)), rng


@pytest.mark.usefixtures("x64")
def test_gradients_of_another_framework_sample_the_gaussian():
    """Mean and covariance of the positions are exact at any stable step."""
    walkers, step, friction_time = 2000, 0.6, 2.0
    state, rng = start(walkers)
    first, second = jax.jit(first_half_step), jax.jit(second_half_step)
    draws = []
    for number in range(220):
        half = first(state, step, friction_time, jnp.asarray(rng.normal(size=(walkers, 3))))
        state, info = second(state, half, by_numpy(half.position), step, True)
        assert not info.is_returned.any()
        if number >= 60 and number % 5 == 0:
            draws.append(np.asarray(state.position))
    draws = np.concatenate(draws)
    np.testing.assert_allclose(draws.mean(0), MEAN, atol=0.05)
    np.testing.assert_allclose(np.cov(draws.T), np.linalg.inv(PRECISION), atol=0.08)


@pytest.mark.usefixtures("x64")
def test_a_step_without_friction_is_leapfrog():
    """Velocity Verlet conserves its shadow Hamiltonian: p^2 + k x^2 (1 - h^2 k / 4), over 2."""
    step, stiffness = 0.7, 1.3

    def evaluate(position):
        return Evaluation(0.5 * stiffness * position[:, 0] ** 2, stiffness * position, ())

    position, momentum = jnp.asarray([[1.2]]), jnp.asarray([[-0.4]])
    state, shadow = State(position, momentum, evaluate(position)), []
    for _ in range(20):
        x, p = float(state.position[0, 0]), float(state.momentum[0, 0])
        shadow.append(0.5 * p**2 + 0.5 * stiffness * x**2 * (1 - step**2 * stiffness / 4))
        half = first_half_step(state, step, jnp.inf, jnp.zeros((1, 1)))
        before = state.here.potential + kinetic_energy(state.momentum)
        state, info = second_half_step(state, half, evaluate(half.position), step, True)
        after = state.here.potential + kinetic_energy(state.momentum)
        np.testing.assert_allclose(info.energy_error, after - before, atol=1e-12)
    np.testing.assert_allclose(shadow, shadow[0], rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_friction_and_noise_keep_the_normal_law_of_momenta_and_their_heat_is_no_error():
    state, rng = start(50_000, seed=1)
    flat = state._replace(here=state.here._replace(gradient=jnp.zeros((50_000, 3))))
    noise = jnp.asarray(rng.normal(size=(50_000, 3)))
    half = first_half_step(flat, 0.9, 1.5, noise)
    np.testing.assert_allclose(np.var(half.momentum), 1.0, rtol=0.01)
    covariance = np.mean(half.momentum * flat.momentum)
    assert covariance == pytest.approx(np.exp(-0.9 / 1.5), rel=0.02)
    there = flat.here
    _, info = second_half_step(flat, half, there, 0.9, True)
    np.testing.assert_allclose(info.energy_error, 0.0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_wall_sends_a_walker_back_and_leaves_the_others():
    state, rng = start(4)
    step = 0.3
    half = first_half_step(state, step, 2.0, jnp.asarray(rng.normal(size=(4, 3))))
    there = by_numpy(half.position)
    wall = there._replace(potential=there.potential.at[1].add(5e3).at[2].set(jnp.nan))
    moved, info = second_half_step(state, half, wall, step, True)
    assert info.is_returned.tolist() == [False, True, True, False]
    for index in (1, 2):
        np.testing.assert_array_equal(moved.position[index], state.position[index])
        np.testing.assert_array_equal(moved.momentum[index], -state.momentum[index])
        np.testing.assert_array_equal(moved.here.observed[index], state.here.observed[index])
    np.testing.assert_array_equal(moved.position[0], half.position[0])
    other_data, _ = second_half_step(state, half, wall, step, False)
    np.testing.assert_array_equal(other_data.position[1], half.position[1])


@pytest.mark.usefixtures("x64")
def test_a_step_of_length_zero_only_evaluates():
    state, rng = start(3)
    wrong = state._replace(here=Evaluation(jnp.full(3, 1e9), jnp.ones((3, 3)), state.position))
    zero = 0.0
    half = first_half_step(wrong, zero, 2.0, jnp.asarray(rng.normal(size=(3, 3))))
    found, info = second_half_step(wrong, half, by_numpy(half.position), zero, True)
    jax.tree_util.tree_map(np.testing.assert_array_equal, found, state)
    assert not info.is_returned.any()


@pytest.mark.usefixtures("x64")
def test_friction_takes_off_the_covariance_that_noise_puts_in():
    """Exact in the mean over draws of the noise: in all directions, and between them."""
    draws, step = 400_000, 0.1
    rng = np.random.default_rng(0)
    root = np.array([[2.0, 0.0, 0.0], [1.5, 0.3, 0.0], [-0.5, 0.2, 0.1]])
    momentum, spread = rng.normal(size=(2, draws, 3))
    spread = spread @ root.T
    cooled, owed = take_heat_off(jnp.asarray(momentum), jnp.asarray(spread), jnp.zeros(draws), step)
    found = np.cov(momentum.T) - np.cov(np.asarray(cooled).T)
    np.testing.assert_allclose(found, HOLD * step**2 * root @ root.T, atol=3e-3)
    assert not np.any(np.asarray(owed) < 0)


def test_what_a_step_may_not_take_off_is_owed():
    step, momentum = 1.0, jnp.asarray([[3.0, 4.0]])
    spread = jnp.asarray([[0.0, 1.0]])  # due: HOLD
    cooled, owed = take_heat_off(momentum, spread, jnp.zeros(1), step)
    np.testing.assert_allclose(cooled, [[3.0, 4.0 * np.sqrt(1 - MOST_TAKEN)]], rtol=1e-5)
    np.testing.assert_allclose(owed, HOLD - MOST_TAKEN, rtol=1e-5)
    cooled, owed = take_heat_off(momentum, 1e-3 * spread, owed, step)
    np.testing.assert_allclose(cooled, [[3.0, 4.0 * np.sqrt(1 - MOST_TAKEN)]], rtol=1e-5)
    np.testing.assert_allclose(owed, HOLD - 2 * MOST_TAKEN, rtol=1e-4)
    assert take_heat_off(momentum, 1e3 * spread, owed, step)[1] == MOST_OWED
    for nothing, length in ((0 * spread, step), (spread, 0.0)):
        cooled, kept = take_heat_off(momentum, nothing, owed, length)
        np.testing.assert_array_equal(cooled, momentum)
        np.testing.assert_array_equal(kept, owed)
