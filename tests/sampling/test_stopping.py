"""Errors of runs that end by themselves: on series whose mean is known, and by their parts."""

import math

import numpy as np
import pytest

from fastvi.evaluation.errors import ErrorParts
from fastvi.sampling.averages import (
    DOUBT,
    SURPRISE,
    analyse,
    standard_error,
    stated_error,
    unmixed_errors,
)
from fastvi.sampling.run import CHECK_GROWTH, unmet_by
from fastvi.sampling.settings import SamplerSettings

SETTINGS = SamplerSettings()
ERROR = 0.02


def autoregressive(rng, shape, memory, start=0.0):
    """Draw series of unit variance that begin `start` off their mean, along the last axis."""
    values = rng.normal(size=shape)
    values[..., 0] += start
    for t in range(1, shape[-1]):
        values[..., t] = memory * values[..., t - 1] + math.sqrt(1 - memory**2) * values[..., t]
    return values


def stop(values):
    """Look at a run as the sampler does, and return the first look that says good enough."""
    rounds = checked = 0
    while True:
        rounds += 1
        if rounds < CHECK_GROWTH * checked:
            continue
        checked, bins = rounds, rounds * SETTINGS.bins
        assert bins <= values.shape[1], "the series is too short for this error"
        found = analyse(values[:, :bins], np.zeros((len(values), bins, 0)))
        if not unmet_by(found, ERROR, 1.0, bins, SETTINGS):
            return found


@pytest.mark.parametrize(
    ("memory", "start", "count"),
    [
        (0.8, 3.0, 200),
        *(
            pytest.param(memory, start, 1000, marks=pytest.mark.slow)
            for memory, start in ((0.0, 0.0), (0.8, 0.0), (0.8, 3.0))
        ),
    ],
)
def test_errors_survive_looking_again_and_again(memory, start, count):
    """Runs of eight walkers end by themselves; some 100 independent draws are enough."""
    rng, level = np.random.default_rng(0), 1 / (ERROR * math.sqrt(100))
    runs = [level + autoregressive(rng, (8, 800), memory, start) for _ in range(count)]
    found = [stop(run) for run in runs]
    scores = np.array([(one.llc - level) / one.llc_sem for one in found])
    assert 0.6 < np.mean(np.abs(scores) < 1) < 0.8
    assert np.mean(np.abs(scores) < 2) > 0.93
    assert abs(np.mean(scores)) < 0.15
    assert all(one.llc_sem <= ERROR * one.llc for one in found)


def test_few_walkers_state_a_larger_error():
    values = np.random.default_rng(0).normal(size=(64, 100))
    ratios = [stated_error(values[:n]) / standard_error(values[:n]) for n in (1, 2, 8, 64)]
    np.testing.assert_allclose(ratios, [1, 2.2, 1 + 1.2 / 7, 1 + 1.2 / 63])


def test_columns_whose_mean_is_not_zero_are_evidence_and_hardly_move_llc():
    """Walkers that have not spread: the columns would add 1 to llc, which is 10 without them."""
    moves, relaxations, errors = [], [], []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        column = rng.normal(size=(8, 60, 1))
        llc = 10 + column[..., 0] + 0.1 * rng.normal(size=(8, 60))
        found = analyse(llc, column - 1.0, discard=0)
        moves.append(found.llc - llc.mean())
        relaxations.append(found.parts.relaxation)
        errors.append(standard_error(column[..., 0]))
        # the more certain, the less it counts
        assert 0 < found.llc - llc.mean() < errors[-1]
        assert found.parts.dynamics == 0
    # 0.3 of what is beyond two errors is doubt
    expected = DOUBT * (1 - SURPRISE * np.mean(errors))
    assert np.mean(relaxations) == pytest.approx(expected, rel=0.05)
    # what moves llc is less than the doubt that is added
    assert np.mean(moves) < np.mean(relaxations)


def test_columns_take_off_what_the_dynamics_have_added():
    rng = np.random.default_rng(0)
    column = rng.normal(size=(8, 60, 1))
    llc = 10 + column[..., 0] + 0.1 * rng.normal(size=(8, 60))
    found = analyse(llc + 1.0, column + 1.0, discard=0)
    assert found.llc == pytest.approx(10, abs=0.05)
    assert found.added == pytest.approx(1, abs=0.2)
    assert found.parts.dynamics > 0.1
    assert found.parts.relaxation == 0


def test_a_width_that_still_grows_by_factors_is_seen():
    """Where llc has settled, and |w - w*|^2 nearly, the width along q's directions has not."""
    rng = np.random.default_rng(0)
    llc, radius2 = (10 + rng.normal(size=(8, 100)) for _ in range(2))
    level = autoregressive(rng, (8, 100), 0.5)
    spread, grows = np.exp(level), np.exp(level + np.linspace(0, 5, 100))
    columns = np.zeros((8, 100, 0))
    settled = analyse(llc, columns, radius2, spread)
    growing = analyse(llc, columns, radius2, grows)
    assert settled.rhat_core < 1.1
    assert settled.parts.relaxation == 0
    assert unmet_by(settled, ERROR, 1.0, 100, SETTINGS) == ()
    assert growing.burn_in == 50  # it wants more of the run left out
    # the half that is kept still moves by a standard deviation or two
    assert growing.parts.relaxation > 1.5 * growing.parts.statistical
    assert growing.parts.largest == "relaxation"
    assert growing.llc_sem > 1.8 * settled.llc_sem


def test_what_has_not_mixed_is_a_share_of_its_variance():
    assert unmixed_errors(1.19, 2.4, 1.2) == 0
    assert unmixed_errors(2.0, 0.0, 1.2) == pytest.approx(0.75)
    assert unmixed_errors(2.0, -2.0, 1.2) == pytest.approx(3 * 0.75)
    assert unmixed_errors(1.0, -5.0, 1.2) == pytest.approx(6 * 0.75)
    assert unmixed_errors(math.inf, 0.0, 1.2) == 1


def test_parts_of_an_error_add_in_squares():
    parts = ErrorParts(3.0, relaxation=4.0)
    assert (parts.total, parts.systematic, parts.largest) == (5.0, 4.0, "relaxation")
    more = parts.plus(dynamics=12.0, relaxation=3.0)
    assert more == ErrorParts(3.0, 5.0, 12.0, 0.0)
    assert more.largest == "dynamics"
