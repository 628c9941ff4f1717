import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64, quick_jit

from fastvi.geometry.curvature import BLOCK, block_krylov, dense_spectrum
from fastvi.geometry.start import StartSettings, make_start, newton_step
from fastvi.geometry.whitening import (
    DIAGONAL_PROBES,
    MOMENT_GRADIENTS,
    RELATIVE_FLOOR,
    normalized_scale,
    whitening_scale,
)
from fastvi.target.data import hold
from fastvi.target.hessian import hvp_operator
from fastvi.target.objective import make_flat_objective
from fastvi.target.posterior import LocalPosterior

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
NO_DATA = hold(jnp.zeros(1))


def symmetric(values, seed=0):
    """A matrix with these eigenvalues, and its eigenvectors as rows."""
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return jnp.asarray(rotation.T @ (np.asarray(values)[:, None] * rotation)), rotation


def posterior_at(center, nbeta=30.0, gamma=2.0):
    return LocalPosterior(jnp.asarray(center), jnp.asarray(nbeta), jnp.asarray(gamma))


def unused(argument):
    raise AssertionError


def quadratic(hessian, minimum):
    return make_flat_objective(lambda w, b: 0.5 * (w - minimum) @ hessian @ (w - minimum))


# The spectrum.


def never(values, size, images):
    return jnp.asarray(False)


def krylov(matrix, max_size, exhausted=never):
    def spectrum(matrix):
        probes = jnp.arange(BLOCK * len(matrix), dtype=jnp.float64).reshape(BLOCK, -1)
        found, images = block_krylov(
            lambda block: block @ matrix, jax.random.key(1), probes, max_size, exhausted
        )
        return found, images - probes @ matrix

    found, difference = quick_jit(spectrum)(matrix)
    np.testing.assert_allclose(difference, 0.0, atol=1e-9)  # the probes' images are theirs
    return found


def test_dense_spectrum_is_eigh():
    matrix, _ = symmetric(RNG.normal(size=20))
    spectrum = quick_jit(
        lambda matrix: dense_spectrum(lambda block: block @ matrix, 20, jnp.float64)
    )(matrix)
    np.testing.assert_allclose(spectrum.values, np.linalg.eigvalsh(matrix)[::-1], atol=1e-12)
    np.testing.assert_allclose(spectrum.vectors @ spectrum.vectors.T, np.eye(20), atol=1e-12)
    np.testing.assert_allclose(
        spectrum.vectors @ matrix, spectrum.values[:, None] * spectrum.vectors, atol=1e-12
    )
    assert spectrum.size == 20


def test_krylov_finds_the_leading_pairs():
    leading = [100.0, 90.0, 90.0, 70.0, 50.0, 30.0, 30.0, 30.0, 20.0, 15.0]
    matrix, vectors = symmetric([*leading, *RNG.uniform(-1, 1, size=90)])
    spectrum = krylov(matrix, 6 * BLOCK)
    assert spectrum.size == 6 * BLOCK
    np.testing.assert_allclose(spectrum.values[:10], leading, rtol=1e-9)
    np.testing.assert_allclose(spectrum.vectors @ spectrum.vectors.T, np.eye(6 * BLOCK), atol=1e-11)
    found = spectrum.vectors[:10]
    np.testing.assert_allclose(found @ matrix, spectrum.values[:10, None] * found, atol=1e-3)
    np.testing.assert_allclose(found.T @ found, vectors[:10].T @ vectors[:10], atol=1e-4)
    assert np.all(np.diff(spectrum.values) <= 0)
    # Ritz values interlace: they cannot lie above the true ones
    assert np.all(spectrum.values <= np.linalg.eigvalsh(matrix)[::-1][: 6 * BLOCK] + 1e-9)


