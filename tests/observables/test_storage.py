"""Draws on disk: the same numbers as in memory, whatever interrupts a run."""

import hashlib
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.observables import evaluate, pieces
from fastvi.observables.control_variates import plain_weights
from fastvi.observables.pieces import covariance_by_entry, mean_by_entry, mean_over_entries
from fastvi.observables.storage import WAITING_BYTES, BlockWriter, block_draws

COUNT, DIM, DRAWS = 60, 3, 24
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(COUNT, DIM)).astype(np.float32)
OUTPUTS = (INPUTS @ np.ones(DIM) + 0.5 * RNG.normal(size=COUNT)).astype(np.float32)
CENTER = np.linalg.lstsq(INPUTS, OUTPUTS, rcond=None)[0]
TRAIN, OTHER = (INPUTS, OUTPUTS), (INPUTS[:7], OUTPUTS[:7] + 1)
NAMED = {
    "losses": {"train": TRAIN, "a/b": OTHER},
    "observables": {"weights": lambda w, _: w, "norm": lambda w, _: jnp.sum(w**2)},
    "keep_params": True,
}


def loss_fn(w, batch):
    return 0.5 * (batch[0] @ w - batch[1]) ** 2


def estimated(data=TRAIN, **options):
    return fastvi.estimate_llc(
        loss_fn,
        jnp.asarray(CENTER),
        data,
        localization=2.0,
        sampler={"start": "localizer"},
        error=0.2,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def result():
    return estimated()


@pytest.fixture(scope="module")
def held(result):
    return fastvi.sample_posterior(result, DRAWS, progress=False, **NAMED)


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    """Draws on disk, which no test changes."""
    path = tmp_path_factory.mktemp("draws") / "whole"
    fastvi.sample_posterior(result, DRAWS, store=path, progress=False, **NAMED)
    return path


class Killed(Exception):
    """Ends a run from within."""


def interrupted(result, path, at, draws=DRAWS):
    def stop(progress):
        if progress.step == at:
            raise Killed

    with pytest.raises(Killed):
        fastvi.sample_posterior(result, draws, store=path, **{**NAMED, "progress": stop})


def assert_same(found, expected):
    """Hold all numbers of draws to others, to the last digit."""
    for name in ("energies", "slopes", "radius2", "displacement"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("losses", "observables", "init_losses"):
        assert getattr(found, name).keys() == getattr(expected, name).keys()
        for key, values in getattr(found, name).items():
            np.testing.assert_array_equal(values, getattr(expected, name)[key])
    for name in ("nbeta", "localization", "n_data", "dim", "center_norm", "init_loss", "thin"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.fge == pytest.approx(expected.fge, rel=1e-12)
    assert found.summary() == expected.summary()


def contents(path):
    return {
        file.relative_to(path): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def test_what_is_on_disk_is_what_would_be_in_memory(held, folder):
    assert_same(fastvi.load_draws(folder), held)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(result, held, tmp_path):
    interrupted(result, tmp_path / "draws", at=DRAWS - 2)
    kept = fastvi.load_draws(tmp_path / "draws")
    # what was complete is there, and of the rest a block at most is lost
    assert kept.num_draws == 16
    np.testing.assert_array_equal(kept.energies, held.energies[:, :16])
    seen = []
    found = fastvi.sample_posterior(
        result, DRAWS, store=tmp_path / "draws", **{**NAMED, "progress": seen.append}
    )
    assert [one.step for one in seen] == list(range(17, DRAWS + 1))
    assert seen[-1].value == pytest.approx(held.llc.mean(), rel=1e-5)
    assert_same(found, held)


def test_a_run_that_ends_after_its_last_draw_still_tells_the_parts_of_llc(result, held, tmp_path):
    interrupted(result, tmp_path / "draws", at=DRAWS)
    assert not fastvi.load_draws(tmp_path / "draws").mean_energies.size
    found = fastvi.sample_posterior(
        result, DRAWS, store=tmp_path / "draws", progress=False, **NAMED
    )
    assert_same(found, held)
    np.testing.assert_allclose(found.mean_energies, held.mean_energies, rtol=1e-6)


def test_a_run_of_another_process_goes_on(result, held, tmp_path):
    """Whose estimate is another object, with the same numbers."""
    interrupted(result, tmp_path / "draws", at=20)
    found = fastvi.sample_posterior(
        estimated(), DRAWS, store=tmp_path / "draws", progress=False, **NAMED
    )
    assert_same(found, held)


def test_a_run_that_lost_its_first_block_begins_anew(result, held, tmp_path):
    interrupted(result, tmp_path / "draws", at=5)
    with pytest.raises(fastvi.DataError, match="holds 0 draws"):
        fastvi.load_draws(tmp_path / "draws")
    found = fastvi.sample_posterior(result, 8, store=tmp_path / "draws", progress=False, **NAMED)
    np.testing.assert_array_equal(found.losses["train"], held.losses["train"][:, :8])


def test_more_draws_go_on_from_fewer(result, held, tmp_path):
    """From the middle of a block, and fewer draws than there are change nothing."""
    path = tmp_path / "draws"
    options = {"store": path, "progress": False, **NAMED}
    fastvi.sample_posterior(result, 19, **options)
    interrupted(result, path, at=22)
    assert fastvi.load_draws(path).num_draws == 19
    assert_same(fastvi.sample_posterior(result, DRAWS, **options), held)
    before = contents(path)
    assert_same(fastvi.sample_posterior(result, 8, **options), held)
    assert contents(path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thin": 6}, "thin was 4, now 6"),
        ({"error": 0.02}, "error was 0.005, now 0.02"),
        ({"observables": {}}, "evaluated was"),
        ({"losses": {"train": TRAIN, "a/b": (INPUTS[:7], OUTPUTS[:7])}}, "data of a/b was"),
        (
            {"observables": {**NAMED["observables"], "norm": lambda w, _: 1.01 * jnp.sum(w**2)}},
            "observable_norm was",
        ),
    ],
)
def test_another_configuration_is_refused(changes, message, result, folder):
    before = contents(folder)
    with pytest.raises(fastvi.DataError, match=message):
        fastvi.sample_posterior(result, DRAWS, store=folder, progress=False, **{**NAMED, **changes})
    assert contents(folder) == before


def test_another_posterior_is_refused(folder):
    other = estimated(data=(INPUTS, OUTPUTS + 0.1), nbeta=10.0, key=1)
    with pytest.raises(fastvi.DataError, match=r"key was .*; data was .*; nbeta was .*loss at w\*"):
        fastvi.sample_posterior(other, DRAWS, store=folder, progress=False, **NAMED)


def test_folders_of_something_else_are_refused(result, tmp_path):
    (tmp_path / "thesis.txt").write_text("text")
    for call in (
        fastvi.load_draws,
        lambda path: fastvi.sample_posterior(result, 8, store=path, progress=False),
    ):
        with pytest.raises(fastvi.DataError, match="something else"):
            call(tmp_path)
    with pytest.raises(fastvi.DataError, match="holds no draws"):
        fastvi.load_draws(tmp_path / "nothing")
    with pytest.raises(fastvi.ConfigError, match="store must be a folder"):
        fastvi.sample_posterior(result, 8, store=3, progress=False)
    with pytest.raises(fastvi.ConfigError, match="can be made"):
        fastvi.sample_posterior(result, 8, store=tmp_path / "thesis.txt", progress=False)


def test_walkers_of_another_kind_are_refused(result, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "draws")
    with np.load(folder / "walkers.npz") as stored:
        np.savez(tmp_path / "draws/walkers.npz", **{**stored, "leaves": np.asarray(3)})
    with pytest.raises(fastvi.DataError, match="walkers of another estimate"):
        fastvi.sample_posterior(result, 40, store=tmp_path / "draws", progress=False, **NAMED)


def test_opened_draws_need_no_model_but_for_parameters(held, folder):
    found = fastvi.load_draws(folder)
    with pytest.raises(fastvi.DataError, match="without the model"):
        found.params(0, 0)
    np.testing.assert_array_equal(found.displacement[2, 5], held.displacement[2, 5])


def test_pieces_say_what_all_at_once_do(held, folder, monkeypatch):
    found = fastvi.load_draws(folder)
    expected = {
        "covariance": held.covariance("train", "weights"),
        "among": held.covariance("a/b"),
        "correlation": held.correlation("train", "a/b"),
        "influence": held.influence("train", "norm"),
        "susceptibility": held.susceptibility("train", "a/b"),
        "mean": held.mean("train"),
        "llc_on": held.llc_on("train"),
    }
    # pieces of 26 examples, the last of which is smaller
    monkeypatch.setattr(pieces, "PIECE_NUMBERS", 8 * DRAWS * 26)
    for name, one in {
        "covariance": found.covariance("train", "weights"),
        "among": found.covariance("a/b"),
        "correlation": found.correlation("train", "a/b"),
        "influence": found.influence("train", "norm"),
        "susceptibility": found.susceptibility("train", "a/b"),
        "mean": found.mean("train"),
        "llc_on": found.llc_on("train"),
    }.items():
        np.testing.assert_allclose(one.value, expected[name].value, rtol=1e-10, atol=1e-14)
        # spreads of blocks are in single precision
        np.testing.assert_allclose(one.sem, expected[name].sem, rtol=1e-5)


def test_pieces_of_arrays_are_their_moments():
    values, weights = RNG.normal(size=(4, 50, 3, 2)), plain_weights(4, 50, 2)
    np.testing.assert_allclose(mean_by_entry(weights, values).value, values.mean(axis=(0, 1)))
    np.testing.assert_allclose(
        mean_over_entries(values, np.ones((3, 2))), values.mean(axis=(2, 3)) - 1
    )
    scalar = values[..., 0, 0]
    found = covariance_by_entry(weights, values, scalar).value
    flat = values.reshape(200, 6)
    exact = (flat - flat.mean(axis=0)).T @ (flat[:, 0] - flat[:, 0].mean()) / 200
    # that of the means of eight blocks is added: a share of about 1/200
    np.testing.assert_allclose(found[:, 0], exact, atol=0.02)


def test_losses_of_some_examples_at_a_time_are_those_of_all(result, held, monkeypatch):
    monkeypatch.setattr(evaluate, "PIECE_NUMBERS", 8 * 25)
    found = fastvi.sample_posterior(result, 8, losses={"train": TRAIN}, progress=False)
    np.testing.assert_allclose(
        found.losses["train"], held.losses["train"][:, :8], rtol=1e-6, atol=1e-7
    )


def test_slices_of_stored_arrays_are_those_of_numpy(held, folder):
    stored, array = fastvi.load_draws(folder).losses["train"], held.losses["train"]
    assert (stored.shape, stored.ndim, stored.size) == (array.shape, array.ndim, array.size)
    for key in (
        np.s_[2],
        np.s_[-1, -1],
        np.s_[:, 3:20:2],
        np.s_[1:3, :, 5],
        np.s_[..., 4:9],
        np.s_[0, ..., 1],
        np.s_[:, -5:, -5:],
        np.s_[...],
    ):
        np.testing.assert_array_equal(stored[key], array[key])
    with pytest.raises(IndexError):
        stored[0, DRAWS]


def test_what_the_thread_raises_is_raised_to_the_caller():
    written, held_back = [], threading.Event()
    writer = BlockWriter()

    def fail():
        held_back.wait()
        raise OSError("no space left")

    writer.add(fail, 1)
    writer.add(lambda: written.append(1), 1)
    held_back.set()
    with pytest.raises(OSError, match="no space"):
        writer.close()
    # a block must not say that it is complete where one before it is not
    assert not written


def test_a_full_queue_waits_for_the_disk():
    writer, order = BlockWriter(), []
    for number in range(5):
        writer.add(lambda number=number: order.append(number), WAITING_BYTES // 2)
        assert len(order) >= number - 1
    writer.close()
    assert order == list(range(5))


def test_a_block_fits_its_memory():
    assert block_draws(8, 500, {"losses": (1000,)}) == 16
    assert block_draws(8, 500, {"losses": (100_000,)}) == 2
    assert block_draws(8, 500, {"losses": (10**8,)}) == 1
    assert block_draws(8, 10, {"losses": (10, 3)}) == 10
