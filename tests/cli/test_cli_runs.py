"""The commands on somebody's model: llc, report, compare, sweep."""

import csv
import json
import os
import re
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from fastvi import ConfigError, DataError, LLCEstimate, NonFiniteError
from fastvi.cli import sweep_cells, sweep_round
from fastvi.cli.sweep import read_shard
from fastvi.cli.table import format_table
from fastvi.cli.target import load
from fastvi.demos.quadratic import exact_values
from fastvi.results import files, resume
from fastvi.results.runs import read_record, read_settings
from tests.support.command_line import run

MODEL = """
import jax.numpy as jnp
import numpy as np

from fastvi.demos.quadratic import make_regression, squared_error


def target():
    center, data = make_regression(0, np.geomspace(1.0, 0.1, 4), 50)
    return squared_error, center, data


def fails():
    raise RuntimeError("no such file: weights.npz")


def wrong():
    return 3


CONSTANT = 4
"""
FAST = [
    "--set",
    "M=1",
    "r=0",
    "steps=60",
    "--set",
    "method=variational",
    "early_stop=false",
    "eval_samples=256",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "cli_model.py").write_text(MODEL)
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(model, monkeypatch):
    monkeypatch.chdir(model)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def finished(model):
    """One run of `fastvi llc`, in the folder of the model."""
    context = pytest.MonkeyPatch()
    context.chdir(model)
    context.setattr(sys, "path", [*sys.path])
    found = run(["llc", "cli_model:target", "--localization", "2", "--num-chains", "2", *FAST])
    context.undo()
    return found


def test_llc_meets_the_exact_value(finished, model):
    status, text, errors = finished
    assert status == 0, errors
    result = LLCEstimate.load(model / "runs" / "cli_model-target")
    exact = exact_values(np.geomspace(1, 0.1, 4), result.nbeta, 2.0).llc
    assert result.llc == pytest.approx(exact, rel=0.02)
    assert result.summary() in text
    assert (result.config.M, result.config.r, result.config.steps) == (1, 0, 60)
    assert "report.html" in text


def test_a_run_folder_is_redone(finished, model):
    del finished
    folder = model / "runs" / "cli_model-target"
    status, text, _ = run(["llc", str(folder), "--trust", "--quiet"])
    again = LLCEstimate.load(model / "runs" / "cli_model-target-redo")
    first = LLCEstimate.load(folder)
    assert status == 0
    assert re.fullmatch(r"llc \S+ ± \S+  \S+-redo\n", text)
    assert again.llc == first.llc  # the same programs in the same process: the same bits
    assert (
        read_record(folder).origin == read_record(model / "runs" / "cli_model-target-redo").origin
    )
    assert not list((model / "runs").glob(".*"))


def test_report_and_compare(finished, model):
    del finished
    folder = model / "runs" / "cli_model-target"
    status, text, _ = run(["report", str(folder), "--out", str(model / "page.html")])
    assert status == 0
    assert text.startswith("llc ")
    assert (model / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    status, text, _ = run(
        ["compare", str(folder), str(folder), "--out", str(model / "compare.png")]
    )
    lines = text.splitlines()
    assert status == 0
    assert lines[0].split()[:2] == ["run", "llc"]
    assert lines[1] == lines[2]
    assert (model / "compare.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["llc", "absent_module:target"], "No module named 'absent_module'"),
        (["llc", "cli_model"], "TARGET must be module:function"),
        (["llc", "cli_model:nothing"], "cli_model has no function 'nothing'"),
        (["llc", "cli_model:CONSTANT"], "cli_model has no function 'CONSTANT'"),
        (["llc", "cli_model:fails"], "RuntimeError: no such file: weights.npz"),
        (["llc", "cli_model:wrong"], "must return (loss_fn, params, data); got int"),
        (["llc", "cli_model:target", "--set", "M"], "--set takes NAME=VALUE"),
        (["llc", "cli_model:target", "--set", "stepz=3"], "did you mean 'steps'?"),
        (["llc", "."], "run.json is missing"),
        (["report", "."], "result.json is missing"),
        (["compare"], "one run folder or more"),
        (["sweep", "--config", "absent.yaml"], "must be the YAML file of a sweep"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(args, message):
    status, _, errors = run(args)
    assert status == 2
    assert errors.startswith("fastvi: error: ")
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "must name a target and a grid"),
        ({"target": "cli_model:target", "grid": {"gama": [1]}}, "did you mean 'gamma'?"),
        ({"target": "cli_model:target", "grid": {"M": [1]}, "gird": 1}, "unknown entry 'gird'"),
        ({"target": "cli_model:target", "grid": {"M": [0]}}, "M must be an integer >= 1"),
    ],
)
def test_a_wrong_sweep_is_refused_before_it_runs(entries, message, tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(entries))
    status, _, errors = run(["sweep", "--config", str(tmp_path / "sweep.yaml")])
    assert status == 2
    assert message in errors


