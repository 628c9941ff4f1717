"""The plan of a run: each function against what it should say of known numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

from fastvi.sampling.costs import anchor_cost, run_cost, step_cost
from fastvi.sampling.run import has_arrived
from fastvi.sampling.settings import SamplerSettings
from fastvi.sampling.tuning import (
    HOLD,
    MOST_BALANCED,
    Fidelity,
    adapt_step_size,
    effective_dimensions,
    first_step_size,
    is_runaway,
    max_blocks_within,
    noise_bias,
    plan_energy_error,
    plan_friction_time,
    plan_heat,
    plan_walkers,
    refine,
    step_size_after,
)

SETTINGS = SamplerSettings()


def test_friction_balances_so_much_noise():
    """What friction takes off in a step is a share of the energy along the noise."""
    step, time = 0.2, 5.0
    most = MOST_BALANCED / (HOLD * step**2)
    for variance in (0.0, 0.5 * most, most):
        heat = plan_heat(variance, step, time)
        assert heat == pytest.approx((noise_bias(variance, step, time), 0.0))
    heat = plan_heat(4 * most, step, time)
    assert heat.balanced == pytest.approx(noise_bias(most, step, time))
    assert heat.left == pytest.approx(3 * heat.balanced)


def test_noise_bias_is_half_of_step_variance_and_friction_time():
    """The law h V t_f / 2, which the dynamics meet in test_langevin."""
    assert noise_bias(3.0, 0.2, 5.0) == pytest.approx(0.2 * 3.0 * 5.0 / 2)


def test_step_size_settles_where_an_error_of_the_sixth_power_meets_the_target():
    coefficient, target = 7.0, 1e-3
    exact = (target / coefficient) ** (1 / 6)
    adapt = quick_jit(adapt_step_size)
    for begin in (first_step_size(10_000, jnp.float32), first_step_size(1, jnp.float32)):
        step_size = begin
        for _ in range(60):
            before = float(step_size.step)
            error = coefficient * step_size.step**6
            step_size = adapt(step_size, error, jnp.float32(target))
            assert 0.8 * before * 0.999 <= float(step_size.step) <= 1.1 * before * 1.001
        assert float(step_size.step) == pytest.approx(exact, rel=0.01)


def test_an_outlier_of_the_energy_error_hardly_moves_the_step_size():
    step_size = first_step_size(16, jnp.float32)
    for _ in range(100):
        step_size = adapt_step_size(step_size, jnp.float32(1e-3), jnp.float32(1e-3))
    shaken = adapt_step_size(step_size, jnp.float32(1e12), jnp.float32(1e-3))
    assert float(shaken.step) > 0.8 * float(step_size.step)


def test_step_size_follows_a_change_of_the_energy_error():
    step_size = first_step_size(16, jnp.float32)
    shorter = step_size_after(1 / 64, step_size)
    assert float(shorter.step) == pytest.approx(float(step_size.step) / 2, rel=1e-6)
    assert int(shorter.count) == 0


def test_steps_are_taken_back_beyond_a_thousand_nats_and_one_for_each_dimension():
    infinite = jnp.full(4, jnp.inf)
    errors = jnp.asarray([1009.0, -1011.0, jnp.nan, jnp.inf])
    assert is_runaway(errors, infinite, 10).tolist() == [False, True, True, True]
    # on other data a large error counts where the kick is large too
    kicks = jnp.asarray([2000.0, 5.0, 5.0, 5.0])
    assert is_runaway(jnp.full(4, 1e5), kicks, 10).tolist() == [True, False, False, False]


def test_friction_time_crosses_the_posterior_and_stays_cool():
    assert plan_friction_time(1.0, 9.0, 0.1, SETTINGS) == 2.0
    assert plan_friction_time(3.0, 9.0, 0.1, SETTINGS) == pytest.approx(6.0)
    assert plan_friction_time(30.0, 9.0, 0.1, SETTINGS) == pytest.approx(16.0)
    # noise that adds 0.5 for each unit of time allows 9 / 0.5 / 4 of it
    assert plan_friction_time(30.0, 9.0, 2.0, SETTINGS) == pytest.approx(4.5)
    assert plan_friction_time(30.0, 9.0, 90.0, SETTINGS) == pytest.approx(2.0)
    assert plan_friction_time(30.0, 0.0, 0.0, SETTINGS) == pytest.approx(2.0)


def test_effective_dimensions_are_twice_the_llc_of_a_quadratic():
    assert effective_dimensions(3.5, 10) == 7.0
    assert effective_dimensions(-1.0, 10) == pytest.approx(1.0)
    assert effective_dimensions(50.0, 10) == 10.0


def test_blocks_are_as_many_as_the_bias_allows():
    counts = (64, 32, 16, 8, 4, 1)
    assert max_blocks_within(1.0, 0.01, counts) == 64
    assert max_blocks_within(1.0, 1 / 30, counts) == 32
    assert max_blocks_within(1.0, 1 / 29.9, counts) == 16
    assert max_blocks_within(1.0, 2.0, counts) == 1
    assert max_blocks_within(np.nan, 0.01, counts) == 1


def test_a_refinement_halves_the_bias_of_a_step():
    finer = refine(Fidelity(16, 8e-4), 32)
    assert finer == Fidelity(16, pytest.approx(1e-4))
    assert (finer.energy_error / 8e-4) ** (1 / 3) == pytest.approx(0.5)
    assert refine(Fidelity(16, 8e-4), 4).num_blocks == 4


def test_the_bias_of_steps_follows_the_error_that_is_asked_for():
    assert plan_energy_error(0.02, SETTINGS) == pytest.approx(2e-4)
    assert plan_energy_error(0.01, SETTINGS) == pytest.approx(2e-4 / 8)
    assert plan_energy_error(0.2, SETTINGS) == 5e-4


def test_the_budget_pays_for_whole_groups_of_walkers():
    assert plan_walkers(100.0, 20.0, 5.0, 64, 8) == 16
    assert plan_walkers(100.0, 20.0, 5.0, 8, 8) == 8
    assert plan_walkers(100.0, 20.0, 11.0, 64, 8) == 0
    assert plan_walkers(10.0, 20.0, 1.0, 64, 8) == 0
    assert plan_walkers(20.0 + 8 * 0.1, 20.0, 0.1, 64, 8) == 8


def test_work_is_counted_in_sample_gradients():
    """1,024 examples in 64 blocks of 16; 8 walkers."""
    assert step_cost(1024, 64, 8) == 8 * 2 * 16
    assert step_cost(1024, 1, 8) == 8 * 1024
    assert (anchor_cost(1024, 64), anchor_cost(1024, 1)) == (1024, 0)
    assert run_cost(1024, 64, 8, 48) == 1024 + 49 * 8 * 2 * 16


def test_burn_in_ends_where_its_last_thirds_agree_or_a_mean_is_lost():
    assert not has_arrived([], 0.1)
    assert not has_arrived([5.2, 5.0], 0.1)
    assert not has_arrived([9.0, 7.0, 5.0], 0.1)
    # where it comes from does not matter
    assert has_arrived([900.0, 5.2, 5.0], 0.1)
    assert has_arrived([9.0, np.nan], 0.1)
