"""Draws of the posterior: covariances, influences and slopes against closed forms."""

import html
import re

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.api import draw_values, walk
from fastvi.observables import evaluate
from fastvi.observables.control_variates import plain_weights
from fastvi.observables.covariance import (
    blocks_per_walker,
    covariance_of,
    jackknifed,
    mean_of,
)
from fastvi.observables.posterior import PosteriorDraws
from fastvi.results.draw_findings import draw_findings
from fastvi.results.report.posterior import (
    order_by_cluster,
    plot_draws,
    plot_influence,
    plot_susceptibilities,
    rank_counts,
)
from fastvi.sampling.averages import correlation_time

COUNT, DIM, GAMMA = 200, 6, 2.0
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(COUNT, DIM)) * np.linspace(0.3, 2.0, DIM)
OUTPUTS = INPUTS @ np.ones(DIM) + 0.5 * RNG.normal(size=COUNT)
CENTER = np.linalg.lstsq(INPUTS, OUTPUTS, rcond=None)[0]
OTHER = RNG.normal(size=(40, DIM))
OTHER_OUTPUTS = OTHER @ np.ones(DIM) + RNG.normal(size=40)
NBETA = COUNT / np.log(COUNT)
HESSIAN = NBETA * INPUTS.T @ INPUTS / COUNT
COVARIANCE = np.linalg.inv(HESSIAN + GAMMA * np.eye(DIM))
SHARES = np.linalg.eigvals(HESSIAN @ COVARIANCE).real
TRAIN = INPUTS.astype(np.float32), OUTPUTS.astype(np.float32)
TEST = OTHER.astype(np.float32), OTHER_OUTPUTS.astype(np.float32)


def loss_fn(w, batch):
    return 0.5 * (batch[0] @ w - batch[1]) ** 2


def exact_covariance(one, other):
    """Return Cov(loss_i, loss_j) under the Gaussian posterior: of quadratics of a Gaussian."""
    (one, of_one), (other, of_other) = (
        (inputs, inputs @ CENTER - outputs) for inputs, outputs in (one, other)
    )
    inner = one @ COVARIANCE @ other.T
    return of_one[:, None] * inner * of_other + 0.5 * inner**2


def within(estimate, exact, errors=4.5):
    return np.all(np.abs(estimate.value - exact) < errors * estimate.sem)


@pytest.fixture(scope="module", params=["fit", "localizer"])
def result(request):
    return fastvi.estimate_llc(
        loss_fn,
        jnp.asarray(CENTER, jnp.float32),
        TRAIN,
        localization=GAMMA,
        method="sample",
        sampler={"start": request.param},
        key=0,
        progress=False,
    )


@pytest.fixture(scope="module")
def draws(result):
    return fastvi.sample_posterior(
        result,
        80,
        losses={"train": TRAIN, "test": TEST},
        observables={"weights": lambda w, _: w, "error": (lambda w, x: x @ w, TEST[0])},
        thin=8,
        keep_params=True,
        progress=False,
    )


def test_means_are_those_of_the_gaussian(draws):
    assert within(draws.llc_estimate, 0.5 * SHARES.sum())
    on_test = 0.5 * NBETA * np.mean(np.sum(OTHER @ COVARIANCE * OTHER, axis=1))
    assert within(draws.llc_on("test"), on_test)
    assert within(draws.llc_on("train"), 0.5 * SHARES.sum())
    assert within(draws.mean("weights"), CENTER)
    assert draws.llc_estimate.sem < 0.05 * SHARES.sum()


def test_covariances_of_all_examples_are_those_of_the_gaussian(draws):
    for one, other in (("train", "train"), ("train", "test")):
        data = {"train": (INPUTS, OUTPUTS), "test": (OTHER, OTHER_OUTPUTS)}
        exact = exact_covariance(data[one], data[other])
        found = draws.covariance(one, other)
        scores = np.abs(found.value - exact) / found.sem
        # entries are functions of few directions, so that a share of them is off together
        assert 0.4 < np.mean(scores < 1) < 0.9
        assert np.mean(scores < 2) > 0.8
        influence = draws.influence(one, other)
        np.testing.assert_allclose(influence.value, -NBETA / COUNT * found.value)