def test_what_any_run_of_a_sweep_needs_is_asked_for_before_the_first(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    entries = {"target": "cli_model:target", "grid": {"tensorboard": [False, True]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(entries))
    status, _, errors = run(["sweep", "--config", str(tmp_path / "sweep.yaml")])
    assert status == 2
    assert 'pip install "fastvi[tensorboard]"' in errors


def test_an_interrupted_sweep_goes_on(model, monkeypatch, tmp_path):
    base = {
        "r": 0,
        "M": 1,
        "steps": 60,
        "method": "variational",
        "early_stop": False,
        "eval_samples": 256,
    }
    grid = {"gamma": [0.5, 2.0], "nbeta": [5.0, 10.0]}
    sweep = {
        "target": "cli_model:target",
        "out": str(tmp_path / "out"),
        "num_chains": 2,
        "base": base,
        "grid": grid,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    estimate, calls = sweep_cells.estimate_origin, []

    def interrupted(problem, origin, *args, **options):
        calls.append((origin.localization, origin.nbeta))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return estimate(problem, origin, *args, **options)

    monkeypatch.setattr(sweep_cells, "estimate_origin", interrupted)
    args = ["sweep", "--config", str(tmp_path / "sweep.yaml"), "--quiet"]
    assert run(args)[0] == 130
    assert not (tmp_path / "out" / "table.csv").exists()
    status, text, errors = run(args)
    assert status == 0, errors
    assert calls == [(0.5, 5), (0.5, 10), (2, 5), (2, 5), (2, 10)]
    with (tmp_path / "out" / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["gamma"], row["nbeta"]) for row in rows] == [
        ("0.5", "5"),
        ("0.5", "10"),
        ("2", "5"),
        ("2", "10"),
    ]
    for row in rows:
        exact = exact_values(np.geomspace(1, 0.1, 4), float(row["nbeta"]), float(row["gamma"])).llc
        assert float(row["llc"].split()[0]) == pytest.approx(exact, rel=0.05)
    assert len(text.splitlines()) == 5
    assert (tmp_path / "out" / "sweep.png").read_bytes()[1:4] == b"PNG"
    origin = json.loads(
        (tmp_path / "out" / "gamma=0.5,nbeta=5" / "run.json").read_text(encoding="utf-8")
    )
    assert origin["localization"] == 0.5


def test_shards_of_a_sweep_fill_one_table(finished, model, monkeypatch, tmp_path):
    result = LLCEstimate.load(model / "runs" / "cli_model-target")
    base = {"r": 0, "M": 1, "steps": 20, "method": "variational", "early_stop": False}
    entries = {
        "target": "cli_model:target",
        "out": str(tmp_path / "out"),
        "num_chains": 1,
        "base": base | {"eval_samples": 16},
        "grid": {"seed": [0, 1, 2]},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(entries))
    calls = []

    def counted(problem, origin, config, folder, **options):
        calls.append(origin.seed)
        # while a run is held, another process leaves it alone, and a third takes the rest
        if len(calls) < 3:
            assert run([*args, "--shard", f"{origin.seed + 1}/3"])[0] == 0
        return result

    args = ["sweep", "--config", str(tmp_path / "sweep.yaml"), "--quiet"]
    monkeypatch.setattr(sweep_cells, "estimate_origin", counted)
    figure = SimpleNamespace(savefig=lambda path, dpi: path.write_bytes(b"figure"))
    monkeypatch.setattr(sweep_round, "draw_sweep", lambda results, steps: figure)

    def table():
        with (tmp_path / "out" / "table.csv").open(encoding="utf-8") as file:
            return [(row["seed"], row["findings"] == "no run yet") for row in csv.DictReader(file)]

    for name, value in {"ID": 5, "MIN": 3, "STEP": 2, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert run([*args, "--shard", "slurm"])[0] == 0
    # the second of two shards, then in its estimate the second and the first of three
    assert calls == [1, 2, 0]
    assert table() == [("0", False), ("1", False), ("2", False)]
    assert run(args)[0] == 0
    assert calls == [1, 2, 0]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/2/3", "slurm"])
def test_a_wrong_shard_is_refused(shard):
    with pytest.raises(ConfigError, match="--shard"):
        read_shard(shard, {"SLURM_ARRAY_TASK_ID": "1"})


def test_a_failed_run_of_a_sweep_is_told(model, monkeypatch, tmp_path):
    def broken(*args, **options):
        raise NonFiniteError("NaN appeared. Check the loss.")

    monkeypatch.setattr(sweep_cells, "estimate_origin", broken)
    sweep = {"target": "cli_model:target", "out": str(tmp_path / "out"), "grid": {"seed": [0]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    status, text, _ = run(["sweep", "--config", str(tmp_path / "sweep.yaml")])
    assert status == 1
    assert "failed, NaN appeared" in text


@pytest.fixture
def signals(monkeypatch):
    """Send a signal to this process while a chunk runs, once for each one that is put here."""
    save, waiting = resume.StageFile.save, []

    def signal_and_save(self, content, is_last):
        save(self, content, is_last)
        if waiting and not is_last:
            os.kill(os.getpid(), waiting.pop())

    monkeypatch.setattr(resume.StageFile, "save", signal_and_save)
    # a shell lets what it starts in the background ignore SIGINT
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield waiting
    signal.signal(signal.SIGINT, handler)


def test_a_run_that_is_stopped_goes_on(signals, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    args = ["llc", "cli_model:target", "--num-chains", "1", *FAST, "--set", "lr=0.02"]
    args[args.index("steps=60")] = "steps=400"

    def stopped(number):
        signals.append(number)
        return run([*args, "--out", str(tmp_path / "run")])

    status, text, errors = stopped(signal.SIGTERM)
    assert (status, signals) == (143, [])
    assert "fastvi: terminated: the same command goes on from here" in errors
    assert "progress" not in text
    # no run that anything could take for one, and no folder of somebody else's
    assert [path.name for path in (tmp_path / "run").iterdir()] == [files.PROGRESS]
    with pytest.raises(DataError, match=r"run\.json is missing"):
        read_record(tmp_path / "run")
    status, text, errors = stopped(signal.SIGINT)
    assert status == 130
    assert "fastvi: interrupted: the same command goes on from here" in errors
    assert f"progress       goes on from the progress in {tmp_path / 'run'}" in text
    status, text, _ = run([*args, "--out", str(tmp_path / "run")])
    assert status == 0
    assert text.count("goes on from the progress") == 1
    assert "begins anew" not in text
    assert not (tmp_path / "run" / files.PROGRESS).exists()
    result, origin = LLCEstimate.load(tmp_path / "run"), read_record(tmp_path / "run").origin
    whole = sweep_cells.estimate_origin(
        load("cli_model:target"),
        origin,
        read_settings(tmp_path / "run"),
        tmp_path,
        progress=False,
        tell=print,
    )
    np.testing.assert_array_equal(result.traces["elbo"], whole.traces["elbo"])
    assert (result.llc, result.work) == (whole.llc, whole.work)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    # other settings, in the folder of the finished run and on progress of these
    stopped(signal.SIGTERM)
    args += ["--seed", "1"]
    status, text, _ = stopped(signal.SIGTERM)
    assert status == 143
    assert re.search("progress       begins anew: .* progress of another fit: key was", text)
    assert "goes on from" in stopped(signal.SIGTERM)[1]
    assert (
        read_record(tmp_path / "run").origin.seed == 0
    )  # that of the finished run, which is whole


def test_a_cell_that_is_stopped_goes_on(signals, tmp_path, monkeypatch):
    base = {"r": 0, "M": 1, "steps": 400, "method": "variational", "early_stop": False}
    entries = {
        "target": "cli_model:target",
        "out": str(tmp_path / "out"),
        "num_chains": 1,
        "base": base | {"eval_samples": 16},
        "grid": {"seed": [0]},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(entries))
    args = ["sweep", "--config", str(tmp_path / "sweep.yaml")]
    figure = SimpleNamespace(savefig=lambda path, dpi: path.write_bytes(b"figure"))
    monkeypatch.setattr(sweep_round, "draw_sweep", lambda results, steps: figure)
    signals.append(signal.SIGTERM)
    assert run(args)[0] == 143
    found, text, _ = run(args)
    assert found == 0
    assert f"seed=0: goes on from the progress in {tmp_path / 'out' / 'seed=0'}" in text
    assert "run again" not in text
    assert not (tmp_path / "out" / "seed=0" / files.PROGRESS).exists()


def test_tables_fit_a_terminal():
    rows = [
        {"run": "a" * 30, "llc": "1.0", "findings": "word " * 30},
        {"run": "b", "llc": "10.0", "findings": "-"},
    ]
    lines = format_table(rows)
    assert all(len(line) <= 80 for line in lines)
    assert lines[1].endswith("…")
    assert lines[2] == f"{'b':<30}  10.0  -"
