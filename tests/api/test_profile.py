"""Profiles over temperature and localization: closed forms, quadrature, dense linear algebra."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from bench.truth.quadrature import even_loss_answer
from fastvi.families.moments import LinearMap
from fastvi.results.llc_profile import LLCProfile, log_slopes
from fastvi.results.parts import said_by_walkers
from fastvi.sampling.averages import Analysis
from fastvi.sampling.run import Check
from fastvi.sampling.tempering import temper_map
from fastvi.target.posterior import LocalPosterior

COUNT, DIM, GAMMA = 100, 4, 2.0
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(COUNT, DIM)) * np.linspace(0.3, 2.0, DIM)
OUTPUTS = INPUTS @ np.ones(DIM) + 0.5 * RNG.normal(size=COUNT)
CENTER = np.linalg.lstsq(INPUTS, OUTPUTS, rcond=None)[0]
CURVATURES = np.linalg.eigvalsh(INPUTS.T @ INPUTS / COUNT)
DATA = INPUTS.astype(np.float32), OUTPUTS.astype(np.float32)


def loss_fn(w, batch):
    return 0.5 * (batch[0] @ w - batch[1]) ** 2


@pytest.fixture(scope="module")
def result():
    return fastvi.estimate_llc(
        loss_fn,
        jnp.asarray(CENTER, jnp.float32),
        DATA,
        localization=GAMMA,
        method="sample",
        error=0.04,
        progress=False,
    )


@pytest.fixture(scope="module")
def found(result):
    grid = [result.nbeta * factor for factor in (4.0, 0.25, 1.0)], [GAMMA, 16 * GAMMA]
    return fastvi.profile(result, *grid, progress=False)


def on_grid(function, profile):
    return np.array([[function(b, g) for g in profile.localizations] for b in profile.nbetas])


def test_cells_are_those_of_the_quadratic_loss(found):
    exact = on_grid(lambda b, g: 0.5 * np.sum(b * CURVATURES / (b * CURVATURES + g)), found)
    assert np.all(np.abs(found.llc - exact) < 4.5 * found.llc_sem)
    assert np.all(found.llc_sem < 0.06 * exact)
    radius = on_grid(lambda b, g: np.sqrt(np.sum(1 / (b * CURVATURES + g))), found)
    assert np.all(np.abs(found.radius - radius) < 4.5 * found.radius_sem + 0.01 * radius)
    np.testing.assert_allclose(found.rise, found.llc / found.nbetas[:, None])
    # of a quadratic loss, E[v . grad f] is twice the llc
    np.testing.assert_allclose(found.held, 2 * exact / DIM, atol=0.15)
    assert np.all(np.diff(found.nbetas) > 0)


def test_cell_of_the_estimate_is_taken_over(result, found):
    assert found.llc[1, 0] == result.llc
    assert found.fge[1, 0] == 0
    assert np.all(np.delete(found.fge.ravel(), 2) > 0)
    assert found.total_fge == result.work.total_fge + found.fge.sum()
    exact = fastvi.profile(
        result, [result.nbeta], [GAMMA], error=0.5 * result.llc_sem / result.llc, progress=False
    )
    assert exact.fge[0, 0] > 0
    assert exact.llc_sem[0, 0] < result.llc_sem


def test_table_and_figure_show_every_cell(found):
    text = found.summary()
    assert all(f"{value:.4g}" in text for value in (*found.nbetas, *found.localizations))
    assert "FGE" in text
    above, below = found.plot().axes
    assert len(above.containers) == len(below.containers) == len(found.nbetas)
    dots = np.concatenate([line.get_ydata() for line in above.lines if line.get_marker() == "o"])
    np.testing.assert_allclose(np.sort(dots), np.sort(found.llc.ravel()))


def test_crossing_is_that_of_quadrature():
    """w1^2 w2^2, whose posterior no Gaussian fits: two localizations, two temperatures."""
    data = np.zeros((1000, 1), np.float32)
    own = fastvi.estimate_llc(
        lambda w, batch: (w[0] * w[1]) ** 2 + 0.0 * batch.mean(),
        jnp.zeros(2),
        data,
        method="sample",
        error=0.06,
        progress=False,
    )
    profile = fastvi.profile(own, [own.nbeta, 8 * own.nbeta], [1.0, 8.0], progress=False)
    exact = on_grid(
        lambda b, g: even_loss_answer(lambda w: (w[0] * w[1]) ** 2, 2, b, g)[0], profile
    )
    assert np.all(np.abs(profile.llc - exact) < 4.5 * profile.llc_sem)


@pytest.mark.parametrize("terms", [0, 3])
def test_tempered_coordinates_are_round_for_the_tempered_gaussian(terms, x64):
    rng = np.random.default_rng(terms)
    dim, before, after = 7, 5.0, 40.0
    basis = np.linalg.qr(rng.normal(size=(dim, max(terms, 1))))[0].T[:terms]
    rest = rng.uniform(0.1, 3.0, dim)
    hessian = np.diag(rest) + 20.0 * basis.T @ basis
    scale = (before * rest + 2.0) ** -0.5
    precision = before * hessian + 2.0 * np.eye(dim)
    values, vectors = np.linalg.eigh(np.linalg.inv(scale[:, None] * precision * scale))
    kept = np.abs(values - 1) > 1e-9
    linear_map = LinearMap(
        jnp.asarray(rng.normal(size=dim)),
        jnp.asarray(scale),
        jnp.asarray(vectors[:, kept].T),
        jnp.asarray(np.diag(values[kept] ** 0.5 - 1)),
    )
    posteriors = [
        LocalPosterior(jnp.zeros(dim), jnp.asarray(nbeta), jnp.asarray(gamma))
        for nbeta, gamma in ((before, 2.0), (after, 0.3))
    ]
    tempered = temper_map(linear_map, *posteriors)
    root = np.asarray(tempered.displacement(jnp.eye(dim)) - tempered.center)
    exact = np.linalg.inv(after * hessian + 0.3 * np.eye(dim))
    np.testing.assert_allclose(root.T @ root, exact, rtol=1e-8, atol=1e-10)
    point = jnp.asarray(rng.normal(size=dim))
    np.testing.assert_allclose(tempered.round(tempered.displacement(point)), point, rtol=1e-8)


def test_tempered_coordinates_are_never_wider_than_the_localizer(x64):
    """Of a q that is wider than its own localizer, as one of negative curvature."""
    wide = LinearMap(jnp.zeros(2), jnp.full(2, 3.0), jnp.eye(2)[:1], jnp.full((1, 1), 2.0))
    one, other = (
        LocalPosterior(jnp.zeros(2), jnp.asarray(nbeta), jnp.asarray(1.0)) for nbeta in (1.0, 50.0)
    )
    root = np.asarray(temper_map(wide, one, other).displacement(jnp.eye(2)))
    assert np.linalg.eigvalsh(root.T @ root).max() == pytest.approx(1.0)


def test_walkers_that_are_nowhere_have_no_radius():
    lost = np.full((2, 8), np.inf)
    said = said_by_walkers(Check(Analysis.broken(2), lost, lost, ()), 4, 48)
    assert np.isnan(said["radius"])
    assert np.isnan(said["radius_sem"])
    assert said["first_step"] == 48 - 32


def a_profile(llc, localizations):
    llc = np.asarray(llc, float)
    zeros = np.zeros_like(llc)
    return LLCProfile(
        nbetas=np.arange(1.0, len(llc) + 1),
        localizations=np.asarray(localizations, float),
        llc=llc,
        llc_sem=0.01 * np.abs(llc),
        radius=zeros,
        radius_sem=zeros,
        fge=zeros,
        fge_before=0.0,
        health=tuple(((),) * llc.shape[1] for _ in llc),
        nbeta=1.0,
        localization=1.0,
        dim=10,
        n_data=100,
    )


def test_slopes_are_those_of_power_laws():
    gammas = np.array([1.0, 4.0, 32.0])
    profile = a_profile([5 * gammas**-1.0, 5 * gammas**-0.2, -gammas], gammas)
    slope, error = profile.localization_slope
    np.testing.assert_allclose(slope[:2], [[-1, -1], [-0.2, -0.2]])
    np.testing.assert_allclose(error[:2], np.tile(0.01 * 2**0.5 / np.log([4, 8]), (2, 1)))
    assert np.all(np.isnan(slope[2]))
    np.testing.assert_array_equal(profile.localizer_decides.any(axis=1), [True, False, False])
    assert "*" in profile.summary().splitlines()[1]
    assert "*" not in profile.summary().splitlines()[2]
    slope, _ = a_profile(np.array([[2.0], [2.0 * 2**0.3]]), [1.0]).nbeta_slope
    np.testing.assert_allclose(slope, [[0.3]])
    assert not a_profile([[1.0], [2.0]], [1.0]).localizer_decides.any()
    assert log_slopes(np.ones((1, 1)), np.ones((1, 1)), np.ones(1))[0].shape == (1, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nbetas": []}, "at least one number"),
        ({"nbetas": [1.0, -2.0]}, "each of nbetas"),
        ({"localizations": [1.0, 0.0]}, "each of localizations"),
        ({"localizations": [1.0, 1.0]}, "differ from each other"),
        ({"error": 2.0}, "between 0 and 1"),
        ({"budget": -1.0}, "budget"),
        ({"nbetas": [1.0], "localizations": [1.0], "budget": 10.0}, "are enough"),
    ],
)
def test_impossible_grids_are_refused(options, said, result):
    with pytest.raises(fastvi.ConfigError, match=said):
        fastvi.profile(result, progress=False, **options)


def test_estimates_without_walkers_are_refused(result):
    loaded = dataclasses.replace(result, fitted=None, ensemble=None)
    with pytest.raises(fastvi.DataError, match="holds no fit"):
        fastvi.profile(loaded, progress=False)
    walked = dataclasses.replace(loaded, log_weights=np.zeros((0, 0)))
    with pytest.raises(fastvi.DataError, match="is a walk from the localizer"):
        fastvi.profile(walked, progress=False)


def test_profiles_go_on_from_estimates_that_have_not_walked(result):
    own = dataclasses.replace(
        result, ensemble=None, correction=None, fitted=result.fitted._replace(previous=None)
    )
    profile = fastvi.profile(own, [2 * own.nbeta], [GAMMA], progress=False)
    held = 2 * own.nbeta * CURVATURES
    exact = 0.5 * np.sum(held / (held + GAMMA))
    assert abs(profile.llc[0, 0] - exact) < 4.5 * profile.llc_sem[0, 0]
    assert profile.fge_before > result.work.total_fge


def test_a_grid_has_to_be_given_where_there_is_no_localizer(result):
    own = dataclasses.replace(result, localization=0.0)
    with pytest.raises(fastvi.ConfigError, match="pass localizations"):
        fastvi.profile(own, progress=False)


def test_progress_names_the_cell(result):
    seen = []
    fastvi.profile(result, [2 * result.nbeta], [GAMMA], progress=seen.append)
    assert {one.stage for one in seen} == {"cell 1 of 1"}
    assert seen[-1].value > 0
