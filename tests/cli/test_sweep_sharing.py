"""Processes that share a sweep: what one does when others fail, stand still, die or come back."""

import csv
import dataclasses
import gc
import json
import os
import sys
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import fastvi
from fastvi import DataError, LLCEstimate
from fastvi.cli import sweep as sweep_module
from fastvi.cli import sweep_cells, sweep_round
from fastvi.cli.sweep import in_order
from fastvi.cli.sweep_plan import read_plan
from fastvi.cli.sweep_round import joined
from fastvi.cli.target import restrict_to_parts
from fastvi.results import runs
from fastvi.results.lease import SECONDS, Lease
from fastvi.results.runs import read_record
from tests.support.command_line import run

MODEL = """
import jax.numpy as jnp
import numpy as np


def target():
    w = {"a": jnp.zeros(2), "b": {"w": jnp.zeros(2)}, "scale": jnp.ones(())}

    def loss(w, batch):
        steep = 4 * w["a"] ** 2 + w["b"]["w"] ** 2
        return 0.5 * w["scale"] * jnp.sum(steep) * jnp.mean(batch)

    return loss, w, jnp.ones(100)
"""
FAST = {
    "method": "variational",
    "steps": 300,
    "M": 1,
    "r": 0,
    "eval_samples": 256,
    "early_stop": False,
}


@pytest.fixture(scope="module")
def result():
    data = (jnp.ones((20, 1)),)
    few = {**FAST, "steps": 20, "eval_samples": 16}
    return fastvi.estimate_llc(
        lambda w, batch: 0.5 * jnp.sum(w**2) * jnp.mean(batch[0]),
        jnp.zeros(3),
        data,
        num_chains=1,
        progress=False,
        **few,
    )


@pytest.fixture
def drawn(monkeypatch):
    """Figures and pages that take no time; what the figure of the sweep was drawn of."""
    seen = []
    drawing = type("Drawing", (), {"savefig": lambda self, path, dpi: path.write_bytes(b"PNG")})()
    monkeypatch.setattr(runs, "plot_traces", lambda result: drawing)
    monkeypatch.setattr(runs, "write_report", lambda result, path: path.write_text("page") and path)
    monkeypatch.setattr(
        sweep_round, "draw_sweep", lambda results, steps: seen.append((results, steps)) or drawing
    )
    return seen


@pytest.fixture
def place(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "shared_model.py").write_text(MODEL)
    planned(tmp_path)
    yield tmp_path
    sys.modules.pop("shared_model", None)


@pytest.fixture
def estimated(result, monkeypatch):
    """Estimates at once; the seeds of those that were made, and what to do in them."""
    calls, acts = [], {}

    def at_once(problem, origin, config, folder, **options):
        calls.append(origin.seed)
        acts.get(origin.seed, lambda: None)()
        return dataclasses.replace(result, llc=result.llc + origin.seed)

    monkeypatch.setattr(sweep_cells, "estimate_origin", at_once)
    return calls, acts


def planned(place, **entries):
    given = {"target": "shared_model:target", "out": "out", "grid": {"seed": [0, 1, 2]}} | entries
    (place / "sweep.yaml").write_text(yaml.safe_dump(given, sort_keys=False))


def sweep(*options):
    return run(["sweep", *options])


def table(place, column="findings"):
    with (place / "out" / "table.csv").open(encoding="utf-8") as file:
        return [row[column] for row in csv.DictReader(file)]


def their_lease(path, age=0.0):
    """Write the lease of a process of another machine, so long after its last sign of life."""
    content = {"token": "theirs", "seconds": SECONDS, "host": "far", "process": 1, "machine": "x"}
    path.write_text(json.dumps(content))
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))


def living(place):
    return joined(place / "out", read_plan(place / "sweep.yaml"), SECONDS)


def test_shards_begin_at_their_own_runs_and_take_all():
    assert in_order("abcdefg", 1, 3) == [*"adgbecf"]
    assert in_order("abcdefg", 3, 3) == [*"cfadgbe"]
    assert in_order("ab", 5, 8) == [*"ab"]


def test_what_failed_is_not_tried_again_in_the_same_round(place, estimated):
    calls, acts = estimated

    def fails():
        raise DataError("no such data. Look again.")

    acts[1] = fails
    (place / "out").mkdir()
    with living(place):
        assert sweep("--shard", "1/2")[0] == 1
        assert sweep("--shard", "2/2")[0] == 1
        assert calls == [0, 2, 1]
        assert [text[:24] for text in table(place)] == ["khat", "DataError: no such data.", "khat"]
    del acts[1]
    # nobody of that round lives
    status, text, _ = sweep()
    assert (status, calls) == (0, [0, 2, 1, 1])
    assert text.count("kept, llc ") == 2
    assert table(place) == ["khat"] * 3