@pytest.mark.parametrize("shift", [0.0, 1.0, 1e-3])
def test_krylov_survives_exhausted_directions(shift):
    """A low rank on a constant.

    After two blocks the images hold nothing new, and no ghost may appear.
    """
    leading = [1e6, 1e3, 10.0]
    matrix, vectors = symmetric([*leading, *np.zeros(77)])
    spectrum = krylov(matrix + shift * jnp.eye(80), 5 * BLOCK)
    np.testing.assert_allclose(spectrum.values[:3], np.add(leading, shift), rtol=1e-8)
    np.testing.assert_allclose(spectrum.values[3:], shift, atol=1e-8)
    np.testing.assert_allclose(spectrum.vectors @ spectrum.vectors.T, np.eye(5 * BLOCK), atol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(spectrum.vectors[:3] * vectors[:3], -1)), 1, rtol=1e-8)


def test_krylov_survives_coordinates_of_exact_zeros():
    diagonal = np.zeros(40)
    diagonal[:5] = [5.0, 4.0, 3.0, 2.0, 1.0]
    spectrum = krylov(jnp.diag(diagonal), 4 * BLOCK)
    np.testing.assert_allclose(spectrum.values, diagonal[: 4 * BLOCK], atol=1e-10)
    np.testing.assert_allclose(spectrum.vectors @ spectrum.vectors.T, np.eye(4 * BLOCK), atol=1e-9)


def test_krylov_stops_when_told():
    matrix, _ = symmetric([*np.linspace(100, 50, 4), *np.full(76, -3.0)])

    def exhausted(values, size, images):
        return jnp.sum(values > 10) <= size - 2 * BLOCK

    seen = krylov(matrix, 5 * BLOCK, exhausted)
    assert seen.size == 3 * BLOCK
    np.testing.assert_allclose(seen.values[:4], np.linspace(100, 50, 4), rtol=1e-9)
    # negative Ritz values are values, not padding
    np.testing.assert_allclose(seen.values[4 : 3 * BLOCK], -3.0, rtol=1e-9)
    assert np.all(np.isneginf(seen.values[3 * BLOCK :]))
    assert np.all(seen.vectors[3 * BLOCK :] == 0)


# Whitening.


TABLE = RNG.normal(size=(40, 6)) * np.exp(RNG.normal(size=6)) + np.array([0, 3, -1, 0, 0.2, 8])
DECAY = 0.97


def linear_whitening(mode):
    """A loss whose minibatch gradient is the batch's mean row."""
    objective = make_flat_objective(lambda w, batch: jnp.mean(batch @ w))
    key = jax.random.key(3)

    def next_batch(key):
        return jnp.asarray(TABLE)[jax.random.randint(key, (4,), 0, 40)]

    @quick_jit
    def scaled(key):
        posterior, next_data = posterior_at(np.zeros(6)), lambda key: hold(next_batch(key), 3)
        return whitening_scale(mode, key, objective, posterior, next_data, unused, DECAY)

    scale = scaled(key)
    rows = np.asarray(
        quick_jit(jax.vmap(next_batch))(jax.random.split(key, MOMENT_GRADIENTS))
    ).mean(1)
    return np.asarray(scale), rows


@pytest.mark.parametrize("mode", ["rmsprop", "adam"])
def test_moment_whitening_is_the_plain_loop(mode):
    scale, rows = linear_whitening(mode)
    weights = DECAY ** np.arange(len(rows) - 1, -1, -1.0)
    weights /= weights.sum()
    diagonal = weights @ np.square(rows)
    if mode == "adam":
        diagonal = diagonal - (weights @ rows) ** 2
    diagonal = np.sqrt(diagonal)
    expected = diagonal**-0.5 / np.exp(np.mean(np.log(diagonal**-0.5)))
    np.testing.assert_allclose(scale, expected, rtol=1e-9)
    np.testing.assert_allclose(np.mean(np.log(scale)), 0, atol=1e-12)