def test_influence_is_the_derivative_by_the_weight_of_an_example(draws):
    """Of the mean prediction, by central differences of the closed form."""

    def mean_weights(example, change):
        weights = np.ones(COUNT)
        weights[example] += change
        precision = NBETA * (INPUTS.T * weights) @ INPUTS / COUNT + GAMMA * np.eye(DIM)
        slope = NBETA * INPUTS.T @ (weights * OUTPUTS) / COUNT + GAMMA * CENTER
        return np.linalg.solve(precision, slope)

    found = draws.influence("train", "weights")
    for example in (0, 7, 100):
        exact = (mean_weights(example, 1e-4) - mean_weights(example, -1e-4)) / 2e-4
        assert np.all(np.abs(found.value[example] - exact) < 4.5 * found.sem[example])


def test_susceptibility_is_the_derivative_by_other_data(draws):
    slope = OTHER.T @ (OTHER @ CENTER - OTHER_OUTPUTS) / len(OTHER)
    assert within(draws.susceptibility("weights", "test"), -NBETA * COVARIANCE @ slope)


def test_slopes_of_llc_are_those_of_the_gaussian(draws):
    np.testing.assert_array_equal(draws.energies[..., 0], draws.energies[..., 1])
    check_slopes(draws)
    near = draws.locality
    assert near.radius.value == pytest.approx(np.sqrt(np.trace(COVARIANCE)), rel=0.1)
    assert near.localizer_radius == pytest.approx(np.sqrt(DIM / GAMMA))
    assert "slopes of llc" in draws.summary()


def test_slopes_on_samples_of_the_data_are_those_of_the_gaussian(monkeypatch):
    """Two samples that are drawn anew for each draw."""
    monkeypatch.setattr(evaluate, "WHOLE_BYTES", 1.0)
    draws = fastvi.sample_posterior(estimated(), 160, thin=8, progress=False)
    assert np.std(draws.energies[..., 0] - draws.energies[..., 1]) > 0.1
    assert within(draws.llc_estimate, 0.5 * SHARES.sum())
    check_slopes(draws)


def check_slopes(draws):
    near = draws.locality
    assert within(near.localization_slope, -0.5 * np.sum(SHARES * (1 - SHARES)))
    assert within(near.nbeta_slope, 0.5 * np.sum(SHARES * (1 - SHARES)))
    assert within(near.held, SHARES.sum() / DIM)


@pytest.mark.parametrize(
    ("localization", "expected"),
    [(GAMMA, set()), (1e4, {"localizer_number"}), (0.05, {"far_draws"})],
)
def test_findings_say_whether_llc_is_local(localization, expected):
    """A quadratic of known curvature about a w* of length 1."""
    values = np.linspace(0.5, 2.0, DIM).astype(np.float32)
    center = np.ones(DIM, np.float32) / np.sqrt(DIM)
    nbeta = 20.0 if localization != 0.05 else 0.05
    result = fastvi.estimate_llc(
        lambda w, batch: 0.5 * jnp.sum(values * (w - center) ** 2) + 0 * jnp.sum(batch),
        jnp.asarray(center),
        np.zeros((50, 1), np.float32),
        nbeta=nbeta,
        localization=localization,
        progress=False,
    )
    found = fastvi.sample_posterior(result, 160, thin=8, progress=False)
    shares = nbeta * values / (nbeta * values + localization)
    assert within(found.locality.localization_slope, -0.5 * np.sum(shares * (1 - shares)))
    names = {finding.name for finding in found.health} - {"slow_draws"}
    assert names == expected
    assert all(str(finding) in found.summary() for finding in found.health)


