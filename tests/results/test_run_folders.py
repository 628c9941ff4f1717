"""The number survives.

The folder is had first, written before anything is printed, and never somebody else's.
"""

import contextlib
import dataclasses
import errno
import io
import os
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest
import yaml

import fastvi
from fastvi import ConfigError, DataError, LLCEstimate, NonFiniteError, cli
from fastvi.cli import llc as llc_module
from fastvi.cli import sweep_round
from fastvi.cli.sweep_plan import Cell
from fastvi.cli.target import load
from fastvi.fitting.protocols import Progress
from fastvi.results import files, runs
from fastvi.results.claim import LEASE_FILE, claimed
from fastvi.results.progress import StatusLine, reporting
from fastvi.results.runs import Origin, read_record, write_run
from fastvi.results.terminal import spell, write_text

MODEL = """
import sys
from pathlib import Path

import jax.numpy as jnp

SCALE = 1.0


def target():
    Path("loaded").touch()
    loss = lambda w, batch: SCALE * 0.5 * jnp.sum(w**2) * jnp.mean(batch[0])
    return loss, jnp.zeros(3), (jnp.ones((20, 1)),)


def leaves():
    sys.exit(0)


def deep():
    return leaves_below()


def leaves_below():
    raise LookupError("no weights\\nin the store")


def loss_leaves():
    return lambda w, batch: sys.exit(0), jnp.zeros(3), (jnp.ones((20, 1)),)
"""
OPTIONS = {
    "method": "variational",
    "steps": 100,
    "M": 1,
    "r": 0,
    "eval_samples": 16,
    "num_chains": 1,
    "progress": False,
}
ORIGIN = Origin("m:f", 0, 1.0, None, None)


def quadratic(w, batch):
    return 0.5 * jnp.sum(w**2) * jnp.mean(batch[0])


@pytest.fixture(scope="module")
def result():
    return fastvi.estimate_llc(quadratic, jnp.zeros(3), (jnp.ones((20, 1)),), **OPTIONS)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A current folder with a model in it; figures and pages are left out, which take seconds."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "folder_model.py").write_text(MODEL)
    drawing = type("Drawing", (), {"savefig": lambda self, path, dpi: path.write_bytes(b"PNG")})()
    monkeypatch.setattr(runs, "plot_traces", lambda result: drawing)
    monkeypatch.setattr(sweep_round, "draw_sweep", lambda *results: drawing)
    monkeypatch.setattr(runs, "write_report", lambda result, path: path.write_text("page") and path)
    yield tmp_path / "here"
    sys.modules.pop("folder_model", None)


@pytest.fixture
def estimated(result, monkeypatch):
    """Let `fastvi llc` and `fastvi sweep` find an estimate at once."""
    calls = []

    def at_once(*problem, localization, key, nbeta, **options):
        calls.append((localization, key))
        return dataclasses.replace(
            result, localization=localization, nbeta=nbeta or result.nbeta, fitted=object()
        )

    monkeypatch.setattr(llc_module, "estimate_llc", at_once)
    return calls


def run(*args, out=None):
    out, err = io.StringIO() if out is None else out, io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(arg) for arg in args])
    return status, out.getvalue() if isinstance(out, io.StringIO) else "", err.getvalue()


def llc(*args, **streams):
    return run("llc", "folder_model:target", *args, **streams)


# the folder