def test_normalized_scale_keeps_dead_parameters_finite():
    scale = np.asarray(normalized_scale(jnp.asarray([4.0, 0.0, 1.0])))
    np.testing.assert_allclose(scale[2] / scale[0], 2.0, rtol=1e-12)
    np.testing.assert_allclose(scale[1] / scale[2], (RELATIVE_FLOOR * 5 / 3) ** -0.5, rtol=1e-12)
    np.testing.assert_allclose(np.prod(scale), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(normalized_scale(jnp.zeros(3)), 1.0)


def whiten(mode, diagonal, nbeta=30.0, gamma=2.0):
    objective = make_flat_objective(lambda w, b: 0.5 * jnp.sum(jnp.asarray(diagonal) * w**2))

    @quick_jit
    def scale(center):
        hvp, posterior = hvp_operator(objective, center, None), posterior_at(center, nbeta, gamma)
        return whitening_scale(mode, jax.random.key(0), objective, posterior, unused, hvp, DECAY)

    return scale(np.linspace(0.0, 1.0, len(diagonal)))


def test_hessian_whitening_is_exact_on_a_diagonal():
    diagonal = np.array([1.0, 0.0, 0.3, -0.2, 25.0])
    np.testing.assert_allclose(
        whiten("hvp_diag", diagonal), 1 / np.sqrt(30 * np.abs(diagonal) + 2), rtol=1e-12
    )
    assert DIAGONAL_PROBES > 0
    floored = whiten("hvp_diag", np.array([1.0, 0.0]), gamma=0.0)
    np.testing.assert_allclose(floored, [30**-0.5, (RELATIVE_FLOOR * 15) ** -0.5], rtol=1e-12)


def test_no_whitening_is_ones():
    np.testing.assert_array_equal(whiten("none", np.array([1.0, 5.0])), 1.0)


# The start.


def start_covariance(start):
    """Covariance in model coordinates of the q that begins with log_scale zero and no factors."""
    core = np.asarray(start.core)
    return start.scale[:, None] * np.linalg.inv(np.eye(core.shape[1]) + core.T @ core) * start.scale


def start_on(hessian, center, minimum, **options):
    @quick_jit
    def start(hessian, center, minimum):
        arguments = quadratic(hessian, minimum), posterior_at(center), NO_DATA, lambda key: None
        return make_start(*arguments, StartSettings(**options), jax.random.key(5))

    return start(hessian, center, minimum), 30.0 * np.asarray(hessian) + 2.0 * np.eye(len(center))


# gamma mean(scale^2) is no lower bound of S^{-1} (nbeta H + gamma) S^{-1} where the scales differ


@pytest.mark.parametrize(
    ("mode", "rank"),
    [("none", 11), ("none", 12), ("none", None), ("hvp_diag", 11)],
)
def test_start_is_exact_with_all_directions(mode, rank):
    hessian, _ = symmetric(np.geomspace(1e-2, 1e3, 12))
    center = RNG.normal(size=12)
    start, precision = start_on(hessian, center, center, whitening=mode, rank=rank)
    covariance = np.linalg.inv(precision)
    assert start.rank == 11
    np.testing.assert_allclose(
        start_covariance(start), covariance, rtol=1e-7, atol=1e-9 * np.max(covariance)
    )
    assert start.num_values == 12


@pytest.fixture(scope="module")
def low_rank_start():
    with enable_x64(True):
        hessian, _ = symmetric([50.0, 20.0, 3.0, *np.full(87, 0.5)])
        return start_on(hessian, np.zeros(90), np.zeros(90), rank=None)


def test_start_beyond_the_dense_dimension(low_rank_start):
    start, precision = low_rank_start
    covariance = np.linalg.inv(precision)
    assert start.rank == 3
    np.testing.assert_allclose(start.spectrum[:3], [1502.0, 602.0, 92.0], rtol=1e-8)
    # eight probes on a complement of 58: |z|^2 is off by a per cent
    np.testing.assert_allclose(start.rest, 17.0, rtol=0.03)
    np.testing.assert_allclose(start_covariance(start), covariance, atol=0.03 * np.max(covariance))


def test_start_is_exact_on_a_low_rank(low_rank_start):
    start, precision = low_rank_start
    np.testing.assert_allclose(start.rest, 17.0, rtol=1e-8)
    np.testing.assert_allclose(start_covariance(start), np.linalg.inv(precision), rtol=0, atol=1e-9)
    np.testing.assert_allclose(start.trace, np.trace(precision), rtol=1e-8)


def test_start_without_a_core_has_the_mean_precision():
    diagonal = np.array([1.0, 2.0, 5.0, 0.0, 12.0])
    start, precision = start_on(jnp.diag(diagonal), np.zeros(5), np.zeros(5), rank=0)
    assert start.core.shape == (0, 5)
    np.testing.assert_allclose(start.scale, 1 / np.sqrt(np.trace(precision) / 5), rtol=1e-10)


def test_a_cut_start_keeps_the_steepest_directions():
    hessian, vectors = symmetric([100.0, 50.0, 4.0, 3.0, 2.0, 1.0])
    start, precision = start_on(hessian, np.zeros(6), np.zeros(6), rank=2)
    rest = np.mean(30 * np.array([4.0, 3.0, 2.0, 1.0]) + 2)
    expected = vectors.T @ np.diag(1 / np.array([3002.0, 1502.0, rest, rest, rest, rest])) @ vectors
    np.testing.assert_allclose(start_covariance(start), expected, atol=1e-12)
    assert (start.rank, start.wanted_rank) == (2, 5)
    np.testing.assert_allclose(start.explained, (3002 + 1502) / np.trace(precision), rtol=1e-10)


@pytest.mark.parametrize("mode", ["none", "hvp_diag"])
def test_newton_decrement_is_the_gain_of_a_newton_step(mode):
    hessian, _ = symmetric(np.geomspace(0.1, 10, 9), seed=2)
    center, minimum = RNG.normal(size=(2, 9))
    start, precision = start_on(hessian, center, minimum, whitening=mode)
    slope = 30.0 * np.asarray(hessian) @ (center - minimum)
    step = jnp.asarray(-np.linalg.solve(precision, slope))
    objective, posterior = quadratic(hessian, minimum), posterior_at(center)
    gain = posterior.log_density(step, objective.loss(center + step, None)) - posterior.log_density(
        jnp.zeros(9), objective.loss(center, None)
    )
    found = newton_step(start, posterior, jnp.asarray(slope / 30.0))
    np.testing.assert_allclose(found.gain, gain, rtol=1e-8)
    np.testing.assert_allclose(found.displacement, step, rtol=1e-8)


def test_the_least_curvature_comes_with_its_direction():
    """Below the core's rows too: of 90 directions one curves down."""
    hessian, vectors = symmetric([5.0, 1.0, *np.zeros(87), -0.2])
    start, precision = start_on(hessian, np.zeros(90), np.zeros(90), rank=2)
    np.testing.assert_allclose(start.lowest, -0.2 * 30 + 2, rtol=1e-6)
    direction = np.asarray(start.lowest_direction)
    np.testing.assert_allclose(
        direction @ precision @ direction, start.lowest * (direction @ direction), rtol=1e-6
    )
    np.testing.assert_allclose(
        abs(direction @ vectors[:, -1]) + abs(direction @ vectors[-1]), 1.0, atol=0.5
    )


def test_a_given_whitener_is_used():
    hessian, _ = symmetric([9.0, 4.0, 1.0])
    posterior, scale = posterior_at(np.zeros(3)), jnp.asarray([1.0, 2.0, 4.0])
    objective = quadratic(hessian, np.zeros(3))

    @quick_jit
    def start_of(scale):
        key, settings = jax.random.key(0), StartSettings(rank=2)
        return make_start(objective, posterior, NO_DATA, lambda key: None, settings, key, scale)

    start = start_of(scale)
    np.testing.assert_allclose(start.scale / start.scale[0], scale, rtol=1e-12)
    np.testing.assert_allclose(
        start_covariance(start), np.linalg.inv(30 * hessian + 2 * np.eye(3)), rtol=1e-8
    )