def test_walkers_that_remember_are_told():
    series, _ = autoregressive(0.98, 8, 100, np.eye(1))
    rest = {"losses": {}, "init_losses": {}, "observables": {}}
    found = PosteriorDraws(
        energies=np.repeat(series, 2, axis=2) + 10,
        slopes=np.repeat(series, 2, axis=2),
        radius2=series[:, :, 0] ** 2,
        nbeta=1.0,
        localization=1.0,
        n_data=10,
        dim=3,
        center_norm=10.0,
        init_loss=0.5,
        thin=4,
        fge=1.0,
        **rest,
    )
    assert found.blocks == 1
    assert [finding.name for finding in draw_findings(found)] == ["slow_draws"]


def test_parameters_are_those_that_observables_saw(draws):
    walker, draw = 3, 17
    w = draws.params(walker, draw)
    np.testing.assert_allclose(w, draws.observables["weights"][walker, draw], rtol=1e-6)
    predicted = TEST[0] @ np.asarray(w)
    np.testing.assert_allclose(
        draws.observables["error"][walker, draw], predicted, rtol=1e-4, atol=1e-5
    )
    losses = 0.5 * (predicted - TEST[1]) ** 2
    np.testing.assert_allclose(draws.losses["test"][walker, draw], losses, rtol=1e-4, atol=1e-5)
    v = np.asarray(w, float) - CENTER
    assert draws.llc[walker, draw] == pytest.approx(0.5 * v @ HESSIAN @ v, rel=1e-3, abs=1e-3)
    assert draws.slope[walker, draw] == pytest.approx(v @ HESSIAN @ v, rel=1e-3, abs=1e-3)


def test_the_same_result_gives_the_same_draws(monkeypatch):
    monkeypatch.setattr(draw_values, "MOST_PLACED", DIM - 1)
    result = fastvi.estimate_llc(
        loss_fn, jnp.asarray(CENTER, jnp.float32), TRAIN, localization=GAMMA, progress=False
    )
    first, again = (fastvi.sample_posterior(result, 8, progress=False) for _ in range(2))
    np.testing.assert_array_equal(first.llc, again.llc)
    with pytest.raises(fastvi.DataError, match="keep_params=True"):
        first.params(0, 0)
    with pytest.raises(fastvi.DataError, match="'train' was not evaluated"):
        first.covariance("train")


def test_walkers_of_either_kind_go_on_from_disk(result, tmp_path):
    def stop(progress):
        if progress.step == 18:
            raise KeyboardInterrupt

    options = {"losses": {"test": TEST}, "keep_params": True}
    with pytest.raises(KeyboardInterrupt):
        fastvi.sample_posterior(result, 20, store=tmp_path / "draws", progress=stop, **options)
    assert fastvi.load_draws(tmp_path / "draws").num_draws == 16
    found, held = (
        fastvi.sample_posterior(result, 20, store=store, progress=False, **options)
        for store in (tmp_path / "draws", None)
    )
    for one, other in (
        (found.energies, held.energies),
        (found.losses["test"], held.losses["test"]),
        (found.displacement, held.displacement),
    ):
        np.testing.assert_array_equal(one, other)
    assert found.fge == pytest.approx(held.fge, rel=1e-12)


def test_parameters_come_back_as_they_were_passed():
    """A mask holds a part fixed, which draws have in its place."""
    params = {"free": jnp.zeros(2), "fixed": jnp.ones(3)}

    def loss(w, batch):
        return 0.5 * jnp.mean((batch @ w["free"]) ** 2) * w["fixed"][0]

    result = fastvi.estimate_llc(
        loss,
        params,
        np.asarray(INPUTS[:, :2], np.float32),
        param_mask={"free": True, "fixed": False},
        progress=False,
    )
    found = fastvi.sample_posterior(
        result,
        8,
        observables={"fixed": lambda w, _: w["fixed"], "free": lambda w, _: w["free"]},
        keep_params=True,
        progress=False,
    )
    np.testing.assert_array_equal(found.observables["fixed"][0, 0], np.ones(3))
    whole = found.params(0, 5)
    np.testing.assert_array_equal(whole["fixed"], np.ones(3))
    np.testing.assert_allclose(whole["free"], found.observables["free"][0, 5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 4}, "at least 8"),
        ({"thin": 3}, "even number"),
        ({"error": 0.0}, "between 0 and 1"),
        ({"losses": {"a": TEST}, "observables": {"a": lambda w, _: w}}, "names two things"),
        ({"losses": {"llc": TEST}}, "names two things"),
        ({"observables": {"a": 3}}, "must be a function"),
        ({"draws": 10**7, "keep_params": True}, "more than the"),
    ],
)
def test_impossible_draws_are_refused(options, message):
    result = estimated()
    with pytest.raises(fastvi.ConfigError, match=message):
        fastvi.sample_posterior(result, progress=False, **options)


