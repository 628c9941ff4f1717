"""Walks that are interrupted go on to the bits of walks that were not."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi._modes import in_own_modes
from fastvi.api.resample import correct_within, with_method
from fastvi.results import files, resume
from fastvi.results.resume import CORRECTION, ProgressFolder, StageFile, WalkKeeper
from fastvi.sampling.from_localizer import walk
from fastvi.sampling.run import KEPT_OF_RUNS, Averaging, BurningIn
from fastvi.target import stream as streaming

COUNT, DIM, HEAVY = 4096, 8, [11, 500]
# Steps that are far too long at first, which the run finds out.
LONG_STEPS = {"energy_error": 5.0, "precise_energy_error": 5.0, "max_refinements": 1}
FULL = {"method": "sample", "error": 0.04, "sampler": {"gradients": "full"}}
FIT = {"M": 1, "r": 4, "steps": 200, "early_stop": False, "eval_samples": 32, "num_chains": 1}

X = np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32)
X[HEAVY] *= 40


def loss_fn(w, batch):
    return 0.5 * jnp.mean((batch @ w) ** 2) + 1e-4 * jnp.mean((batch @ w) ** 4)


class Interrupted(BaseException):
    """Passes through everything, as a kill does."""


def estimate(folder=None, data=X, loss=None, **options):
    given = {"nbeta": 200.0, "localization": 10.0, "progress": False}
    return fastvi.estimate_llc(
        loss or loss_fn, jnp.zeros(DIM), data, resume_from=folder, **given | options
    )


@pytest.fixture(scope="module")
def fitted():
    return estimate(method="variational", **FIT)


def assert_same_bits(result, whole):
    for name in ("llc", "llc_sem", "error_parts", "work", "correction", "health"):
        assert repr(getattr(result, name)) == repr(getattr(whole, name)), name
    for name in ("walk_llc", "llc_per_chain", "llc_sem_per_chain", "log_weights"):
        np.testing.assert_array_equal(getattr(result, name), getattr(whole, name), name)


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupt behind each checkpoint in turn, and each time go on, until there is a result.

    Returns it, and the stages and the progress of the checkpoints.
    """
    monkeypatch.setattr(resume, "SAVING_SHARE", 1e9)
    save, seen = StageFile.save, []

    def interrupt(self, content, is_last):
        save(self, content, is_last)
        seen.append(self.stage)
        if not is_last:
            raise Interrupted

    def until_it_ends(make):
        with monkeypatch.context() as patch:
            patch.setattr(StageFile, "save", interrupt)
            while True:
                try:
                    return make(), seen
                except Interrupted:
                    pass

    return until_it_ends


@pytest.mark.parametrize(
    ("settings", "has_blocks"),
    [({"noise_share": 1.0, "min_bins": 16, **LONG_STEPS}, True), ({"gradients": "full"}, False)],
    ids=["blocks", "full"],
)
def test_a_correction_interrupted_at_every_round(
    settings, has_blocks, fitted, interrupted, tmp_path
):
    config = with_method(fitted, "sample", 0.04, None, {"start": "fit", **settings})
    folder, stages = ProgressFolder(tmp_path), []

    class Keeper(WalkKeeper):
        def save(self, progress, *told, is_last=False):
            stages.append(progress(*told))
            super().save(progress, *told, is_last=is_last)

    def correct(**options):
        return in_own_modes(correct_within)(
            fitted, config, 0.0, progress=False, throw=True, **options
        )

    whole = correct()
    result, seen = interrupted(
        lambda: correct(keeper=Keeper(StageFile(folder, CORRECTION, {}), KEPT_OF_RUNS))
    )
    assert_same_bits(result, whole)
    assert len(seen) > 3
    if has_blocks:
        assert result.correction.kept_examples == len(HEAVY)
        kinds = [type(one.stage) for one in stages]
        assert {*kinds} == {BurningIn, Averaging}
        assert len({one.stage.state.fidelity for one in stages}) >= 3
        assert stages[-1].stage.state.refinements == 1
        assert all(one.stage.state.estimate.anchor is None for one in stages)


WALK = {"sampler": {"gradients": "fresh"}, "error": 0.05, "budget": 3e4}


@pytest.mark.parametrize("gradients", ["fresh", pytest.param("anchored", marks=pytest.mark.slow)])
def test_a_walk_interrupted_at_every_round(gradients, interrupted, tmp_path):
    options = WALK | {"sampler": {"gradients": gradients}}
    whole = estimate(**options)
    result, seen = interrupted(lambda: estimate(tmp_path, **options))
    assert len(seen) > 6
    assert_same_bits(result, whole)


