"""Averages over draws and chains, and their errors, against values worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from fastvi.evaluation.errors import chain_error, pair_mean, virial


def test_a_draw_is_averaged_with_its_mirror_image():
    draws = np.array([[1.0, 2.0, 3.0, 40.0, 50.0, 60.0]])
    assert pair_mean(draws, axis=1).tolist() == [[20.5, 26.0, 31.5]]
    assert pair_mean(jnp.asarray(draws[0])).tolist() == [20.5, 26.0, 31.5]
    assert pair_mean(draws.T).tolist() == [[20.5], [26.0], [31.5]]


def test_draws_without_columns_stay_without():
    assert pair_mean(jnp.zeros((4, 0))).shape == (2, 0)


def test_odd_parts_of_mirrored_draws_cancel():
    half = np.random.default_rng(0).normal(size=(5, 3))
    assert np.all(pair_mean(np.concatenate([half, -half])) == 0)


def test_one_chain_has_the_error_within_it():
    assert chain_error(np.array([7.0]), np.array([0.3])) == pytest.approx(0.3)


def test_chains_that_agree_have_the_error_within_them():
    # sqrt((0.3^2 + 0.4^2) / 2 / 2) = 0.25, and the means differ by less
    assert chain_error(np.array([1.0, 1.1]), np.array([0.3, 0.4])) == pytest.approx(0.25)


def test_chains_that_differ_have_the_error_between_them():
    # the standard deviation of (0, 2, 4) is 2
    assert chain_error(np.array([0.0, 2.0, 4.0]), 0.1) == pytest.approx(2 / np.sqrt(3))


def test_an_unknown_error_stays_unknown():
    assert np.isnan(chain_error(np.array([0.0, np.nan]), 0.1))
    assert np.isnan(chain_error(np.array([0.0, 1.0]), np.nan))


def test_the_virial_of_a_quadratic_is_the_ratio_of_variances():
    # log p = -v.(H v) / 2, so -v . grad log p / dim = v.(H v) / dim
    spectrum = jnp.array([1.0, 4.0])
    draws = jnp.array([[1.0, 0.5], [-1.0, 0.5], [1.0, -0.5], [-1.0, -0.5]])
    assert float(virial(draws, -draws * spectrum)) == pytest.approx(1.0)
    assert float(virial(2 * draws, -2 * draws * spectrum)) == pytest.approx(4.0)