class Shuffled:
    """A loader that shuffles anew in each pass."""

    rng = np.random.default_rng(0)

    def __iter__(self):
        order = self.rng.permutation(len(TEST[0]))
        yield tuple(leaf[order] for leaf in TEST)


@pytest.mark.parametrize("keyword", ["losses", "token_losses"])
def test_losses_of_examples_in_no_order_are_refused(keyword):
    with pytest.raises(fastvi.DataError, match="order of the examples changes.*shuffle=False"):
        fastvi.sample_posterior(estimated(), progress=False, **{keyword: {"test": Shuffled()}})


def test_a_result_without_walkers_is_refused(tmp_path):
    estimated().save(tmp_path / "one.npz")
    with pytest.raises(fastvi.DataError, match="holds no walkers"):
        fastvi.sample_posterior(fastvi.LLCEstimate.load(tmp_path / "one.npz"), progress=False)


def test_walkers_in_many_dimensions_are_not_held(monkeypatch):
    monkeypatch.setattr(walk, "MOST_HELD", 8 * DIM - 1)
    result = fastvi.estimate_llc(
        loss_fn,
        jnp.asarray(CENTER, jnp.float32),
        TRAIN,
        localization=GAMMA,
        error=0.2,
        sampler={"start": "localizer"},
        progress=False,
    )
    with pytest.raises(fastvi.DataError, match="holds no walkers.*half a million"):
        fastvi.sample_posterior(result, progress=False)


def estimated():
    return fastvi.estimate_llc(
        loss_fn, jnp.asarray(CENTER, jnp.float32), TRAIN, localization=GAMMA, progress=False
    )