def test_jobs_of_one_array_are_one_round(place, estimated, monkeypatch):
    calls, acts = estimated

    def fails():
        raise DataError("no such data. Look again.")

    acts[0] = fails
    for name, value in {"ID": 0, "MIN": 0, "STEP": 1, "COUNT": 3}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    for array, expected in (("7", [0, 1, 2]), ("7", [0, 1, 2]), ("8", [0, 1, 2, 0])):
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", array)
        assert sweep("--shard", "slurm")[0] == 1
        assert calls == expected


def test_another_sweep_in_the_folder_is_refused_while_one_lives(place, estimated):
    (place / "out").mkdir()
    with living(place):
        assert sweep("--shard", "1/3", "--quiet")[0] == 0
        planned(place, grid={"seed": [0, 1, 2, 3]})
        status, _, errors = sweep()
        assert status == 2
        assert f"written by a sweep of something else ('process {os.getpid()} on" in errors
        assert len(table(place)) == 3
    assert sweep()[0] == 0
    assert len(table(place)) == 4


def test_one_that_comes_back_to_another_round_ends(place, estimated):
    """It stood still so long that others have begun another sweep in the folder."""
    calls, acts = estimated
    members = (place / "out" / ".fastvi-leases").glob

    def stands_still():
        del acts[0]
        for path in members("process-*"):
            path.unlink()
        planned(place, grid={"seed": [0, 1, 2, 3]}, nbeta=7.0)
        assert sweep("--shard", "2/4")[0] == 0

    acts[0] = stands_still
    status, _, errors = sweep()
    assert status == 2
    assert "another sweep has begun in 'out'" in errors
    # what it held is its own, and all else is of the other sweep
    assert calls == [0, 1, 2, 3]
    assert table(place) == ["no run yet", *["khat"] * 3]


def test_a_shard_leaves_what_others_hold_and_a_sweep_waits_for_it(place, estimated, monkeypatch):
    calls, _ = estimated
    held = place / "out" / ".fastvi-leases" / "seed=1"
    held.parent.mkdir(parents=True)
    their_lease(held)
    assert sweep("--shard", "2/3")[0] == 0
    assert calls == [2, 0]
    assert table(place) == ["khat", "no run yet", "khat"]
    waits = []

    def dies(seconds):
        waits.append(seconds)
        their_lease(held, age=SECONDS + 1)

    monkeypatch.setattr(sweep_module.time, "sleep", dies)
    assert sweep()[0] == 0
    assert (calls, len(waits)) == ([2, 0, 1], 1)
    assert table(place) == ["khat"] * 3
    their_lease(held)
    (place / "out" / "seed=1" / "cell.json").unlink()
    assert sweep("--shard", "1/1", "--wait")[0] == 0
    assert len(waits) == 2


def test_a_run_whose_lease_was_taken_is_not_published(place, estimated):
    calls, acts = estimated
    held = place / "out" / ".fastvi-leases" / "seed=1"
    acts[1] = lambda: their_lease(held)
    assert sweep("--shard", "1/1")[0] == 0
    assert calls == [0, 1, 2]
    assert not (place / "out" / "seed=1").exists()
    assert table(place) == ["khat", "no run yet", "khat"]
    assert json.loads(held.read_text())["token"] == "theirs"
    assert not list((place / "out").glob(".fastvi-partial-*"))


@pytest.mark.parametrize("earlier", [False, True])
def test_one_that_comes_back_after_the_check_publishes_nothing(
    earlier, place, estimated, monkeypatch
):
    """It stood still between the check and the move; another one has published meanwhile."""
    calls, acts = estimated
    check, published = Lease.check, []
    if earlier:
        planned(place, grid={"seed": [1]}, nbeta=3.0)
        assert sweep()[0] == 0
        calls.clear()
    planned(place, grid={"seed": [1]})

    def comes_back(lease):
        check(lease)
        if not published and lease.path.name == "seed=1":
            published.append(None)
            # taken over, and done by another process
            lease.path.unlink()
            del acts[1]
            assert sweep("--shard", "1/1", "--quiet")[0] == 0
            published.append((place / "out" / "seed=1" / "cell.json").read_bytes())

    monkeypatch.setattr(Lease, "check", comes_back)
    acts[1] = lambda: None
    status, text, errors = sweep("--quiet")
    assert (status, calls) == (0, [1, 1]), errors
    assert (place / "out" / "seed=1" / "cell.json").read_bytes() == published[1]
    assert read_record(place / "out" / "seed=1").origin.nbeta is None
    assert table(place) == ["khat"]
    assert not list((place / "out").glob(".fastvi-partial-*"))


