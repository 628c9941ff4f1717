"""An estimate that is a walk from the localizer: whatever reads one asks it for no q."""

import dataclasses
import io
import re
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi import DataError, LLCEstimate, cli
from fastvi.cli.runs import draw_comparison
from fastvi.cli.sweep_cells import outcome_of
from fastvi.cli.sweep_figure import draw_sweep
from fastvi.cli.table import describe
from fastvi.demos.quadratic import Exact, comparison
from fastvi.fitting.protocols import Progress
from fastvi.results.progress import StatusLine, tell_sampling
from fastvi.results.report.page import write_report
from fastvi.results.report.panels import PANELS
from fastvi.results.report.plots import plot_panels, plot_traces
from fastvi.results.report.tensorboard import write_events
from tests.results.test_damaged_files import arrays, put, refused, same

DATA = np.random.default_rng(0).normal(size=(256, 6)).astype(np.float32)
DATA -= DATA.mean(axis=0)


def loss(w, batch):
    return 0.5 * jnp.mean(jnp.sum((w - batch[0]) ** 2, -1))


OPTIONS = {
    "nbeta": 5.0,
    "localization": 50.0,
    "sampler": {"start": "localizer"},
    "budget": 20000.0,
    "progress": False,
}


@pytest.fixture(scope="module")
def walk():
    return fastvi.estimate_llc(loss, jnp.zeros(6), (DATA,), **OPTIONS)


@pytest.fixture(scope="module")
def fit():
    options = {"method": "variational", "steps": 60, "M": 1, "r": 0, "num_chains": 1}
    return fastvi.estimate_llc(
        loss, jnp.zeros(6), (DATA,), nbeta=5.0, eval_samples=32, progress=False, **options
    )


def test_the_summary_is_of_walkers(walk):
    text = walk.summary()
    assert not walk.has_fit
    assert "(Langevin dynamics from the localizer)" in text
    assert "per walkers" in text
    assert f"{walk.correction.steps} steps of" in text
    assert "nan" not in text
    assert not re.search("elbo|k-hat|core ", text)


def test_a_saved_walk_comes_back_exactly(walk, tmp_path):
    again = LLCEstimate.load(walk.save(tmp_path))
    same(again, dataclasses.replace(walk, correction=again.correction))
    assert again.correction._replace(khat=0.0) == walk.correction._replace(khat=0.0)
    assert again.summary() == walk.summary()
    same(LLCEstimate.load(again.save(tmp_path)), again)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (put("correction", None), "has neither a fit in evaluation.llc nor a walk in correction"),
        (put("correction", "method", "reweight"), "has neither a fit"),
        (put("correction", "batch", None), "has correction.batch = None, though it is a walk"),
        (put("correction", "steps", None), "has correction.steps = None, though it is a walk"),
    ],
)
def test_a_damaged_walk_is_refused(damage, said, walk, tmp_path):
    walk.save(tmp_path)
    refused(lambda: LLCEstimate.load(tmp_path), tmp_path / "result.json", damage, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.update(trace_elbo=np.zeros((1, 5))), "holds 'trace_elbo', no array of it"),
        (lambda a: a.update(family_pi=np.ones((1, 2))), "holds 'family_pi', no array of it"),
        (lambda a: a.update(log_weights=np.zeros((1, 4))), "'log_weights' of the impossible"),
        (lambda a: a.update(draw_log_q=np.zeros((1, 4))), "'draw_log_q' of the impossible"),
        (lambda a: a.update(walk_llc=np.zeros(3)), "'walk_llc' of the impossible shape (3,)"),
        (lambda a: a.pop("walk_llc"), "lacks the array 'walk_llc'"),
    ],
)
def test_damaged_arrays_of_a_walk_are_refused(change, said, walk, tmp_path):
    walk.save(tmp_path)
    refused(lambda: LLCEstimate.load(tmp_path), tmp_path / "traces.npz", arrays(change), said)