def autoregressive(keep, walkers, length, mixing, seed=0):
    """Return stationary AR(1) series of several dependent numbers, and their covariance."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(length + 200, walkers, mixing.shape[0])) @ mixing
    series = np.zeros_like(noise)
    for step in range(1, len(noise)):
        series[step] = keep * series[step - 1] + noise[step]
    return series[200:].swapaxes(0, 1), mixing.T @ mixing / (1 - keep**2)


def test_errors_of_covariances_fit_series_that_remember():
    mixing, scores = np.random.default_rng(1).normal(size=(4, 4)), []
    for seed in range(60):
        series, exact = autoregressive(0.8, 8, 400, mixing, seed)
        time = correlation_time(series[:, :, 0])
        assert 5 < time < 15  # (1 + 0.8) / (1 - 0.8) is 9
        flat = series.reshape(3200, 4)
        found = covariance_of(plain_weights(8, 400, blocks_per_walker(8, 400, time)), flat, flat)
        scores.append((found.value - exact) / found.sem)
        np.testing.assert_allclose(found.value, found.value.T)
    scores = np.array(scores)
    assert np.all(np.abs(scores.mean(axis=0)) < 4.5 / np.sqrt(60))
    assert 0.6 < np.mean(np.abs(scores) < 1) < 0.78
    assert np.mean(np.abs(scores) < 2) > 0.92


def test_means_and_jackknifed_statistics_of_independent_draws():
    rng, scores, weights = np.random.default_rng(0), [], plain_weights(16, 50, 1)
    for _ in range(200):
        draws, others = rng.normal(size=800) * 2 + 3, rng.normal(size=800) + 5
        mean = mean_of(weights, draws)
        variance = jackknifed(lambda weight, x: weight @ x**2 - (weight @ x) ** 2, weights, draws)
        ratio = jackknifed(lambda weight, x, y: weight @ x / (weight @ y), weights, draws, others)
        pairs = ((mean, 3.0), (variance, 4.0), (ratio, 0.6))
        scores.append([(one.value - exact) / one.sem for one, exact in pairs])
    scores = np.array(scores)
    assert np.all(np.abs(scores.mean(axis=0)) < 4.5 / np.sqrt(200))
    assert np.all(np.abs(scores.std(axis=0) - 1) < 0.25)


def test_one_block_tells_no_error():
    draws, weights = np.random.default_rng(0).normal(size=(50, 3)), plain_weights(1, 50, 1)
    for found in (
        mean_of(weights, draws),
        covariance_of(weights, draws, draws),
        jackknifed(lambda weight, x: weight @ x, weights, draws[:, 0]),
    ):
        assert np.all(np.isfinite(found.value))
        assert np.all(np.isinf(found.sem))


def test_blocks_are_long_beside_what_walkers_remember():
    assert blocks_per_walker(8, 200, 1.0) == 8
    assert blocks_per_walker(8, 200, 5.0) == 4
    assert blocks_per_walker(8, 200, 100.0) == 1
    assert blocks_per_walker(1, 200, 100.0) == 2
    assert blocks_per_walker(128, 200, 1.0) == 1


def test_ranks_of_walkers_that_sample_the_same_are_uniform():
    llc = np.random.default_rng(0).normal(size=(8, 400))
    counts = rank_counts(llc)
    assert counts.shape == (8, 20)
    np.testing.assert_array_equal(counts.sum(axis=1), 400)
    np.testing.assert_array_equal(counts.sum(axis=0), 160)
    assert np.all(np.abs(counts - 20) < 5 * np.sqrt(20))
    llc[3] += 3  # it has stayed somewhere else
    assert rank_counts(llc)[3, -1] > 100


def test_like_examples_are_side_by_side():
    """Three groups of examples whose losses move together, in a mixed order."""
    group = np.random.default_rng(0).integers(0, 3, 40)
    covariance = 0.2 * np.eye(40) + (group[:, None] == group) * 1.0
    order = order_by_cluster(-covariance)
    assert sorted(order) == list(range(40))
    assert np.sum(np.diff(group[order]) != 0) == 2
    with pytest.raises(fastvi.DataError, match="square"):
        order_by_cluster(np.ones((2, 3)))


def test_figures_show_what_was_drawn(draws):
    figure = plot_draws(draws)
    trace, ranked = figure.axes
    assert len(trace.lines) == 1 + min(12, draws.num_walkers)
    assert f"{float(draws.llc_estimate.value):.4g}" in trace.get_title(loc="left")
    assert ranked.get_ylim()[0] == 0
    influence = draws.influence("train")
    (image,) = plot_influence(influence).axes[0].images
    order = order_by_cluster(influence.value)
    np.testing.assert_array_equal(image.get_array(), influence.value[np.ix_(order, order)])


def test_the_report_shows_draws(result, draws, tmp_path):
    path = fastvi.write_report(result, tmp_path / "report.html", draws=draws)
    page = path.read_text(encoding="utf-8")
    before, after = page.split(">Draws of the posterior</h2>")
    assert html.escape(draws.summary()) in after
    assert "Temperature" not in page
    pictures = re.findall(r'<svg role="img" aria-label="(.*?)"', after)
    assert pictures == ["draws", "train", "test"]


def test_susceptibilities_are_drawn_along_training(draws):
    one = draws.susceptibility("weights", "test")
    along = [one, one._replace(value=one.value + 1), one]
    (axes,) = plot_susceptibilities({"weights": along}, [1, 10, 100], "step").axes
    assert len(axes.lines) == DIM + 1
    np.testing.assert_allclose(axes.lines[2].get_ydata(), one.value[2] + [0, 1, 0])
    assert axes.lines[2].get_xdata().tolist() == [1, 10, 100]
    with pytest.raises(fastvi.DataError, match=r"\[3\] for 2 checkpoints"):
        plot_susceptibilities({"weights": along}, [1, 10])
