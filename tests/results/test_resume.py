"""A fit that is interrupted goes on to the bits of one that was not.

By the same programs on the same machine.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.results import files, resume
from fastvi.target.identity import differing

COUNT, DIM = 300, 6
OPTIONS = {
    "steps": 1000,
    "method": "variational",
    "num_chains": 2,
    "M": 2,
    "key": 4,
    "samples_per_step": 2,
    "eval_samples": 16,
}

rng = np.random.default_rng(2)
X = rng.normal(size=(COUNT, DIM)).astype(np.float32)
Y = (X @ np.arange(DIM) + rng.normal(size=COUNT)).astype(np.float32)
W = np.linalg.lstsq(X, Y, rcond=None)[0].astype(np.float32)


class Interrupted(BaseException):
    """Passes through everything, as a kill does."""


def loss_fn(w, batch):
    return 0.5 * jnp.mean((jnp.sin(batch[0] @ (w - W)) + batch[0] @ W - batch[1]) ** 2)


def estimate(folder=None, progress=False, **changes):
    return fastvi.estimate_llc(
        loss_fn, W, (X, Y), progress=progress, resume_from=folder, **OPTIONS | changes
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return estimate(tmp_path_factory.mktemp("a-whole-fit", numbered=False))


def crash(*paths):
    raise Interrupted


def assert_same_bits(result, whole):
    assert result.traces.keys() == whole.traces.keys()
    for name, trace in whole.traces.items():
        assert np.array_equal(result.traces[name], trace, equal_nan=True), name
    assert np.array_equal(result.log_weights, whole.log_weights)
    assert (result.llc, result.llc_sem, result.elbo) == (whole.llc, whole.llc_sem, whole.elbo)
    assert (result.work, result.converged) == (whole.work, whole.converged)


@pytest.mark.parametrize("attempt", range(20))
def test_interrupted_at_a_random_step(attempt, whole, tmp_path, monkeypatch):
    """At one to three of its steps.

    In every other try the last of them comes while progress is being written.
    """
    monkeypatch.setattr(resume, "SAVING_SHARE", 1e9)
    random = np.random.default_rng(attempt)
    steps = whole.traces["elbo"].shape[1]
    for stop in sorted(random.integers(1, steps, size=random.integers(1, 4))):

        def interrupt(progress, stop=stop):
            if progress.stage == "fit" and progress.step >= stop or progress.stage == "evaluation":
                raise Interrupted

        with pytest.raises(Interrupted):
            estimate(tmp_path, interrupt)
    if attempt % 2:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crash)
            with suppress(
                Interrupted
            ):  # where the progress was complete already, nothing is written
                estimate(tmp_path)
    begun = []
    assert_same_bits(
        estimate(tmp_path, lambda p: begun.append(p.step) if p.stage == "fit" else None), whole
    )
    assert len(begun) < steps // 100 or stop <= 100


def test_a_finished_fit_is_not_run_again(whole, tmp_path):
    estimate(tmp_path)
    seen = []
    assert_same_bits(estimate(tmp_path, lambda p: seen.append(p.stage)), whole)
    assert "fit" not in seen


def test_keeping_progress_changes_nothing(whole):
    assert_same_bits(estimate(), whole)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.02}, "lr was 0.01, now 0.02"),
        ({"key": 5}, "key was"),
        ({"localization": 2.0}, "localization was 1.0, now 2.0"),
        ({"num_chains": 1}, "key was"),
        ({"early_stop": False}, "early_stop was"),
    ],
)
def test_another_fit_is_refused(changes, named, whole, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "a-whole-fit"
    with pytest.raises(fastvi.ConfigError, match=named):
        estimate(folder, **changes)


def test_other_data_or_loss_are_refused(whole, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "a-whole-fit"
    options = {**OPTIONS, "progress": False, "resume_from": folder}
    with pytest.raises(fastvi.ConfigError, match="data was"):
        fastvi.estimate_llc(loss_fn, W, (X, Y + 1), **options)
    with pytest.raises(fastvi.ConfigError, match=r"loss at w\* was"):
        fastvi.estimate_llc(lambda w, batch: 1.1 * loss_fn(w, batch), W, (X, Y), **options)


def test_a_loss_that_differs_only_away_from_the_minimum_is_refused(tmp_path):
    """At L(w*) = 0 with no gradient, as a model that interpolates has, the loss says nothing."""
    options = {
        "steps": 100,
        "method": "variational",
        "num_chains": 1,
        "M": 1,
        "r": 0,
        "eval_samples": 4,
    }
    options |= {"progress": False, "resume_from": tmp_path}
    curves, zeros, data = (
        np.array([4.0, 1.0, 0.0], np.float32),
        np.zeros(3, np.float32),
        (np.ones((30, 1)),),
    )

    def bowl(w, batch):
        return 0.5 * jnp.sum(curves * w**2) * jnp.mean(batch[0])

    fastvi.estimate_llc(bowl, zeros, data, **options)
    others = {
        "scaled": lambda w, batch: 1e-3 * bowl(w, batch),
        "by a little": lambda w, batch: 1.001 * bowl(w, batch),
        "another direction": lambda w, batch: (
            0.5 * jnp.sum(curves[::-1] * w**2) * jnp.mean(batch[0])
        ),
        "another power": lambda w, batch: bowl(w, batch) + jnp.sum(w**4),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastvi.api.estimate.run_fit", None)  # refused before anything compiles
        for other in others.values():
            with pytest.raises(fastvi.ConfigError, match=r"loss near w\* was"):
                fastvi.estimate_llc(other, zeros, data, **options)
        patch.setattr("fastvi.results.resume.__version__", "another")
        with pytest.raises(fastvi.ConfigError, match="fastvi was"):
            fastvi.estimate_llc(bowl, zeros, data, **options)


@pytest.mark.parametrize(
    ("kept", "now", "names"),
    [
        ({}, {}, []),
        ({"loss at w*": 1e-12}, {}, []),
        ({"loss near w*": [1.0, 2.0, 3e-5]}, {}, []),
        ({"loss near w*": [1.0, 2.0, 3.001e-5]}, {}, ["loss near w*"]),
        ({"loss near w*": [1.0, 2.0]}, {}, ["loss near w*"]),
        ({"loss near w*": "text"}, {}, ["loss near w*"]),
        ({"loss near w*": [1.0, np.inf]}, {"loss near w*": [1.0, np.inf]}, []),
        ({"slopes near w*": [1e-6, 1.0, 1.0]}, {}, []),
        ({"slopes near w*": [-1.0, 1.0, 1.0]}, {}, ["slopes near w*"]),
        ({"loss at w*": float("nan")}, {}, ["loss at w*"]),
        ({"loss at w*": float("nan")}, {"loss at w*": float("nan")}, []),
        ({"data": "a"}, {"data": "b"}, ["data"]),
    ],
)
def test_losses_are_the_same_but_for_rounding(kept, now, names):
    one = {
        "loss at w*": 0.0,
        "loss near w*": [1.0, 2.0, 3e-5],
        "slopes near w*": [0.0, 1.0, 1.0],
        "gradient norms near w*": [1.0, 1.0, 1.0],
    }
    assert differing(one | now, one | kept) == names


def test_a_full_disk_is_a_warning_and_the_fit_goes_on(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVING_SHARE", 1e9)
    publish, calls = files.publish, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return publish(*arguments)

    monkeypatch.setattr(files, "publish", full)
    with pytest.warns(
        RuntimeWarning, match=r"could not be kept in .*No space left on device.*the fit goes on"
    ) as told:
        assert_same_bits(estimate(tmp_path), whole)
    assert len(told) == 1
    assert len(calls) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["progress-fit.npz"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        fastvi.ConfigError,
        match=r"resume_from must be a folder, or one that can be made; got .*file'",
    ):
        estimate(tmp_path / "file")


@pytest.mark.slow
def test_killed(whole, tmp_path):
    """SIGKILL at five random moments of five processes, then one that ends."""
    program = (
        "import sys; sys.path[:0] = "
        f"{[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}\nimport test_resume, "
        "fastvi.results.resume; fastvi.results.resume.SAVING_SHARE = 1e9\nresult = "
        f"test_resume.estimate({str(tmp_path / 'progress')!r}, lambda p: print(p.stage, p.step, "
        f"flush=True))\nresult.save({str(tmp_path / 'result')!r})\n"
    )
    random = np.random.default_rng(0)
    killed = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if line.startswith("fit"):
                time.sleep(random.uniform(0, 0.05))
                process.send_signal(signal.SIGKILL)
                break
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert_same_bits(fastvi.LLCEstimate.load(tmp_path / "result"), whole)


def test_shapes_of_q_come_back(tmp_path, monkeypatch):
    """The records for TensorBoard, of before the interruption and of after it."""
    monkeypatch.setattr(resume, "SAVING_SHARE", 1e9)
    options = {"steps": 300, "tensorboard": True, "eval_every": 50}
    never = estimate(None, **options)

    def interrupt(progress):
        if progress.stage == "fit" and progress.step >= 200:
            raise Interrupted

    with pytest.raises(Interrupted):
        estimate(tmp_path, interrupt, **options)
    again = estimate(tmp_path, **options)
    assert again.snapshots.keys() == never.snapshots.keys() != set()
    for name, array in never.snapshots.items():
        np.testing.assert_array_equal(again.snapshots[name], array)


def test_what_comes_after_the_fit_may_change(whole, tmp_path_factory):
    """A finding says to raise the budget: the fit is not run again for it."""
    folder, seen = tmp_path_factory.getbasetemp() / "a-whole-fit", []
    options = {"early_stop": True, "method": "sample", "budget": 1e8, "error": 0.5}
    result = estimate(folder, lambda progress: seen.append(progress.stage), **options)
    assert "fit" not in seen
    assert result.llc_vi == whole.llc