def test_an_earlier_run_stays_until_the_new_one_is_whole(place, estimated):
    calls, acts = estimated
    assert sweep()[0] == 0
    (place / "out" / "seed=1" / "notes.txt").write_text("mine")
    (place / "out" / "seed=1" / "mine").mkdir()
    (place / "out" / "seed=1" / "mine" / "more.txt").write_text("too")
    before = (place / "out" / "seed=1" / "result.json").read_bytes()
    planned(place, nbeta=7.0)
    seen = []

    def interrupted():
        seen.append((place / "out" / "seed=1" / "result.json").read_bytes())
        raise KeyboardInterrupt

    acts[1] = interrupted
    assert sweep()[0] == 130
    assert seen == [before]
    assert read_record(place / "out" / "seed=1").origin.nbeta is None
    del acts[1]
    status, text, _ = sweep()
    assert status == 0
    assert "seed=1: run again under other settings, llc" in text
    assert read_record(place / "out" / "seed=1").origin.nbeta == 7.0
    assert (place / "out" / "seed=1" / "notes.txt").read_text() == "mine"
    assert (place / "out" / "seed=1" / "mine" / "more.txt").read_text() == "too"


def test_a_file_in_the_place_of_a_run_stays(place, estimated):
    (place / "out").mkdir()
    (place / "out" / "run.json").write_text('{"format": "fastvi sweep"}')
    (place / "out" / "seed=1").write_text("mine")
    status, text, _ = sweep()
    assert status == 1
    assert "seed=1: failed, out/seed=1 is in the place of a run's folder" in text
    assert (place / "out" / "seed=1").read_text() == "mine"


def test_two_sweeps_at_once_share_the_runs(place, estimated):
    calls, acts = estimated
    acts[0] = lambda: sweep("--shard", "1/1")
    assert sweep()[0] == 0
    assert calls == [0, 1, 2]
    assert table(place) == ["khat"] * 3


def test_a_sweep_keeps_numbers_and_no_estimates(place, result, drawn, monkeypatch):
    kept, most = [], []

    def at_once(problem, origin, config, folder, **options):
        gc.collect()
        most.append(sum(one() is not None for one in kept))
        made = dataclasses.replace(result, fitted=object())
        kept.append(weakref.ref(made))
        return made

    load = LLCEstimate.load

    def loaded(folder):
        gc.collect()
        most.append(sum(one() is not None for one in kept))
        made = load(folder)
        kept.append(weakref.ref(made))
        return made

    monkeypatch.setattr(sweep_cells, "estimate_origin", at_once)
    monkeypatch.setattr(LLCEstimate, "load", loaded)
    for _ in range(2):  # run, then kept
        assert sweep("--quiet")[0] == 0
        gc.collect()
        assert [one() for one in kept] == [None] * len(kept)
    assert most == [0] * 6
    expected = (result.llc, result.llc_sem, result.work.total_fge, result.elbo)
    assert [tuple(numbers) for _, numbers in drawn[-1][0]] == [expected] * 3


def test_a_table_is_of_what_is_there_while_others_work(place, estimated):
    calls, acts = estimated
    (place / "out").mkdir()
    reads = []
    acts[2] = lambda: reads.append(sweep("--shard", "1/3", "--quiet")) or reads.append(table(place))
    assert sweep()[0] == 0
    assert reads[0][0] == 0
    assert reads[1] == ["khat", "khat", "no run yet"]
    assert table(place) == ["khat"] * 3


# checkpoints and parts


def exact(steep, scale, gamma=1.0):
    nbeta = 100 / np.log(100)
    return 0.5 * sum(nbeta * scale * h / (nbeta * scale * h + gamma) for h in steep)


