"""What a person sees of a run: arviz, TensorBoard, figures, the report, findings."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fastvi
from fastvi import LLCEstimate, estimate_llc, to_arviz, write_report
from fastvi.evaluation.errors import ErrorParts
from fastvi.evaluation.importance import Importance, assess_importance
from fastvi.geometry.minimum import Bottom
from fastvi.results.findings import Evidence, correction_findings, health_findings
from fastvi.results.parts import ChainValues, Correction
from fastvi.results.report.panels import PANELS
from fastvi.results.report.plots import plot_panels
from fastvi.results.report.tensorboard import Events, LiveEvents, reduce_traces, write_events
from fastvi.results.runs import Origin, write_run
from fastvi.sampling.run import Unmet

DATA = (jnp.zeros((20, 1)),)
TAGS = {
    *(
        "elbo",
        "elbo_like",
        "logq",
        "radius2",
        "radius2_q05",
        "radius2_q50",
        "radius2_q95",
        "resp_entropy",
    ),
    *(
        "cumulative_fge",
        "Eq_Ln_mc",
        "Eq_Ln_cv",
        "variance_reduction",
        "pi_min",
        "pi_max",
        "pi_entropy",
    ),
    *(
        "D_sqrt_min",
        "D_sqrt_max",
        "D_sqrt_med",
        "A_col_norm_p95",
        "A_col_norm_max",
        "grad_norm",
        "lr",
    ),
    *("llc_mean", "L0", "lambda_hat_mean", "Eq_Ln_final", "Ln_wstar"),
}
IMAGES = {"pi", "scree", "D_sqrt", "radius2_trace", "spectrum"}


def crossing(w, batch):
    """A linear network of two layers with a true rank of zero, and one regular direction."""
    first, second = w[:9].reshape(3, 3), w[9:18].reshape(3, 3)
    return jnp.sum((second @ first) ** 2) + w[18] ** 2 + 0.0 * jnp.sum(batch[0])


@pytest.fixture(scope="module")
def live_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def result(live_folder):
    """A small fit of a singular loss, watched while it ran."""
    options = {
        "steps": 200,
        "early_stop": False,
        "samples_per_step": 2,
        "eval_samples": 256,
        "M": 3,
        "method": "variational",
    }
    options |= {"num_chains": 2, "eval_every": 40, "tensorboard": True}
    with LiveEvents(live_folder, every=20) as live:
        found = estimate_llc(crossing, jnp.zeros(19), DATA, nbeta=100.0, progress=live, **options)
    return dataclasses.replace(found, config=found.config.replace(tensorboard=False))


@pytest.fixture(scope="module")
def corrected(result):
    """The same result as if two walkers had followed the fit."""
    walk = np.abs(np.random.default_rng(0).normal(size=(4, 30))) + 1.0
    details = Correction(
        "sample", khat=1.0, burn_in=60, steps=300, rhat=1.01, variance_reduction=2.0
    )
    work, timings = result.work.with_correction(300.0), result.timings._replace(correction=1.0)
    return dataclasses.replace(
        result, llc=1.8, walk_llc=walk, correction=details, work=work, timings=timings
    )


def test_the_walk_leaves_out_whole_records(corrected):
    """15 of 44 records, each the mean of 4 steps, where 15 / 44 * 44 rounds to less than 15."""
    for records in range(8, 400):
        for burn_in in {records // 5, records // 3, records // 2}:
            details = corrected.correction._replace(burn_in=4 * burn_in, steps=4 * records)
            walk = np.ones((2, records))
            result = dataclasses.replace(corrected, correction=details, walk_llc=walk)
            assert result.walk_burn_in == burn_in


def group(container, name):
    found = getattr(container, name, None)
    return (
        container[name].to_dataset() if found is None or not hasattr(found, "data_vars") else found
    )


def test_arviz_has_the_draws_of_q(result):
    container = to_arviz(result)
    posterior, stats = group(container, "posterior"), group(container, "sample_stats")
    assert posterior["llc"].dims == ("chain", "draw")
    np.testing.assert_allclose(posterior["llc"].mean("draw"), result.evaluation.llc_mc, rtol=1e-5)
    np.testing.assert_allclose(
        posterior["L"], result.init_loss + posterior["llc"].to_numpy() / result.nbeta, rtol=1e-6
    )
    np.testing.assert_allclose(stats["log_weight"].mean("draw"), result.evaluation.elbo, rtol=1e-5)
    np.testing.assert_allclose(
        stats["log_p"] - stats["log_q"], stats["log_weight"], rtol=1e-6, atol=1e-6
    )
    # log p = -nbeta L - gamma/2 |v|^2 can be no more than -nbeta L
    assert np.all(stats["log_p"].to_numpy() <= -result.nbeta * posterior["L"].to_numpy() + 1e-4)
    assert not stats["diverging"].any()
    np.testing.assert_array_equal(stats["logq"], stats["log_q"])
    np.testing.assert_array_equal(stats["elbo_like"], stats["log_p"])
    entropy = stats["resp_entropy"].to_numpy()
    assert entropy.shape == stats["log_q"].shape
    # three components that nearly coincide and weigh alike; the trace holds the same mean over the
    # fit's draws
    assert entropy.mean() == pytest.approx(result.traces["resp_entropy"][:, -50:].mean(), abs=0.1)
    assert 0 < entropy.max() <= np.log(3) + 1e-5
    assert stats["cumulative_fge"].to_numpy()[0, -1] == pytest.approx(200 * 2 + 256 / 3)


def test_arviz_keeps_mirrored_draws_together(result):
    """Mirrored draws about a centre near w* of an even loss have nearly the same llc."""
    llc = group(to_arviz(result), "posterior")["llc"].to_numpy()
    within = np.abs(llc[:, 0::2] - llc[:, 1::2]).mean()
    assert within < 0.5 * np.abs(llc[:, 1:-1:2] - llc[:, 2::2]).mean()


def test_arviz_keeps_the_optimisation_apart(result):
    history = group(to_arviz(result), "optimization")
    assert set(history.data_vars) == set(result.traces)
    assert history["elbo"].dims == ("chain", "step")
    np.testing.assert_array_equal(history["elbo"], result.traces["elbo"])


def test_arviz_of_a_corrected_run_has_the_walkers(corrected):
    container = to_arviz(corrected)
    posterior = group(container, "posterior")
    np.testing.assert_array_equal(posterior["llc"], corrected.walk_llc[:, 6:])
    assert posterior.attrs["llc"] == 1.8
    work = group(container, "sample_stats")["cumulative_fge"].to_numpy()
    assert 4 * work[0, -1] == pytest.approx(corrected.work.total_fge)
    np.testing.assert_allclose(
        group(container, "variational")["llc"].mean("draw"),
        corrected.evaluation.llc_mc,
        rtol=1e-5,
    )


def test_arviz_survives_netcdf(corrected, tmp_path):
    xarray = pytest.importorskip("xarray")
    to_arviz(corrected).to_netcdf(str(tmp_path / "run.nc"))
    with xarray.open_dataset(tmp_path / "run.nc", group="posterior") as posterior:
        np.testing.assert_array_equal(posterior["llc"], corrected.walk_llc[:, 6:])
        assert fastvi.VIConfig.create(json.loads(posterior.attrs["config"])) == corrected.config
    with xarray.open_dataset(tmp_path / "run.nc", group="optimization") as history:
        np.testing.assert_array_equal(history["elbo"], corrected.traces["elbo"])


def read_events(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    return write_events(result, tmp_path_factory.mktemp("events"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_every_tag(result, written):
    mean = read_events(written)
    assert {f"vi/{tag}" for tag in TAGS} <= set(mean.Tags()["scalars"])
    assert {f"vi/{tag}" for tag in IMAGES} == set(mean.Tags()["images"])
    elbo = mean.Scalars("vi/elbo")
    assert [event.step for event in elbo] == [39, 79, 119, 159, 199]
    expected = result.traces["elbo"].reshape(2, 5, 40).mean(axis=(0, 2))
    np.testing.assert_allclose([event.value for event in elbo], expected, rtol=1e-5)
    fge = [event.value for event in mean.Scalars("vi/cumulative_fge")]
    np.testing.assert_allclose(fge, result.traces["cumulative_fge"][0, 39::40], rtol=1e-6)
    assert mean.Scalars("vi/llc_mean")[0].value == pytest.approx(result.llc, rel=1e-6)
    per_chain = [read_events(written / f"chain_{chain}") for chain in range(2)]
    for chain, events in enumerate(per_chain):
        assert events.Scalars("vi/llc_vi")[0].value == pytest.approx(
            result.evaluation.llc[chain], rel=1e-6
        )
        values = [event.value for event in events.Scalars("vi/radius2_q50")]
        medians = np.median(result.traces["radius2"][chain].reshape(5, 40), axis=1)
        np.testing.assert_allclose(values, medians, rtol=1e-5)
    for tag in IMAGES - {"spectrum"}:
        assert [image.step for image in mean.Images(f"vi/{tag}")] == [79, 159, 199], tag
    assert [image.step for image in mean.Images("vi/spectrum")] == [199]
    png = mean.Images("vi/pi")[0]
    assert png.encoded_image_string[:8] == b"\x89PNG\r\n\x1a\n"
    assert (png.width, png.height) == (512, 296)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_follows_each_component(result, written):
    norms = np.sqrt(result.snapshots["factor_norm2"])  # chains, snapshots, components, rank 2
    expected = norms.min(axis=3) + 0.95 * (norms.max(axis=3) - norms.min(axis=3))
    mean, chain = read_events(written), read_events(written / "chain_1")
    for component in range(3):
        tag = f"vi/A_col_norm_p95_{component}"
        assert [event.step for event in mean.Scalars(tag)] == [39, 79, 119, 159, 199]
        per_chain = [event.value for event in chain.Scalars(tag)]
        np.testing.assert_allclose(per_chain, expected[1, :, component], rtol=1e-5)
        averages = [event.value for event in mean.Scalars(tag)]
        np.testing.assert_allclose(averages, expected[:, :, component].mean(axis=0), rtol=1e-5)


def test_the_last_snapshot_is_the_end(result):
    np.testing.assert_array_equal(result.snapshots["step"], [39, 79, 119, 159, 199])
    for name, array in result.family_arrays.items():
        np.testing.assert_allclose(result.snapshots[name][:, -1], array, rtol=1e-6, atol=1e-7)
    first = result.snapshots["D_sqrt"][:, 0]
    assert not np.allclose(first, result.family_arrays["D_sqrt"], rtol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_snapshots_images_of_the_shape_of_q_show_the_end_alone(result, tmp_path):
    write_events(dataclasses.replace(result, snapshots={}), tmp_path)
    mean = read_events(tmp_path)
    assert [image.step for image in mean.Images("vi/pi")] == [199]
    assert [image.step for image in mean.Images("vi/radius2_trace")] == [79, 159, 199]
    assert [event.step for event in mean.Scalars("vi/A_col_norm_p95_0")] == [199]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_events_of_a_flow_fit(tmp_path):
    found = estimate_llc(
        lambda w, batch: 0.5 * jnp.sum(w**2) + 0.0 * jnp.sum(batch[0]),
        jnp.zeros(2),
        DATA,
        progress=False,
        num_chains=1,
        tensorboard=True,
        family="flow",
        flow={"depth": 2, "hidden": [4]},
        method="variational",
        early_stop=False,
        steps=6,
        eval_every=2,
        eval_samples=4,
        samples_per_step=2,
    )
    mean = read_events(write_events(found, tmp_path))
    tags = {tag.removeprefix("vi/") for tag in mean.Tags()["scalars"]}
    assert tags >= TAGS | {
        "sigma_perp",
        "latent_logdet_mean",
        "latent_scale_min",
        "latent_scale_max",
        "d_latent",
    }
    assert [event.step for event in mean.Scalars("vi/sigma_perp")] == [1, 3, 5]
    expected = found.traces["latent_logdet_mean"][0].reshape(3, 2).mean(axis=1)
    values = [event.value for event in mean.Scalars("vi/latent_logdet_mean")]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
    assert [image.step for image in mean.Images("vi/D_sqrt")] == [1, 3, 5]
    np.testing.assert_array_equal(found.draws.resp_entropy, 0.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_live_events_are_those_of_the_traces(result, live_folder):
    live = read_events(live_folder).Scalars("vi/elbo")
    assert [event.step for event in live] == list(range(19, 200, 20))
    expected = result.traces["elbo"].reshape(2, 10, 20).mean(axis=(0, 2))
    np.testing.assert_allclose([event.value for event in live], expected, rtol=1e-5)


def test_windows_may_end_early():
    windows = reduce_traces(
        {"elbo": np.arange(14.0).reshape(2, 7), "lr": np.arange(14.0).reshape(2, 7)}, 3
    )
    np.testing.assert_array_equal(windows.steps, [2, 5, 6])
    np.testing.assert_array_equal(windows.values["elbo"], [[1, 4, 6], [8, 11, 13]])
    np.testing.assert_array_equal(windows.values["lr"], [[2, 5, 6], [9, 12, 13]])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces_of_any_family_keep_their_names(tmp_path):
    names = ("sigma_perp", "latent_logdet_mean", "latent_scale_min", "latent_scale_max")
    events = Events(tmp_path)
    events.write_traces(
        {name: np.full((2, 3), 1.5 + place) for place, name in enumerate(names)}, every=3
    )
    events.close()
    read = read_events(tmp_path / "chain_1")
    assert [read.Scalars(f"vi/{name}")[0].value for name in names] == [1.5, 2.5, 3.5, 4.5]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_folder_has_events_when_asked(result, tmp_path):
    asked = dataclasses.replace(result, config=result.config.replace(tensorboard=True))
    origin = Origin(None, 0, 1.0, None, 2)
    folder = write_run(asked, tmp_path / "run", origin)
    assert "vi/elbo" in read_events(folder / "diagnostics" / "tb").Tags()["scalars"]
    assert not (write_run(result, tmp_path / "silent", origin) / "diagnostics").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_default_run_writes_a_point_for_each_record(result, tmp_path):
    """5,000 steps and 4 chains, recorded every 50; the time goes into points and images."""
    rng = np.random.default_rng(0)
    traces = {name: rng.uniform(1, 2, size=(4, 5000)) for name in result.traces}
    evaluation = ChainValues(*(values * 2 for values in result.evaluation))
    long = dataclasses.replace(
        result,
        traces=traces,
        evaluation=evaluation,
        llc_per_chain=np.tile(result.llc_per_chain, 2),
        config=result.config.replace(eval_every=50),
    )
    events = read_events(write_events(long, tmp_path))
    scalars = [len(events.Scalars(tag)) for tag in events.Tags()["scalars"]]
    assert max(scalars) == 5000 // 50
    assert sum(scalars) < 30 * 5000 // 50
    assert sum(len(events.Images(tag)) for tag in events.Tags()["images"]) < 10


class Links(HTMLParser):
    """Collect what a page would fetch or run, and count its images."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open_tags, self.images = [], [], 0

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.fetched += [
            values[name]
            for name in ("src", "href")
            if not values.get(name, "data:").startswith(("data:", "#"))
        ]
        self.images += tag == "svg"
        if tag == "script":
            self.fetched.append("script")
        if tag not in ("meta", "link", "img", "br"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag


def test_the_report_is_one_page_that_fetches_nothing(corrected, tmp_path):
    named = dataclasses.replace(
        corrected, health=(dataclasses.replace(FINDING, observed="a < b & c"),)
    )
    path = write_report(named, tmp_path / "deep" / "report.html")
    page = path.read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert links.fetched == []
    assert links.open_tags == []
    assert links.images == sum(panel.applies(named) for panel in PANELS.values()) >= 10
    assert "a &lt; b &amp; c" in page
    assert f"{corrected.llc:.1f}" in re.search(r"<h1>(.*?)</h1>", page)[1]
    assert not re.search(r"https?://|@import|url\((?!#)", page)


FINDING = fastvi.results.findings.Finding("warning", "x", "seen", "cause", "fix")


def test_panels_show_what_there_is(result, corrected):
    assert len(plot_panels(result).axes) == 10
    assert len(plot_panels(result, "elbo", "pi").axes) == 2
    titles = {axes.get_title(loc="left").split(" ")[0] for axes in plot_panels(corrected).axes}
    assert {"walkers:", "importance", "scree:", "mixture", "radius:"} <= titles


def test_saved_results_keep_draws_and_the_shape_of_q(result, tmp_path):
    again = LLCEstimate.load(result.save(tmp_path))
    for name in ("draws", "family_arrays", "snapshots"):
        kept, was = getattr(again, name), getattr(result, name)
        if name == "draws":
            kept, was = kept._asdict(), was._asdict()
        assert set(kept) == set(was)
        for key in was:
            np.testing.assert_array_equal(kept[key], was[key])
    assert write_report(again, tmp_path / "report.html").stat().st_size > 1e5


@pytest.mark.parametrize(("shape", "word"), [(0.2, "good"), (0.6, "ok"), (0.95, "unreliable")])
def test_khat_has_words(shape, word):
    """One pool of weights from a Pareto tail of known shape: the word, and k-hat within 0.1."""
    weights = scipy.stats.genpareto(shape).ppf((np.arange(20_000) + 0.5) / 20_000) + 1
    found = assess_importance(np.log(np.random.default_rng(0).permutation(weights)).reshape(4, -1))
    assert found.word == word
    assert found.khat == pytest.approx(shape, abs=0.1)


def test_importance_of_equal_and_of_broken_weights():
    assert assess_importance(np.zeros((2, 100))) == (-np.inf, "good", pytest.approx(200))
    assert assess_importance(np.array([0.0, np.nan])) == (np.inf, "unreliable", 0.0)


def test_the_singular_loss_is_flagged_and_a_bowl_is_not(result):
    assert result.importance.word == "unreliable"
    assert "khat" in [finding.name for finding in result.health]
    bowl = estimate_llc(
        lambda w, batch: 0.5 * w @ w + 0.0 * jnp.sum(batch[0]),
        jnp.zeros(4),
        DATA,
        nbeta=10.0,
        progress=False,
        steps=300,
    )
    assert bowl.importance.word == "good"
    assert not bowl.health


GOOD = Evidence(
    llc_per_chain=np.array([2.0, 2.01]),
    llc_sem_per_chain=np.array([0.02, 0.02]),
    elbo=np.ones((2, 400)),
    virial=np.ones(100),
    log_weight_sd=np.array([0.3, 0.3]),
    elbo_gain=0.0,
    elbo_gain_error=0.1,
    converged=True,
    rank=2,
    wanted_rank=2,
    rank_limit=8,
    newton_decrement=0.0,
    importance=Importance(0.1, "good", 100.0),
    radius2=np.full((2, 400), 6.0),
    localization=1.0,
    dim=10,
    excess=np.full((2, 50), 2.0),
    num_components=4,
    dominant_weight=0.4,
    longest_factor=0.5,
)


def test_only_findings_of_the_problem_outlive_a_correction():
    bad = {
        "newton_decrement": 3.0,
        "bottom": Bottom(curvature=-5.4, fall=0.8),
        "log_weight_sd": np.full(2, 9.0),
        "converged": False,
        "elbo_gain": 9.0,
    }
    found = health_findings(dataclasses.replace(GOOD, **bad))
    assert {finding.name for finding in found} == {
        "negative_curvature",
        "not_a_minimum",
        "elbo_rising",
        "far_from_posterior",
    }
    values = {"llc": -1.0, "llc_sem": 0.1, "llc_vi": -1.0, "llc_vi_sem": 0.1}
    for gain, severity in ((0.1, "error"), (0.9, "warning"), (float("nan"), "error")):
        curvature = SimpleNamespace(newton_decrement=gain)
        details = {"curvature": curvature, "correction": Correction("sample", 2.0)}
        kept = correction_findings(SimpleNamespace(health=found, **details, **values))
        names = {finding.name: finding.severity for finding in kept}
        # what a Newton step explains is no error
        assert names["negative_llc"] == severity
        assert names.keys() == {"negative_llc", "negative_curvature", "not_a_minimum"}


def test_a_stream_is_not_advised_to_sample():
    streamed = dataclasses.replace(
        GOOD,
        in_memory=False,
        importance=Importance(0.9, "unreliable", 3.0),
        log_weight_sd=np.full(2, 9.0),
    )
    for finding in health_findings(streamed):
        assert '"sample"' not in str(finding)


@pytest.mark.parametrize(
    ("unmet", "narrow", "parts", "says", "advises"),
    [
        (
            [("relative error", 0.04, 0.02)],
            None,
            ErrorParts(0.1),
            "relative error 0.04 (0.02 is asked)",
            "budget to about 4e+03",
        ),
        (
            [("relative error", 0.04, 0.02)],
            None,
            ErrorParts(0.04, relaxation=0.09),
            "relative error 0.04 (0.02 is asked)",
            "localization, which narrows these directions",
        ),
        ([("R-hat of llc", 1.3, 1.1)], None, ErrorParts(0.1), "llc 1.3", "early_stop=True"),
        ([("steps", 16, 32)], None, ErrorParts(0.1), "steps 16 (32 is", "budget to 70 or more"),
        (
            [("drift in standard errors", 3.0, 2.5)],
            "bfloat16",
            ErrorParts(0.1),
            "drift in standard errors 3",
            "float32",
        ),
    ],
)
def test_an_unsettled_walk_names_what_failed_and_what_helps(unmet, narrow, parts, says, advises):
    details = Correction(
        "sample",
        khat=2.0,
        settled=False,
        unmet=tuple(Unmet(*entry) for entry in unmet),
        least_budget=70.0,
        narrow_dtype=narrow,
        steps=64,
        walkers=8,
    )
    config = fastvi.VIConfig(budget=1000.0)
    values = {"llc": 2.0, "llc_sem": 0.1, "llc_vi": 2.0, "llc_vi_sem": 0.1, "has_fit": True}
    (finding,) = correction_findings(
        SimpleNamespace(
            health=(), correction=details, config=config, error_parts=parts, stopped=None, **values
        )
    )
    assert finding.name == "walk_unsettled"
    assert says in finding.observed
    assert advises in finding.next_step
    assert ("budget" in finding.next_step) == (narrow is None)


@pytest.mark.parametrize(
    ("changes", "name", "knobs"),
    [
        ({"importance": Importance(0.9, "unreliable", 3.0)}, "khat", ["method", "M"]),
        (
            {"radius2": np.linspace(1, 4, 400) * np.ones((2, 1))},
            "radius_rising",
            ["steps", "localization"],
        ),
        (
            {"bottom": Bottom(level=3, is_flat=True)},
            "improper_posterior",
            ["localization", "param_mask"],
        ),
        ({"bottom": Bottom(level=3)}, "unlocalized", ["localization"]),
        ({"excess": np.zeros((2, 50))}, "constant_loss", ["loss_fn", "float64"]),
        ({"bottom": Bottom(curvature=-5.4, fall=0.8)}, "negative_curvature", ["Train longer"]),
        ({"newton_decrement": 0.9}, "not_a_minimum", ["Train longer"]),
        ({"excess": np.full((2, 50), -0.9)}, "not_a_minimum", ["Train longer"]),
        ({"radius2": np.full((2, 400), 9.95)}, "localizer_decides", ["localization", "nbeta"]),
        (
            {"dominant_weight": 0.97},
            "weights_collapsed",
            ["alpha_dirichlet_prior", "alpha_temperature"],
        ),
        ({"longest_factor": 0.01}, "rank_unused", ["r"]),
    ],
)
def test_each_finding_names_its_knob(changes, name, knobs):
    assert health_findings(GOOD) == ()
    found = health_findings(dataclasses.replace(GOOD, **changes))
    assert [finding.name for finding in found] == [name]
    assert all(knob in found[0].next_step for knob in knobs)
