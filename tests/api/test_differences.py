"""Differences of estimates: closed forms, and errors that common noise makes small."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.evaluation.errors import ErrorParts
from fastvi.results.differences import difference, shared_walk

COUNT, DIM, GAMMA = 100, 4, 2.0
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(COUNT, DIM)) * np.linspace(0.3, 2.0, DIM)
WEIGHTS = np.ones(DIM)
NBETA = COUNT / np.log(COUNT)


def loss_fn(w, batch):
    return 0.5 * (batch[0] @ w - batch[1]) ** 2


def estimated(scale, key):
    """Estimate a regression without noise, whose inputs are so many times as large."""
    inputs = scale * INPUTS
    return fastvi.estimate_llc(
        loss_fn,
        jnp.asarray(WEIGHTS, jnp.float32),
        (inputs.astype(np.float32), (inputs @ WEIGHTS).astype(np.float32)),
        localization=GAMMA,
        method="sample",
        key=key,
        progress=False,
    )


def exact_llc(scale):
    held = NBETA * scale**2 * np.linalg.eigvalsh(INPUTS.T @ INPUTS / COUNT)
    return 0.5 * np.sum(held / (held + GAMMA))


@pytest.fixture(scope="module")
def estimates():
    return {"one": estimated(1.0, 2), "wider": estimated(1.2, 2), "again": estimated(1.0, 5)}


def test_walks_on_common_noise_tell_a_difference_much_better(estimates):
    found = fastvi.compare(estimates).between("one", "wider")
    exact = exact_llc(1.2) - exact_llc(1.0)
    assert abs(found.value - exact) < 4.5 * found.sem
    assert found.paired
    assert found.correlation > 0.9
    alone = [estimates[name].llc_sem for name in ("one", "wider")]
    assert found.sem < 0.5 * math.hypot(*alone)
    assert found.z == found.value / found.sem


def test_walks_on_other_noise_have_independent_errors(estimates):
    found = fastvi.compare(estimates).between("one", "again")
    assert not found.paired
    assert abs(found.correlation) < 0.5
    assert found.value == estimates["again"].llc - estimates["one"].llc
    assert found.sem == math.hypot(estimates["one"].llc_sem, estimates["again"].llc_sem)
    assert abs(found.z) < 4.5


def test_an_estimate_does_not_differ_from_itself(estimates):
    found = difference(estimates["one"], estimates["one"])
    assert (found.value, found.sem, found.correlation) == (0.0, 0.0, 1.0)
    assert math.isnan(found.z)
    assert found.paired


def walked(estimate, walk, first_step, burn_in=0, parts=(1.0, 0.3, 0.2, 0.1)):
    """Return an estimate of this walk, whose bins are of four steps."""
    details = estimate.correction._replace(
        steps=4 * walk.shape[1], burn_in=4 * burn_in, first_step=first_step
    )
    kept, errors = walk[:, burn_in:], ErrorParts(*parts)
    return dataclasses.replace(
        estimate,
        llc=float(kept.mean()),
        llc_sem=errors.total,
        error_parts=errors,
        correction=details,
        walk_llc=walk,
    )


def test_bins_are_paired_by_their_steps(estimates):
    """Common noise of variance 1 and own noise of variance 1/9: the correlation is 0.9."""
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(64, 60))
    first, second = (noise + rng.normal(size=noise.shape) / 3 for _ in range(2))
    # the second began three bins later, and each leaves some of its first bins out
    pair = [
        walked(estimates["one"], first, 16, burn_in=2),
        walked(estimates["one"], second[:, 3:] + 0.5, 28, burn_in=5),
    ]
    shared = shared_walk(*pair)
    assert shared.correlation == pytest.approx(0.9, abs=0.05)
    assert shared.value == pytest.approx((second - first)[:, 8:].mean() + 0.5)
    found = difference(*pair)
    systematic = 2 * (1 - shared.correlation) * (0.3**2 + 0.2**2 + 0.1**2)
    assert found.sem == pytest.approx(math.hypot(shared.sem, math.sqrt(systematic)))
    assert shared.sem == pytest.approx(math.sqrt(2 / 9 / (64 * 52)), rel=0.2)


def test_what_each_llc_has_beside_the_mean_of_its_walk_counts(estimates):
    """The second walk is hotter by half a nat, which its llc has taken off already."""
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(64, 60))
    pair = [
        walked(estimates["one"], noise + rng.normal(size=noise.shape) / 30, 16),
        walked(estimates["one"], noise + rng.normal(size=noise.shape) / 30 + 0.5, 16),
    ]
    pair[1] = dataclasses.replace(pair[1], llc=pair[1].llc - 0.5)
    found = difference(*pair)
    assert found.value == pytest.approx(pair[1].llc - pair[0].llc)
    assert abs(found.value) < 0.01
    # how much more one has taken off is no better known than that
    assert found.sem > 0.5


@pytest.mark.parametrize("case", ["walkers", "phase", "short", "still", "unwalked"])
def test_walks_that_cannot_be_paired_are_not(case, estimates):
    walk = np.random.default_rng(4).normal(size=(8, 40))
    one = walked(estimates["one"], walk, 16)
    other = {
        "walkers": walked(estimates["one"], walk[:4], 16),
        "phase": walked(estimates["one"], walk, 18),
        "short": walked(estimates["one"], walk, 16 + 4 * 35),
        "still": walked(estimates["one"], np.ones_like(walk), 16),
        "unwalked": dataclasses.replace(one, correction=None),
    }[case]
    found = difference(one, other)
    assert not found.paired
    assert math.isnan(found.correlation)
    assert found.sem == pytest.approx(math.hypot(one.llc_sem, other.llc_sem))


def test_table_and_figure_have_every_difference(estimates):
    compared = fastvi.compare(estimates)
    text = compared.summary()
    assert len(text.splitlines()) == 3 + 3
    assert "again - one" in text
    assert "paired, correlation" in text
    assert "independent errors" in text
    assert [one.paired for one in compared.differences] == [True, False]
    above, below = compared.plot().axes
    np.testing.assert_allclose(above.lines[0].get_ydata(), [one.llc for one in estimates.values()])
    shown = [one.get_ydata()[0] for one in below.lines if one.get_marker() == "o"]
    np.testing.assert_allclose(shown, [one.value for one in compared.differences])


@pytest.mark.parametrize("given", [{}, {"one": 1}, [1, 2]])
def test_fewer_than_two_estimates_by_name_are_refused(given):
    with pytest.raises(fastvi.ConfigError, match="two or more estimates by name"):
        fastvi.compare(given)


def test_unknown_names_are_refused(estimates):
    with pytest.raises(fastvi.ConfigError, match="'two' was not compared"):
        fastvi.compare(estimates).between("one", "two")


def test_differences_outlive_the_disk(estimates, tmp_path):
    loaded = [
        fastvi.LLCEstimate.load(estimates[name].save(tmp_path / name)) for name in ("one", "wider")
    ]
    assert difference(*loaded) == difference(estimates["one"], estimates["wider"])


def test_a_curve_tells_differences_of_its_checkpoints(estimates):
    curve = fastvi.LLCCurve((estimates["one"], estimates["wider"]))
    assert curve.differences == (difference(estimates["one"], estimates["wider"]),)
    above, below = curve.plot([10, 300]).axes
    assert above.lines[0].get_xdata().tolist() == [10, 300]
    assert below.get_xlabel() == "training step"
    with pytest.raises(fastvi.ConfigError, match="one number for each of the 2 checkpoints"):
        curve.plot([1.0])