@pytest.mark.parametrize("out", ["config.yaml", "config.yaml/below", "x" * 300, "nul\0", "link"])
def test_a_folder_that_cannot_be_had_is_refused_before_the_work(out, place, estimated):
    (place / "config.yaml").write_text("mine")
    (place / "link").symlink_to("nowhere/at/all")
    status, _, errors = llc("--out", out)
    assert status == 2
    assert "cannot be made: " in errors
    assert "Name another one with --out" in " ".join(errors.split())
    assert not (place / "loaded").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(place, monkeypatch):
    def denied(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("fastvi.results.claim.os.open", denied)
    status, _, errors = llc("--out", "new/deep")
    assert status == 2
    assert "'new/deep' cannot be written: [Errno 13] Permission denied" in errors
    assert not (place / "loaded").exists()
    assert not (place / "new").exists()


@pytest.mark.parametrize("out", ["project", ".", "saved", "of-a-sweep"])
def test_somebodys_folder_is_left_as_it_is(out, place, estimated, result):
    (place / "project" / "diagnostics" / "tb").mkdir(parents=True)
    (place / "project" / "config.yaml").write_text("mine")
    (place / "project" / "run.json").write_text('{"format": "another program"}')
    result.save(place / "saved")
    (place / "of-a-sweep").mkdir()
    (place / "of-a-sweep" / "run.json").write_text('{"format": "fastvi sweep", "version": 1}')
    before = {path: path.is_dir() or path.read_bytes() for path in place.rglob("*")}
    status, _, errors = llc("--out", out)
    assert status == 2
    assert "which would be written over. Name an empty or a new folder" in " ".join(errors.split())
    assert {path: path.is_dir() or path.read_bytes() for path in place.rglob("*")} == before


@pytest.mark.parametrize("out", ["new/deep", "empty", "."])
def test_a_new_or_an_empty_folder_is_filled_and_a_run_replaced(out, place, estimated, monkeypatch):
    (place / "empty").mkdir()
    monkeypatch.setenv("PYTHONPATH", "")
    if out == ".":
        monkeypatch.setattr(sys, "path", [*sys.path, str(place)])
        monkeypatch.chdir(place / "empty")
    assert llc("--out", out, "--seed", 1)[0] == 0
    assert read_record(out).origin.seed == 1
    assert llc("--out", out, "--seed", 2)[0] == 0
    assert read_record(out).origin.seed == 2
    assert sorted(os.listdir(out)) == sorted([*runs.CONTENTS, *(["loaded"] if out == "." else [])])


def test_a_run_folder_is_redone_from_within(place, estimated, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(place)])
    assert llc("--out", "a")[0] == 0
    monkeypatch.chdir(place / "a")
    assert run("llc", ".", "--trust")[0] == 0
    assert read_record(place / "a-redo").origin == read_record(place / "a").origin


def test_what_failed_leaves_no_folder(place):
    assert run("llc", "folder_model:nothing", "--out", "new/deep")[0] == 2
    assert not (place / "new").exists()


def test_two_at_once_are_told(place):
    with claimed("run") as claim:
        with pytest.raises(
            ConfigError, match=rf"another fastvi \('process {os.getpid()} on .*'\)\. Name another"
        ):
            claimed("run").__enter__()
        assert (claim.folder / LEASE_FILE).exists()
    with claimed("run"):
        pass
    assert not (place / "run").exists()


def test_the_lock_of_a_process_that_died_is_none(place):
    (place / "run").mkdir()
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\nimport importlib.util as u, "
        "types\npackage = types.ModuleType('fastvi'); package.__path__ = [sys.argv[1] + "
        "'/fastvi']\nsys.modules['fastvi'] = package\nfrom fastvi.results.claim import "
        "claimed\nheld = claimed('run'); held.__enter__(); print('held', flush=True); input()"
    )
    root = os.path.dirname(os.path.dirname(fastvi.__file__))
    command = [sys.executable, "-c", program, root]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"process {process.pid} on "):
            claimed("run").__enter__()
        process.kill()
        process.wait()
    assert (place / "run" / LEASE_FILE).exists()
    with claimed("run"):
        pass
    assert not (place / "run" / LEASE_FILE).exists()


def test_links_are_replaced_not_followed(place, estimated):
    (place / "victim").write_text("precious")
    assert llc("--out", "run")[0] == 0
    for name in runs.CONTENTS:
        if name != "run.json":
            (place / "run" / name).unlink()
            (place / "run" / name).symlink_to(place / "victim")
    (place / "run" / "diagnostics").mkdir()
    (place / "run" / "diagnostics" / "tb").symlink_to(place)
    assert llc("--out", "run")[0] == 0
    assert (place / "victim").read_text() == "precious"
    assert not any(path.is_symlink() for path in (place / "run").rglob("*"))
    (place / "run" / "report.html").unlink()
    (place / "run" / "report.html").symlink_to(place / "victim")
    assert run("report", "run")[0] == 0
    assert (place / "victim").read_text() == "precious"
    (place / "run" / LEASE_FILE).symlink_to(place / "victim")
    assert llc("--out", "run")[0] == 2
    assert (place / "victim").read_text() == "precious"


