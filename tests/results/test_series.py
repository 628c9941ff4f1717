"""Curves and parts go on after the last estimate that a folder has, to the same numbers."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi import ConfigError, DataError
from fastvi.results.claim import LEASE_FILE
from fastvi.results.lease import take

X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
CHECKPOINTS = [scale * jnp.ones(3) for scale in (1.0, 0.5, 0.1)]
OPTIONS = {
    "method": "variational",
    "steps": 30,
    "M": 1,
    "r": 0,
    "eval_samples": 16,
    "early_stop": False,
    "num_chains": 1,
    "progress": False,
    "key": 3,
}
PARAMS = {"a": jnp.ones(2), "b": jnp.ones(2)}
PARTS = {"a/first": "a", "second": "b"}


def loss(w, batch):
    return 0.5 * jnp.mean((jnp.tanh(batch @ w) - batch[:, 0]) ** 2)


def of_both(w, batch):
    return 0.5 * jnp.mean((batch[:, :2] @ w["a"] - 2 * batch[:, 1:] @ w["b"]) ** 2)


def interrupted_after(count, checkpoints=CHECKPOINTS):
    yield from checkpoints[:count]
    raise KeyboardInterrupt


def curve(checkpoints=CHECKPOINTS, folder=None, fn=loss, data=X, **options):
    return fastvi.llc_curve(fn, checkpoints, data, resume_from=folder, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def whole():
    """A curve of cold fits that was not interrupted."""
    return curve(warm_start=False)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of the same curve, interrupted before its last checkpoint."""
    folder = tmp_path_factory.mktemp("curve")
    with pytest.raises(KeyboardInterrupt):
        curve(interrupted_after(2), folder, warm_start=False)
    return folder


def test_an_interrupted_curve_goes_on_to_the_same_numbers(whole, begun, tmp_path, monkeypatch):
    folder = shutil.copytree(begun, tmp_path / "curve")
    fits, run_estimate = [], fastvi.api.curve.run_estimate
    monkeypatch.setattr(
        fastvi.api.curve,
        "run_estimate",
        lambda *args, **options: fits.append(1) or run_estimate(*args, **options),
    )
    resumed = curve(folder=folder, warm_start=False)
    np.testing.assert_array_equal(resumed.llc, whole.llc)
    np.testing.assert_array_equal(resumed.llc_sem, whole.llc_sem)
    np.testing.assert_array_equal(resumed.init_loss, whole.init_loss)
    assert len(fits) == 1
    again = curve(folder=folder, warm_start=False)
    np.testing.assert_array_equal(again.llc, whole.llc)
    assert len(fits) == 1
    names = {path.name for path in folder.iterdir()}
    assert names == {f"checkpoint {number}" for number in range(3)}


def test_a_warm_curve_begins_anew_at_the_curvature_where_it_goes_on(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        curve(interrupted_after(1), tmp_path)
    resumed = curve(folder=tmp_path)
    # as the first fit of a curve, which is cold
    np.testing.assert_array_equal(resumed.llc[:2], whole.llc[:2])
    warm = curve()
    assert warm.llc[0] == whole.llc[0]
    assert warm.llc[1] != whole.llc[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"checkpoints": [CHECKPOINTS[0], CHECKPOINTS[2]]}, "checkpoint 1.*params was"),
        ({"data": X[:-1]}, "checkpoint 0.*data was .*n_data was 40, now 39"),
        ({"data": 2 * X}, "checkpoint 0.*data was"),
        ({"fn": lambda w, batch: 1.5 * loss(w, batch)}, "checkpoint 0.*loss at w"),
        ({"key": 4}, "checkpoint 0.*key was"),
        ({"steps": 31}, "checkpoint 0.*steps was 30, now 31"),
        ({"nbeta": 3.0}, "checkpoint 0.*nbeta was None, now 3.0"),
        ({"num_chains": 2}, "checkpoint 0.*num_chains was 1, now 2"),
        ({"warm_start": True}, "checkpoint 0.*warm_start was False, now True"),
    ],
)
def test_estimates_of_something_else_are_refused(begun, changes, named):
    with pytest.raises(ConfigError, match=f"{named}.*Pass what it was begun with"):
        curve(folder=begun, **{"warm_start": False, **changes})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("member.json", b"{"),
        ("member.json", None),
        ("traces.npz", b"no archive"),
        ("result.json", b"{}"),
    ],
)
def test_a_damaged_estimate_is_named_with_the_way_out(begun, tmp_path, name, content):
    folder = shutil.copytree(begun, tmp_path / "curve")
    path = folder / "checkpoint 1" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=name) as caught:
        curve(folder=folder, warm_start=False)
    assert caught.value.partial.llc.shape == (1,)
    shutil.rmtree(folder / "checkpoint 1")
    assert curve(folder=folder, warm_start=False).llc.shape == (3,)


def test_a_folder_is_of_one_process_and_can_be_made(begun, tmp_path):
    with take(begun / LEASE_FILE):
        with pytest.raises(ConfigError, match="being written by another fastvi"):
            curve(folder=begun, warm_start=False)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="resume_from must be a folder"):
        curve(folder=tmp_path / "file")


def test_an_estimate_that_is_not_finite_is_made_again(tmp_path):
    def falls(w, batch):
        return jnp.mean(batch @ w) * jnp.where(jnp.sum(w) == 3, 1.0, jnp.nan)

    options = {"throw": False, "warm_start": False}
    found = curve(CHECKPOINTS[:1], tmp_path, falls, **options)
    assert np.isnan(found.llc[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_split_is_kept_with_its_estimate(tmp_path):
    options = {"steps": 30, "method": "sample", "error": 0.3, "eval_samples": 16}
    first = curve(CHECKPOINTS[:1], tmp_path, warm_start=False, **options)
    kept = curve(CHECKPOINTS[:1], tmp_path, warm_start=False, **options)
    assert np.isfinite(first.drift.value[0])
    for name in ("drift", "spread"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(first, name))
    path = tmp_path / "checkpoint 0" / "member.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split": [["x", 1], [2, 3]]}))
    with pytest.raises(DataError, match="impossible split"):
        curve(CHECKPOINTS[:1], tmp_path, warm_start=False, **options)


def test_parts_go_on_after_the_last_to_the_same_numbers(tmp_path, monkeypatch):
    whole = fastvi.estimate_parts(of_both, PARAMS, X, PARTS, **OPTIONS)
    estimate, calls = fastvi.api.parts.estimate_target, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return estimate(*args, **options)

    monkeypatch.setattr(fastvi.api.parts, "estimate_target", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        fastvi.estimate_parts(of_both, PARAMS, X, PARTS, resume_from=tmp_path, **OPTIONS)
    assert caught.value.partial.llc == {"a/first": whole.llc["a/first"]}
    found = fastvi.estimate_parts(of_both, PARAMS, X, PARTS, resume_from=tmp_path, **OPTIONS)
    assert found.llc == whole.llc
    assert len(calls) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"a%2Ffirst", "second"}
    other = {**PARAMS, "a": 2 * PARAMS["a"]}
    with pytest.raises(ConfigError, match="a%2Ffirst holds an estimate of something else: params"):
        fastvi.estimate_parts(of_both, other, X, PARTS, resume_from=tmp_path, **OPTIONS)
