import dataclasses
import io
import json
import re
import sys
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest

import fastvi
from fastvi import ConfigError, DataError, LLCEstimate, NonFiniteError, VIConfig, cli
from fastvi._numbers import with_error
from fastvi._optional import MissingExtraError, import_optional
from fastvi.demos.quadratic import exact_values, make_regression
from fastvi.results.report.panels import batch_llc
from fastvi.results.report.plots import plot_traces
from tests.support.command_line import run

SMALL_FIT = "M: 1\nr: 0\neval_samples: 32\nwhitening_mode: none\nmethod: variational\n"
DIGITS = [
    "demo",
    "digits",
    "--hidden",
    "4",
    "--train-steps",
    "300",
    "--steps",
    "100",
    "--num-chains",
    "2",
]
QUADRATIC = ["demo", "quadratic", "--dim", "8", "--num-data", "200", "--batch-size", "200"]
QUADRATIC += ["--steps", "100", "--num-chains", "2", "--seed", "3", "--localization", "0.5"]
QUICK = {"digits": ["demo", "digits", "--train-steps", "1"], "quadratic": ["demo", "quadratic"]}


def run_demo(args, folder):
    (folder / "small.yaml").write_text(SMALL_FIT)
    out = folder / "deep" / "run"
    status, text, errors = run([*args, "--out", str(out), "--config", str(folder / "small.yaml")])
    assert status == 0, errors
    return SimpleNamespace(
        folder=out,
        text=text,
        json=json.loads((out / "result.json").read_text(encoding="utf-8")),
        result=LLCEstimate.load(out),
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return run_demo(DIGITS, tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def quadratic(tmp_path_factory):
    return run_demo(QUADRATIC, tmp_path_factory.mktemp("quadratic"))


@pytest.fixture(params=["digits", "quadratic"])
def demo(request):
    return request.getfixturevalue(request.param)


def test_a_demo_prints_the_summary_of_what_it_saved(demo):
    assert demo.result.summary() in demo.text
    printed = re.search(r"^llc +(\S+ ± \S+) ", demo.text, re.M)
    assert printed is not None
    assert printed[1] == demo.result.llc_text
    assert abs(float(printed[1].split()[0]) - demo.json["llc"]) <= 0.5 * demo.json["llc_sem"]
    assert demo.json["llc"] == pytest.approx(np.mean(demo.json["llc_per_chain"]))


def test_a_demo_honours_its_options(demo):
    assert demo.result.traces["elbo"].shape == (2, 100)
    asked = {"M": 1, "r": 0, "eval_samples": 32, "method": "variational", "steps": 100}
    assert {name: getattr(demo.result.config, name) for name in asked} == asked
    assert demo.result.config.batch_size == demo.json["config"]["batch_size"] <= demo.result.n_data


def test_options_reach_the_problem(digits, quadratic):
    assert digits.result.dim == 64 * 4 + 4 + 4 * 10 + 10
    assert digits.result.n_data == 1797
    assert quadratic.result.dim == 8
    assert quadratic.result.n_data == 200
    assert quadratic.result.localization == 0.5


def test_the_run_folder_is_complete_and_read_again(demo, tmp_path):
    names = {"result.json", "traces.npz", "config.yaml", "traces.png", "report.html", "run.json"}
    assert {path.name for path in demo.folder.iterdir()} == names
    for name in names:
        assert str(demo.folder / name) in demo.text
    assert VIConfig.create(demo.folder / "config.yaml") == demo.result.config
    again = LLCEstimate.load(demo.result.save(tmp_path / "again"))
    assert (tmp_path / "again" / "result.json").read_bytes() == (
        demo.folder / "result.json"
    ).read_bytes()
    for name, trace in demo.result.traces.items():
        np.testing.assert_array_equal(again.traces[name], trace)


def test_the_figure_shows_something(demo):
    pixels = matplotlib.image.imread(demo.folder / "traces.png")
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 1200
    for panel in np.array_split(pixels[..., :3], 2, axis=0):
        for half in np.array_split(panel, 2, axis=1):
            assert 0.01 < np.mean(half.min(axis=-1) < 0.95) < 0.6


def test_digits_reports_the_training(digits):
    printed = re.search(r"loss (\S+) nats, accuracy (\S+) %", digits.text)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(digits.json["init_loss"], rel=5e-3)
    assert float(printed[2]) > 85


def test_quadratic_meets_the_exact_values(quadratic):
    center, (inputs, targets) = make_regression(3, np.geomspace(1, 0.01, 8), 200)
    inputs, targets = np.asarray(inputs, float), np.asarray(targets, float)
    np.testing.assert_allclose(inputs @ np.asarray(center, float), targets, atol=1e-5)
    nbeta, gamma = 200 / np.log(200), 0.5
    scaled = nbeta * inputs.T @ inputs / 200
    precision = scaled + gamma * np.eye(8)
    expected = {
        "llc": 0.5 * np.trace(np.linalg.solve(precision, scaled)),
        "elbo": 4 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1],
    }
    rows = re.findall(
        r"^(llc|elbo) +(\S+) ± (\S+) +(?:llc|log Z) (\S+) +(\S+) %$", quadratic.text, re.M
    )
    assert [row[0] for row in rows] == ["llc", "elbo"]
    for name, estimate, sem, exact, error in rows:
        estimate, sem, exact, error = float(estimate), float(sem), float(exact), float(error)
        assert exact == pytest.approx(expected[name], rel=1e-4)
        assert estimate == pytest.approx(exact, rel=0.01)
        assert error == pytest.approx(100 * (estimate - exact) / abs(exact), abs=0.02)
        assert 0 < sem < 0.01 * abs(exact)


def test_batch_llc_is_the_llc_of_single_steps(quadratic):
    values, result = batch_llc(quadratic.result), quadratic.result
    exact = exact_values(np.geomspace(1, 0.01, 8), result.nbeta, result.localization).llc
    assert values.shape == result.traces["elbo"].shape
    assert abs(values.mean() - exact) < 5 * values.std() / np.sqrt(values.size)


def test_plot_panels(quadratic):
    result = quadratic.result
    titles = [axes.get_title(loc="left") for axes in plot_traces(result).axes]
    assert [title.split()[0].rstrip(":") for title in titles] == [
        "ELBO",
        "llc",
        "virial",
        "leading",
    ]
    without = dataclasses.replace(result, curvature=result.curvature._replace(spectrum=[]))
    assert plot_traces(without).axes[3].get_title(loc="left") == "learning rate"


def test_plot_limits_ignore_outliers_and_survive_nan(quadratic):
    result = quadratic.result
    elbo = np.array(result.traces["elbo"])
    low, high = plot_traces(result).axes[0].get_ylim()
    elbo[:, 0] = -1e9
    wild = dataclasses.replace(result, traces={**result.traces, "elbo": elbo})
    wild_low, wild_high = plot_traces(wild).axes[0].get_ylim()
    assert wild_high - wild_low < 2 * (high - low)
    nothing = {name: np.full_like(trace, np.nan) for name, trace in result.traces.items()}
    broken = dataclasses.replace(result, llc=np.nan, elbo=np.nan, traces=nothing)
    plot_traces(broken).savefig(io.BytesIO())


def test_plot_without_matplotlib_names_the_extra(quadratic, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=re.escape('pip install "fastvi[plots]"')):
        plot_traces(quadratic.result)


def test_version():
    assert run(["--version"]) == (0, f"fastvi {fastvi.__version__}\n", "")


def test_unknown_options_name_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "digits", "--stepz", "3"])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["demo", "digits"], ["llc"], ["report"], ["compare"], ["sweep"]]
)
def test_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert " ".join(["usage: fastvi", *command]) in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("demo_name", "options", "message"),
    [
        ("digits", ["--steps", "0"], "steps must be an integer >= 1; got 0"),
        ("digits", ["--hidden", "0"], "hidden must be 1 or more; got 0."),
        ("digits", ["--train-lr", "-1"], "train_lr must be a positive number; got -1.0."),
        ("digits", ["--seed", "-1"], "seed must be an integer from 0"),
        ("digits", ["--config", "absent.yaml"], "absent.yaml"),
        ("quadratic", ["--num-chains", "0"], "num_chains must be 1 or more; got 0."),
        ("quadratic", ["--localization", "nan"], "localization must be a number from 0; got nan."),
        ("quadratic", ["--condition", "0.5"], "condition must be a number from 1; got 0.5."),
        (
            "quadratic",
            ["--num-data", "10"],
            "num_data must be at least 2 and at least dim; got 10.",
        ),
        ("quadratic", ["--batch-size", "2000"], "batch_size must be <= n_data=1000; got 2000"),
        ("quadratic", ["--out", "a-file"], "a-file"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_2(demo_name, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    expect_error(QUICK[demo_name] + options, message)


@pytest.mark.parametrize("error", [ConfigError, DataError, NonFiniteError, fastvi.UnavailableError])
def test_an_error_of_the_estimate_is_one_line_and_exit_2(error, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise error("the reason,\nand the fix.")

    monkeypatch.setattr("fastvi.demos.base.estimate_llc", refuse)
    expect_error(
        [*QUICK["quadratic"], "--out", str(tmp_path)], "fastvi: error: the reason, and the fix.\n"
    )


def test_an_unexpected_error_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr("fastvi.demos.base.estimate_llc", fail)
    with pytest.raises(ZeroDivisionError):
        run([*QUICK["quadratic"], "--out", str(tmp_path)])


def test_interruption(tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvi.demos.base.estimate_llc", interrupt)
    assert run([*QUICK["quadratic"], "--out", str(tmp_path)])[0] == 130


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("tyro", 'the command line needs tyro: pip install "fastvi[cli]"'),
        ("yaml", 'writing config.yaml needs PyYAML: pip install "fastvi[cli]"'),
        ("sklearn", 'the digits demo needs scikit-learn: pip install "fastvi[cli]"'),
        ("matplotlib", 'plotting needs matplotlib: pip install "fastvi[plots]"'),
    ],
)
def test_a_missing_package_names_its_extra(module, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    expect_error([*QUICK["digits"], "--out", str(tmp_path)], f"fastvi: error: {message}\n")


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_dependency") as caught:
        import_optional("broken_package", extra="cli", distribution="broken", purpose="this")
    assert not isinstance(caught.value, MissingExtraError)


@pytest.mark.parametrize(
    ("value", "sem", "text"),
    [
        (22.2964, 0.0731, "22.296 ± 0.073"),
        (111.68, 2.31, "111.7 ± 2.3"),
        (1234.5, 45.6, "1234 ± 46"),
        (1.5, 0.0, "1.5 ± 0"),
        (float("nan"), 1.0, "nan ± 1"),
    ],
)
def test_with_error_shows_two_digits_of_the_error(value, sem, text):
    assert with_error(value, sem) == text


def expect_error(args, message):
    status, _, errors = run(args)
    assert status == 2
    assert errors.startswith("fastvi: error: ")
    assert errors.count("\n") == 1
    assert message in errors