# the writing


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_crash_leaves_the_old_run_the_new_one_or_a_refusal(stop, place, result, monkeypatch):
    write_run(result, place / "run", ORIGIN)
    other = dataclasses.replace(
        result, llc=result.llc + 1, traces={k: v + 1 for k, v in result.traces.items()}
    )
    calls, replace = [], os.replace

    def crash(*paths):
        calls.append(paths)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return replace(*paths)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", crash)
        write_run(other, place / "run", dataclasses.replace(ORIGIN, seed=1))
    assert state(place / "run") in ((0, result.llc), (1, other.llc), "refused")
    with claimed(place / "run"):
        write_run(other, place / "run", ORIGIN)
    assert state(place / "run") == (0, other.llc)


def state(folder):
    try:
        return read_record(folder).origin.seed, LLCEstimate.load(folder).llc
    except DataError as error:
        return (
            "refused"
            if re.search("not written to its end|is missing|does not belong", str(error))
            else str(error)
        )


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_the_end_keeps_the_number(place, estimated, monkeypatch, tmp_path):
    publish = files.publish
    monkeypatch.setattr(
        files, "publish", lambda s, f, n: full() if f.name == "run" else publish(s, f, n)
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, text, errors = llc("--out", "run")
    assert status == 1
    assert text.splitlines()[2].startswith("llc ")
    assert "could not be written to run ([Errno 28] No space left on device)" in errors
    refuge = re.search(r"It is in (\S+) instead", errors)[1]
    assert read_record(refuge).origin.target == "folder_model:target"
    monkeypatch.setattr(files, "publish", full)
    status, text, errors = llc("--out", "other", "--quiet")
    assert status == 1
    assert re.fullmatch(r"llc \S+ ± \S+  -\n", text)
    assert "what is printed is all" in errors


def test_any_error_of_the_writing_comes_after_the_number(place, estimated, monkeypatch):
    def broken(result):
        raise ZeroDivisionError

    monkeypatch.setattr(runs, "plot_traces", broken)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(ZeroDivisionError):
        cli.main(["llc", "folder_model:target"])
    assert "\nllc  " in out.getvalue()


# the printing


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


class Full(io.StringIO):
    def flush(self):
        full()


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {"broken": Broken, "full": Full, "closed": closed, "none": lambda: None}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_run_outlives_its_terminal(kind, place, estimated, monkeypatch):
    monkeypatch.setattr(sys, "stdout", STREAMS[kind]())
    monkeypatch.setattr(sys, "stderr", STREAMS[kind]())
    assert cli.main(["llc", "folder_model:target", "--out", "run"]) == 0
    assert LLCEstimate.load("run").llc > 0
    assert cli.main(["compare", "run"]) == 1  # which does nothing but print
    assert cli.main(["llc", "folder_model:nothing"]) == 2


def test_a_terminal_without_the_letters(place, estimated):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    assert llc("--out", "run", out=stream)[0] == 0
    assert re.search(rb"llc +[\d.]+ \+- [\d.]+ ", stream.buffer.getvalue())


@pytest.mark.parametrize(
    ("text", "encoding", "spelled"),
    [
        ("1 ± 2 … λβ", "ascii", "1 +- 2 ... lambdabeta"),
        ("1 ± 2 …", "latin-1", "1 +- 2 ..."),
        ("1 ± 2", "latin-1", "1 ± 2"),
        ("1 ± 2 … 木", "utf-8", "1 ± 2 … 木"),
        ("木", "cp1252", "?"),
        ("\ud800", "utf-8", "?"),
        ("±", "no such encoding", "+-"),
        ("±", None, "±"),
    ],
)
def test_letters_are_spelled(text, encoding, spelled):
    assert spell(text, encoding) == spelled


@pytest.mark.parametrize("kind", STREAMS)
def test_a_status_line_that_cannot_be_written_ends_nothing(kind, monkeypatch):
    monkeypatch.setattr(sys, "stderr", STREAMS[kind]())
    with reporting(True) as report:
        for stage in ("curvature", "fit", "evaluation"):
            report(Progress(stage, 1, 2, 3.0))
    assert write_text(STREAMS[kind](), "word") is not None


def test_a_status_line_is_ended_by_an_error():
    stream = io.StringIO()
    stream.isatty = lambda: True
    with contextlib.suppress(ZeroDivisionError), StatusLine(stream) as line:
        line(Progress("curvature", 1, 2, 3.0))
        raise ZeroDivisionError
    assert stream.getvalue().endswith("\r\x1b[K")


# whose code runs


def test_a_run_folders_code_runs_only_where_it_is_trusted(place, estimated):
    assert llc("--out", "run")[0] == 0
    (place / "loaded").unlink()
    (place / "sweep.yaml").write_text(yaml.safe_dump({"target": "run", "grid": {"seed": [1]}}))
    for args in (["llc", "run"], ["sweep"]):
        status, _, errors = run(*args)
        words = " ".join(errors.split())
        assert status == 2
        assert (
            f"asks for 'folder_model:target': {place / 'folder_model.py'} would be imported and run"
            in words
        )
        assert "--trust if you trust it" in words
        assert not (place / "loaded").exists()
    for args in (["llc", "run", "--trust"], ["sweep", "--trust"]):
        assert run(*args)[0] == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("..:x", "TARGET must be module:function"),
        (".m:f", "TARGET must be module:function"),
        ("m.:f", "TARGET must be module:function"),
        ("a:b:c", "TARGET must be module:function"),
        (":f", "TARGET must be module:function"),
        ("m:", "TARGET must be module:function"),
        ("m:f()", "TARGET must be module:function"),
        ("", "TARGET must be module:function"),
        ("folder_model.py", "Write a.b:f for the function f of the file a/b.py"),
        ("folder_model.py:target", "Write a.b:f for the function f of the file a/b.py"),
        ("./folder_model.py:target", "Write a.b:f for the function f of the file a/b.py"),
        ("absent:f", "No module named 'absent'. Run fastvi where absent can be imported"),
        ("folder_model.absent:f", "'folder_model' is not a package"),
        (
            "broken_name:f",
            "failed: NameError: name 'undefined' is not defined (broken_name.py:1 in <module>)",
        ),
        ("broken_syntax:f", "failed: SyntaxError:"),
        (
            "broken_import:f",
            "failed: ModuleNotFoundError: No module named 'absent_too' (broken_import.py:1 in",
        ),
        (
            "broken_exit:f",
            "failed: SystemExit: it called sys.exit(0) (broken_exit.py:1 in <module>)",
        ),
        ("broken_getattr:f", "failed: ValueError: f (broken_getattr.py:2 in __getattr__)"),
        (
            "folder_model:leaves",
            "failed: SystemExit: it called sys.exit(0) (folder_model.py:17 in leaves)",
        ),
        (
            "folder_model:deep",
            "LookupError: no weights (folder_model.py:25 in leaves_below < folder_model.py:21 in "
            "deep)",
        ),
        ("folder_model:loss_leaves", "the model called sys.exit(0) before there was an estimate"),
        ("random:f", "random.py goes before"),
        ("yaml:f", "__init__.py goes before"),
        ("sys:f", "goes before"),
    ],
)
def test_a_target_that_is_none_is_one_line_and_exit_2(target, message, place):
    for name in ("random", "yaml", "sys"):
        (place / f"{name}.py").write_text("f = None")
    (place / "broken_name.py").write_text("undefined")
    (place / "broken_syntax.py").write_text("def f(:")
    (place / "broken_import.py").write_text("import absent_too")
    (place / "broken_exit.py").write_text("import sys; sys.exit(0)")
    (place / "broken_getattr.py").write_text("def __getattr__(name):\n    raise ValueError(name)")
    path, loaded = [*sys.path], sys.modules["random"]
    status, _, errors = run("llc", target)
    assert (status, errors.count("\n")) == (2, 1)
    assert message in errors
    assert (sys.path, sys.modules["random"]) == (path, loaded)