def test_the_page_has_the_walk_alone(walk, tmp_path):
    page = write_report(walk, tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<svg role="img" aria-label="(\w+)"', page) == ["walk"]
    assert [name for name, panel in PANELS.items() if panel.applies(walk)] == ["walk"]
    table = page.split(">Numbers</h2>")[1].split("</table>")[0]
    numbers = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", table))
    assert numbers["walk: batch"] == str(walk.correction.batch)
    assert numbers["walk: unmet"].startswith("relative error 0.")
    assert not [name for name in numbers if re.search("q alone|elbo|khat|k-hat|ridge", name)]
    assert not [text for text in numbers.values() if "nan" in text]
    assert "Langevin dynamics from the localizer" in page


def test_figures_of_a_walk_have_no_empty_axes(walk):
    (axes,) = plot_traces(walk).axes
    assert axes.get_title(loc="left").startswith("walkers:  R-hat ")
    assert f"{walk.correction.batch} fresh examples a step" in axes.get_title(loc="left")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "llc ± sem" in labels
    assert len(plot_panels(walk).axes) == 1
    with pytest.raises(DataError, match="nothing to show in elbo; it has walk"):
        plot_panels(walk, "elbo")


def test_arviz_has_the_walkers_alone(walk):
    pytest.importorskip("arviz")
    container = fastvi.to_arviz(walk)
    groups = container.groups
    names = {name.strip("/") for name in (groups() if callable(groups) else groups)}
    assert {"posterior", "sample_stats", "constant_data"} <= names
    assert not {"variational", "optimization"} & names
    posterior = container["posterior"]
    burn = walk.walk_burn_in
    np.testing.assert_array_equal(posterior["llc"].values, walk.walk_llc[:, burn:])
    assert posterior.attrs["method"] == "sample"
    assert "khat" not in posterior.attrs
    assert "elbo" not in posterior.attrs


def test_tensorboard_has_the_walkers(walk, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_events(walk, tmp_path)
    mean, walker = (
        reader.EventAccumulator(str(folder)) for folder in (tmp_path, tmp_path / "walker_7")
    )
    mean.Reload()
    walker.Reload()
    events = walker.Scalars("vi/walk_llc")
    np.testing.assert_allclose([event.value for event in events], walk.walk_llc[7], rtol=1e-6)
    assert [event.step for event in events[:2]] == [3, 7]
    assert mean.Scalars("vi/llc")[0].value == pytest.approx(walk.llc, rel=1e-6)
    assert mean.Tags()["images"] == ["vi/walk"]
    assert "vi/khat" not in mean.Tags()["scalars"]


def test_what_needs_a_q_says_the_way_out(walk, tmp_path):
    loaded = LLCEstimate.load(walk.save(tmp_path))
    for result in (walk, loaded):
        for ask in (
            lambda one: one.q,
            fastvi.correct,
            lambda one: fastvi.llc_on(one, (DATA,)),
            lambda one: fastvi.example_losses(one, (DATA,)),
        ):
            with pytest.raises(DataError, match="is a walk from the localizer") as caught:
                ask(result)
            assert "larger budget" in str(caught.value)
            assert "sampler={'start': 'fit'}" in str(caught.value)


def test_tables_have_dashes_for_q(walk, fit):
    row = describe(walk)
    assert (row["q alone"], row["elbo"], row["k-hat"]) == ("-", "-", "-")
    assert row["llc"] == walk.llc_text
    assert "-" not in (describe(fit)["elbo"], describe(fit)["k-hat"])


def test_figures_of_runs_leave_out_the_elbo_of_walks(walk, fit):
    assert len(draw_comparison([("a", walk), ("b", walk)]).axes) == 1
    _, elbo = draw_comparison([("a", walk), ("b", fit)]).axes
    assert len(elbo.lines) == 2  # the fit's: its mean and its end
    walked, fitted = (outcome_of(one, "").numbers for one in (walk, fit))
    assert len(draw_sweep([({"seed": 0}, walked), ({"seed": 1}, walked)]).axes) == 2
    assert len(draw_sweep([({"seed": 0}, walked), ({"seed": 1}, fitted)]).axes) == 3


def test_the_demo_compares_a_walk_with_exact_values_without_an_elbo(walk):
    header, row = comparison(walk, Exact(llc=0.25, log_z=1.0)).splitlines()
    assert header.split()[-2:] == ["relative", "error"]
    assert row.split()[0] == "llc"


def test_the_status_line_of_a_walk():
    stream = io.StringIO()
    StatusLine(stream)(Progress("walk", 1500, 20000, 0.25))
    assert "fastvi: walk 8 % of the budget, llc 0.25 [" in stream.getvalue()


def test_the_status_line_says_error_and_time_left(monkeypatch):
    stream, clock = io.StringIO(), iter([0.0, 10.0, 30.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    line = StatusLine(stream)
    told = []
    tell = tell_sampling(told.append, "walk", 1, 1e6, 0.02)
    tell(1000, 40.0, 8.0)  # ten times the error that is wanted: a hundred times the work
    tell(21_000, 40.0, 1.6)  # twice: four times
    assert [one.expected for one in told] == pytest.approx([100_000, 84_000])
    for one in told:
        line(one)
    first, second = stream.getvalue().splitlines()
    assert first == "fastvi: walk <1 % of the budget, llc 40.0 ± 8.0 [10 s]"
    # 20 s took 20,000 of them, and 63,000 are left
    assert second == "fastvi: walk 2 % of the budget, llc 40.0 ± 1.6, 63 s left [30 s]"
    assert len(second) <= 80


MODEL = """
import jax.numpy as jnp
import numpy as np


def target():
    data = np.random.default_rng(0).normal(size=(256, 6)).astype(np.float32)
    return (
        lambda w, b: 0.5 * jnp.mean(jnp.sum((w - b[0]) ** 2, -1)),
        jnp.zeros(6),
        (data - data.mean(axis=0),),
    )
"""


def test_the_command_line_walks_and_keeps_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "walk_model.py").write_text(MODEL)
    (tmp_path / "walk.yaml").write_text("budget: 20000\nsampler: {start: localizer}\n")
    args = ["--config", "walk.yaml", "--nbeta", "5", "--localization", "50", "--out", "run"]
    assert cli.main(["llc", "walk_model:target", *args]) == 0
    result = LLCEstimate.load("run")
    assert not result.has_fit
    assert result.summary() in capsys.readouterr().out
    assert {"report.html", "traces.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert cli.main(["report", "run"]) == 0
    assert cli.main(["compare", "run", "--out", "compare.png"]) == 0
    assert (tmp_path / "compare.png").read_bytes()[1:4] == b"PNG"