class Batches:
    """Data that are read again and again."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def weighted(w, batch):
    """Weighted examples, in a box that walkers leave by steps of the usual length."""
    losses = 0.5 * (batch @ w) ** 2
    return jnp.where(jnp.abs(w[0]) < 0.02, losses, jnp.inf), 1 + jnp.abs(batch[:, 0])


@pytest.mark.slow
def test_a_walk_on_a_stream_reads_on_where_it_was(interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 1)
    batches = np.split(np.tile(X[HEAVY[1] + 1 :][:2048], (8, 1)), 8)
    options = WALK | {"loss": weighted, "data": Batches(batches)}
    whole = estimate(**options)
    result, seen = interrupted(lambda: estimate(tmp_path, **options))
    assert result.correction.returned > 0  # and walkers began anew with shorter steps
    assert len(seen) > 6
    assert_same_bits(result, whole)
    with pytest.raises(fastvi.DataError, match="read again; got an iterator"):
        estimate(tmp_path, **options | {"data": iter(batches)})


def test_an_estimate_interrupted_in_its_fit_and_correction(interrupted, tmp_path, monkeypatch):
    """A walk that gave way to the fit is not tried again."""
    monkeypatch.setattr("fastvi.api.estimate.chooses_walk", lambda *target: (True, False))
    monkeypatch.setattr(walk, "MOST_STIFFNESS", -1.0)
    begin, begun = walk.begin, []
    monkeypatch.setattr(walk, "begin", lambda setup: begun.append(setup) or begin(setup))
    options = {**FIT, **FULL, "num_chains": None}
    whole = estimate(**options)
    result, seen = interrupted(lambda: estimate(tmp_path, **options))
    assert seen[:3] == ["walk", "fit", "fit"]
    assert seen.count("walk") == 1
    assert seen.count("correction") > 2
    assert len(begun) == 2
    assert_same_bits(result, whole)


def test_a_full_disk_is_a_warning_and_the_walk_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVING_SHARE", 1e9)
    calls = []

    def full(*arguments):
        calls.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", full)
        with pytest.warns(
            RuntimeWarning, match=r"of the walk could not be kept in .*No space.*the walk goes on"
        ) as told:
            result = estimate(tmp_path, **WALK)
    assert len(told) == 1
    assert len(calls) > 6
    assert not list(tmp_path.iterdir())
    assert_same_bits(result, estimate(**WALK))


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path):
    """Where this process may mount one: of two pages, which is less than a checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        with pytest.warns(RuntimeWarning, match="No space left on device"):
            result = estimate(disk, **WALK)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert_same_bits(result, estimate(**WALK))


def test_a_stop_that_was_asked_for_is_kept_whatever_it_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVING_SHARE", 1e-9)  # the first checkpoint would be the only one
    folder = ProgressFolder(tmp_path)
    assert not folder.ask_to_stop()  # nothing is there to keep
    with pytest.raises(resume.Stopped):
        estimate(folder, progress=lambda told: told.step > 1e4 and folder.ask_to_stop(), **WALK)
    steps, lines = [], []
    again = ProgressFolder(tmp_path, tell=lines.append)
    result = estimate(again, progress=lambda told: steps.append(told.step), **WALK)
    begun, *later = steps
    assert begun == 0 < 1e4 < min(later)
    assert lines == [f"goes on from the progress in {tmp_path}"]
    assert_same_bits(result, estimate(**WALK))


def test_another_walk_is_refused_and_a_damaged_one(tmp_path):
    estimate(tmp_path, **WALK)
    with pytest.raises(fastvi.ConfigError, match=r"progress of another walk: error was 0\.05, now"):
        estimate(tmp_path, **WALK | {"error": 0.1})
    path = tmp_path / "progress-walk.npz"
    with np.load(path) as stored:
        found = dict(stored)
    found["array_0"] = found["array_0"] + 1
    np.savez(path, **found)
    with pytest.raises(fastvi.DataError, match="is not as it was written. Delete it"):
        estimate(tmp_path, **WALK)
    lines = []
    estimate(ProgressFolder(tmp_path, begins_anew=True, tell=lines.append), **WALK)
    assert lines == [f"begins anew: {path} is not as it was written"]


PROGRAM = """
import sys
from tests.results import test_resume_walks as tests
from fastvi.results import resume

resume.SAVING_SHARE = 1e9
write = resume.StageFile._write

def telling(self, content):
    print("writing", self.stage, flush=True)
    write(self, content)
    print("written", self.stage, flush=True)

resume.StageFile._write = telling
tests.estimate(sys.argv[1] or None, **tests.KILLED[sys.argv[2]]).save(sys.argv[3])
"""
BLOCKS = {"start": "fit", "noise_share": 1.0, "min_bins": 16, **LONG_STEPS}
KILLED = {
    "blocks": FIT | {"steps": 1000, "method": "sample", "error": 0.04, "sampler": BLOCKS},
    "fresh": WALK,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), [("blocks", 20), ("fresh", 8)])
def test_killed_at_random_moments(name, kills, tmp_path):
    """SIGKILL behind one of the next few beginnings and ends of a checkpoint, or a little later.

    A process that is killed leaves the folder to the next one.
    """
    random, stages = np.random.default_rng(0), []
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }

    def start(folder, result):
        command = [sys.executable, "-c", PROGRAM, str(folder), name, str(tmp_path / result)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def kill_one():
        process, left = start(tmp_path / "progress", "result"), random.integers(1, 4)
        for line in process.stdout:
            left -= 1
            if left == 0:
                if random.integers(2):  # at once half of the time
                    time.sleep(random.uniform(0, 0.02))
                process.kill()
                stages.append(line.split())
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL

    for _ in range(kills):
        kill_one()
    for folder, result in (("", "whole"), (tmp_path / "progress", "result")):
        with start(folder, result) as process:
            process.communicate()
        assert process.returncode == 0
    result, whole = (fastvi.LLCEstimate.load(tmp_path / one) for one in ("result", "whole"))
    assert_same_bits(result, whole)
    assert {stage for _, stage in stages} == {"blocks": {"fit", "correction"}, "fresh": {"walk"}}[
        name
    ]
    assert {word for word, _ in stages} == {"writing", "written"}