def test_the_cause_of_a_failing_target_is_kept(place, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(DataError) as caught:
        load("folder_model:deep")
    assert isinstance(caught.value.__cause__, LookupError)
    assert sys.path[-1] == str(place)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "M=[1"], "--set takes values as YAML writes them; got 'M=[1'"),
        (["--set", "M=1", "--set", "M=2"], "--set gives M twice"),
        (
            ["--localization", "1", "--set", "gamma=2"],
            "gamma is given twice and differs: 2.0 in the config, 1.0 as argument",
        ),
        (["--seed", "-1"], "seed must be an integer >= 0; got -1"),
        (["--num-chains", "0"], "num_chains must be an integer >= 1; got 0"),
        (["--nbeta", "0"], "nbeta must be a finite number > 0; got 0.0"),
        (["--localization", "nan"], "localization must be a finite number >= 0; got nan"),
    ],
)
def test_options_are_checked_before_the_work(args, message, place):
    status, _, errors = llc(*args)
    assert status == 2
    assert message in errors
    assert not (place / "loaded").exists()


# sweeps


def sweep(place, out="out", **entries):
    out = out if isinstance(out, int) else str(place / out)
    given = {"target": "folder_model:target", "out": out, "grid": {"seed": [0, 1]}} | entries
    (place / "sweep.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return run("sweep")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"grid": [1]}, "grid must be a list for each setting; got [1]"),
        ({"grid": 3}, "grid must be a list for each setting; got 3"),
        ({"grid": {"M": []}}, "grid.M must list one value or more, all different; got []"),
        (
            {"grid": {"M": [1, 2, 1]}},
            "grid.M must list one value or more, all different; got 1 twice",
        ),
        ({"out": 5}, "out must be the name of a folder; got 5"),
        ({"target": ["m:f"]}, "target must be module:function; got ['m:f']"),
        ({"target": "..:x"}, "TARGET must be module:function"),
        ({"grid": {"seed": [1.9, 1]}}, "seed must be an integer >= 0; got 1.9"),
        ({"grid": {"seed": [True]}}, "seed must be an integer >= 0; got True"),
        ({"num_chains": 1.5}, "num_chains must be an integer >= 1; got 1.5"),
        ({"nbeta": -1}, "nbeta must be a finite number > 0"),
        (
            {"localization": 1, "grid": {"gamma": [1, 100]}},
            "localization at the top and gamma in the grid",
        ),
        ({"localization": 1, "base": {"gamma": 2}}, "localization at the top and gamma in base"),
        (
            {"base": {"gamma": 2}, "grid": {"localization": [1]}},
            "gamma in base and localization in the grid",
        ),
        ({"seed": 1}, "seed at the top and seed in the grid"),
        ({"nbeta": 1, "grid": {"nbeta": [2]}}, "nbeta at the top and nbeta in the grid"),
        (
            {"num_chains": 1, "grid": {"num_chains": [2]}},
            "num_chains at the top and num_chains in the grid",
        ),
        ({"base": {"M": 4}, "grid": {"M": [1, 2]}}, "M in base and M in the grid"),
    ],
)
def test_a_sweep_that_is_none_is_refused_before_it_runs(entries, message, place):
    status, _, errors = sweep(place, **entries)
    assert status == 2
    assert message in errors
    assert not (place / "loaded").exists()


