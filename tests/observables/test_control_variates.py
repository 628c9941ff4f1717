"""Columns of mean zero under the posterior, and the weights that take them off."""

import numpy as np
import pytest

from fastvi.observables.control_variates import (
    Columns,
    adjusted_weights,
    choose_weights,
    plain_weights,
    stein_columns,
)

WALKERS, DRAWS, DIM = 16, 100, 3
RNG = np.random.default_rng(0)
PRECISION = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 4.0]])
COVARIANCE = np.linalg.inv(PRECISION)


def gaussian_draws(rng, count=WALKERS * DRAWS):
    """Return draws, and the gradient of -log p at each."""
    draws = rng.multivariate_normal(np.zeros(DIM), COVARIANCE, count)
    return draws, draws @ PRECISION


def test_columns_are_the_laplacian_less_the_slope():
    position, slope = RNG.normal(size=(5, 2)), RNG.normal(size=(5, 2))
    (x, y), (a, b) = position.T, slope.T
    expected = {
        "x": -a,
        "y": -b,
        "xx": 2 - 2 * x * a,
        "xy": -y * a - x * b,
        "yy": 2 - 2 * y * b,
        "xxx": 6 * x - 3 * x**2 * a,
        "xxy": 2 * y - 2 * x * y * a - x**2 * b,
        "xyy": 2 * x - y**2 * a - 2 * x * y * b,
        "yyy": 6 * y - 3 * y**2 * b,
    }
    found = stein_columns(position, slope, 3)
    np.testing.assert_allclose(found, np.stack(list(expected.values()), axis=1), rtol=1e-12)
    assert found.shape[1] == Columns(2, 3).number


def test_columns_have_mean_zero_where_the_posterior_is_no_gaussian():
    # by quadrature: p(x) ~ exp(-x^4 - x^2 / 5 + x / 3), which is what the sum over the grid is of
    grid = np.linspace(-4, 4, 4001)
    density = np.exp(-(grid**4) - grid**2 / 5 + grid / 3)
    slope = 4 * grid**3 + 2 * grid / 5 - 1 / 3
    means = density @ stein_columns(grid[:, None], slope[:, None], 4) / density.sum()
    np.testing.assert_allclose(means, 0, atol=1e-10)


def test_plain_weights_average_over_blocks():
    values = RNG.normal(size=(3, 11, 2))
    # the first three draws fit no block
    expected = values[:, 3:].reshape(12, 2, 2).mean(axis=1)
    np.testing.assert_allclose(plain_weights(3, 11, 4) @ values.reshape(33, 2), expected)


def test_products_of_quadratics_of_a_gaussian_lose_nearly_all_of_their_variance():
    plain = plain_weights(WALKERS, DRAWS, 2)
    # Cov((a.w)^2, (b.w)^2) = 2 (a' Sigma b)^2
    sides = RNG.normal(size=(4, DIM))
    exact = 2 * (sides @ COVARIANCE @ sides.T) ** 2
    means = np.diag(sides @ COVARIANCE @ sides.T)
    before, after, errors = [], [], []
    for seed in range(10):
        draws, slope = gaussian_draws(np.random.default_rng(seed))
        squares = (draws @ sides.T) ** 2
        weights, chosen = choose_weights(draws, slope, squares, plain, WALKERS)
        products = np.einsum("ti,tj->tij", squares - means, squares - means).reshape(-1, 16)
        by_block = weights @ products
        assert chosen is not None
        assert chosen.degree == 4
        before.append((plain @ products).mean(axis=0))
        after.append(by_block.mean(axis=0))
        errors.append(by_block.std(axis=0, ddof=1) / np.sqrt(len(by_block)))
    before, after, errors = map(np.array, (before, after, errors))
    assert np.median(before.var(axis=0) / after.var(axis=0)) > 15
    z = (after - exact.ravel()) / errors
    assert np.all(np.abs(z.mean(axis=0)) * np.sqrt(len(z)) < 4.5)
    assert 0.75 < np.sqrt(np.mean(z**2)) < 1.3


def test_weights_of_each_block_sum_to_one_and_fit_on_other_walkers():
    plain = plain_weights(WALKERS, DRAWS, 2)
    draws, slope = gaussian_draws(RNG)
    weights = adjusted_weights(plain, stein_columns(draws, slope, 2), WALKERS)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    # blocks of the first fold, of four walkers, have no weight on each other's draws
    own = weights[:8, : 4 * DRAWS]
    np.testing.assert_array_equal(own, plain[:8, : 4 * DRAWS])
    assert np.any(weights[:8, 4 * DRAWS :])


@pytest.mark.parametrize("dim", [3, 60])
def test_columns_that_explain_nothing_are_left_out(dim):
    rng = np.random.default_rng(3)
    plain = plain_weights(WALKERS, DRAWS, 2)
    draws = rng.normal(size=(WALKERS * DRAWS, dim))
    noise = rng.normal(size=(WALKERS * DRAWS, 5))
    weights, chosen = choose_weights(draws, draws, noise, plain, WALKERS)
    assert chosen is None
    assert weights is plain


def test_in_many_dimensions_the_directions_are_those_that_traces_see():
    rng = np.random.default_rng(4)
    plain = plain_weights(WALKERS, DRAWS, 2)
    draws = rng.normal(size=(WALKERS * DRAWS, 200))
    side = rng.normal(size=(200, 1)) / np.sqrt(200)
    traces = draws @ side
    weights, chosen = choose_weights(draws, draws, traces, plain, WALKERS)
    assert chosen is not None
    assert chosen.directions == 1
    squares = traces**2
    assert np.var(weights @ squares) < 0.2 * np.var(plain @ squares)


def test_one_walker_has_no_control_variates():
    draws, slope = gaussian_draws(np.random.default_rng(5), DRAWS)
    plain = plain_weights(1, DRAWS, 4)
    weights, chosen = choose_weights(draws, slope, draws**2, plain, 1)
    assert chosen is None
    assert weights is plain