def test_checkpoints_parts_and_localizations_are_one_sweep(place, drawn):
    (place / "ckpt").mkdir()
    zero = np.zeros(2, np.float32)
    for step, scale in ((100, 1.0), (20, 0.1)):
        arrays = {"a": zero, "b/w": zero, "scale": np.float32(scale)}
        np.savez(place / "ckpt" / f"step_{step}.npz", **arrays)
    planned(
        place,
        base=FAST,
        num_chains=1,
        grid={
            "params": "ckpt/step_*.npz",
            "parts": {"first": "a", "second": ["b/**"]},
            "gamma": [1, 4],
        },
    )
    status, text, errors = sweep()
    assert status == 0, (text, errors)
    known = [
        exact(steep, scale, gamma)
        for scale in (0.1, 1.0)
        for steep in ([4, 4], [1, 1])
        for gamma in (1, 4)
    ]
    found = [float(cell.split()[0]) for cell in table(place, "llc")]
    assert found == pytest.approx(known, rel=0.02)
    assert table(place, "parts") == ["first", "first", "second", "second"] * 2
    assert table(place, "params") == ["ckpt/step_20.npz"] * 4 + ["ckpt/step_100.npz"] * 4
    (results, steps), *_ = drawn
    assert steps == {"ckpt/step_20.npz": 20, "ckpt/step_100.npz": 100}
    assert results[0][0] == {"params": "ckpt/step_20.npz", "parts": "first", "gamma": 1}
    (cell,) = (place / "out").glob("params=ckpt%2Fstep_20.npz,parts=second,gamma=4")
    origin = read_record(cell).origin
    assert origin.part == {"second": ["b/**"]}
    assert origin.params == str(place / "ckpt" / "step_20.npz")
    # done again from its folder, it is of the same checkpoint and part
    assert run(["llc", str(cell), "--trust", "--out", "again", "--quiet"])[0] == 0
    assert LLCEstimate.load("again").llc == pytest.approx(known[3], rel=0.02)
    assert LLCEstimate.load("again").dim == 2
    assert read_record("again").origin == origin


def test_a_part_that_is_none_is_a_failed_run_and_ends_no_other(place, estimated):
    planned(place, grid={"parts": {"first": "a", "no": "c"}})
    status, text, _ = sweep()
    assert status == 1
    assert "parts=first: failed, pattern 'c' matches no array" in text


def test_a_checkpoint_that_cannot_be_read_is_a_failed_run(place, estimated):
    np.savez(place / "good.npz", **{"a": np.zeros(2), "b/w": np.zeros(2), "scale": np.ones(())})
    (place / "bad.npz").write_text("no archive")
    planned(place, grid={"params": ["bad.npz", "good.npz"]})
    status, text, _ = sweep()
    assert status == 1
    assert "params=bad.npz: failed, " in text
    assert "params=good.npz: llc " in text


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (
            ["s_9.npz", "s_10.npz", "s_100.npz"],
            "s_*.npz",
            ["s_9.npz", "s_10.npz", "s_100.npz"],
        ),
        (["e2/m.pt", "e10/m.pt"], "e*/m.pt:model", ["e2/m.pt:model", "e10/m.pt:model"]),
        (["b.npz", "a.npz", "c[1].npz"], ["c[1].npz", "[ab].npz"], ["c[1].npz", "a.npz", "b.npz"]),
    ],
)
def test_patterns_of_checkpoints_are_expanded_in_their_order(names, given, expected, place):
    for name in names:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).touch()
    planned(place, grid={"params": given})
    cells = read_plan(place / "sweep.yaml").cells
    assert [cell.values["params"] for cell in cells] == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"grid": {"params": "none_*.npz"}}, "no checkpoint is named as in 'none_*.npz'"),
        ({"grid": {"params": [3]}}, "grid.params must list checkpoints"),
        ({"grid": {"params": ["a", "a"]}}, "grid.params must list one value or more"),
        ({"params": "a", "grid": {"params": ["b"]}}, "params at the top and params in the grid"),
        ({"grid": {"parts": []}}, "grid.parts must list one value or more"),
        ({"grid": {"parts": {"x": []}}}, "grid.parts must be names with patterns"),
        ({"grid": {"parts": {"x": 3}}}, "grid.parts must be names with patterns"),
        ({"grid": {"parts": [["a", "b"]]}}, "grid.parts must be names with patterns"),
        ({"grid": {"parts": ["a", "a"]}}, "grid.parts must list one value or more"),
    ],
)
def test_wrong_checkpoints_and_parts_are_refused_before_anything_runs(entries, message, place):
    planned(place, **entries)
    status, _, errors = sweep()
    assert status == 2
    assert message in errors
    assert not (place / "out").exists()


def test_parts_of_one_shape_share_a_loss_program(place):
    from fastvi.cli.target import load

    found = restrict_to_parts(load("shared_model:target"), {"first": ["a"], "second": ["b"]})
    assert found["first"].loss_fn.sites == found["second"].loss_fn.sites