def test_a_name_given_twice_is_refused(place):
    (place / "sweep.yaml").write_text(
        "target: folder_model:target\ngrid: {M: [1]}\ngrid: {M: [2]}\n"
    )
    status, _, errors = run("sweep")
    assert status == 2
    assert "'grid' is given twice" in errors


def test_a_sweep_keeps_what_the_same_target_computed(place, estimated):
    assert sweep(place)[0] == 0
    assert len(estimated) == 2
    status, text, _ = sweep(place, grid={"seed": [0, 1, 2]})
    assert (status, len(estimated)) == (0, 3)
    assert text.count("kept, llc ") == 2


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("SCALE = 1.0", "SCALE = 1e-3", "loss near w*"),
        ("jnp.sum(w**2)", "jnp.sum(w[:2]**2)", "loss near w*"),
        ("jnp.zeros(3)", "jnp.ones(3)", "params"),
        ("jnp.ones((20, 1))", "jnp.ones((21, 1))", "n_data"),
        ("jnp.ones((20, 1))", "2 * jnp.ones((20, 1))", "data"),
    ],
)
def test_a_sweep_runs_again_what_another_target_computed(old, new, named, place, estimated):
    assert sweep(place)[0] == 0
    (place / "folder_model.py").write_text(
        MODEL.replace(old, new) + "\n# another length, hence no cached bytecode\n"
    )
    sys.modules.pop("folder_model")
    status, text, _ = sweep(place)
    assert (status, len(estimated)) == (0, 4)
    assert text.count("run again because the target computes something else") == 2
    assert named in text


@pytest.mark.parametrize("name", ["run.json", "result.json", "traces.npz", "config.yaml"])
@pytest.mark.parametrize("damage", [b"", b"\xff\xfe{", None])
def test_a_damaged_cell_is_run_again(name, damage, place, estimated):
    assert sweep(place)[0] == 0
    path = place / "out" / "seed=1" / name
    if damage is None:
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        path.write_text("another's")
    else:
        path.write_bytes(damage)
    status, text, errors = sweep(place)
    assert status == 0, errors
    assert estimated == [(1.0, 0), (1.0, 1), (1.0, 1)]
    assert "[1/2] seed=0: kept" in text
    assert "[2/2] seed=1: run again because" in text
    assert read_record(place / "out" / "seed=1").origin.seed == 1


@pytest.mark.parametrize("error", [ConfigError, DataError, NonFiniteError, fastvi.UnavailableError])
def test_one_failing_cell_does_not_end_a_sweep(error, place, estimated, monkeypatch):
    at_once = llc_module.estimate_llc

    def fails(*problem, key, **options):
        if key == 0:
            raise error("r must be <= 3; got 9. Use less.")
        return at_once(*problem, key=key, **options)

    monkeypatch.setattr(llc_module, "estimate_llc", fails)
    status, text, _ = sweep(place)
    assert status == 1
    assert "[1/2] seed=0: failed, r must be <= 3; got 9" in text
    assert "[2/2] seed=1: llc " in text
    table = (place / "out" / "table.csv").read_text(encoding="utf-8")
    assert (
        "non_finite" if error is NonFiniteError else f"{error.__name__}: r must be <= 3"
    ) in table
    assert "sweep.png" in text
    status, text, _ = sweep(place, out="none", grid={"seed": [0]})
    assert status == 1
    assert f"written: {place / 'none' / 'table.csv'}\n" in text
    assert not (place / "none" / "sweep.png").exists()


def test_cells_have_folders_of_their_own(place, estimated):
    close = {"localization": [1.0000001, 1.0000002], "nbeta": [5, 5.5]}
    assert sweep(place, grid=close)[0] == 0
    names = {path.name for path in (place / "out").glob("[!.]*") if path.is_dir()}
    assert names == {
        f"localization={a!r},nbeta={b}" for a in close["localization"] for b in close["nbeta"]
    }
    assert (
        read_record(place / "out" / "localization=1.0000001,nbeta=5.5").origin.localization
        == 1.0000001
    )
    long = [[0.1] * 60, [0.1] * 60 + [0.2]]
    cells = [
        Cell({"x": value}, ORIGIN, fastvi.VIConfig()).name for value in [*long, "a/b", "a-b", ".."]
    ]
    assert len(set(cells)) == 5
    assert all(len(name) < 200 and "/" not in name for name in cells)


def test_a_sweep_lets_fits_go_and_tells_what_is_lost(place, estimated, result, monkeypatch):
    seen = []
    drawing = type("Drawing", (), {"savefig": lambda self, path, dpi: full()})()
    monkeypatch.setattr(
        sweep_round, "draw_sweep", lambda results, steps: seen.extend(results) or drawing
    )
    status, text, errors = sweep(place)
    assert status == 1
    assert [(values, numbers.llc) for values, numbers in seen] == [
        ({"seed": 0}, result.llc),
        ({"seed": 1}, result.llc),
    ]
    assert "could not be written" in errors
    assert f"written: {place / 'out' / 'table.csv'}\n" in text


def test_a_sweeps_folder_is_nobody_elses(place, estimated):
    (place / "out").mkdir()
    (place / "out" / "table.csv").write_text("mine")
    status, _, errors = sweep(place)
    assert status == 2
    assert "is no sweep of fastvi and holds table.csv" in errors
    assert (place / "out" / "table.csv").read_text() == "mine"
