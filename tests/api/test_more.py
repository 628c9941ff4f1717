"""An estimate that ends early says so and goes on from where it is."""

import dataclasses
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi import ConfigError, DataError, LLCEstimate, estimate_llc
from fastvi.results.early_end import EarlyEnd

NBETA, GAMMA = 30.0, 2.0
SCALES = jnp.array([0.5, 1.0, 2.0, 4.0])
EXACT = float(np.sum(0.5 * NBETA * SCALES / (NBETA * SCALES + GAMMA)))
DATA = (jax.random.normal(jax.random.key(3), (64, 4)),)


def loss_fn(w, batch):
    # examples are noisy about the mean, so that a batch is not all data
    return 0.5 * jnp.sum(SCALES * w**2) + jnp.mean(batch[0] - jnp.mean(DATA[0], 0), 0) @ w


def estimate(**options):
    options = {"progress": False, "nbeta": NBETA, "localization": GAMMA} | options
    return estimate_llc(loss_fn, jnp.zeros(4), DATA, **options)


STARTS = {
    "localizer": {"sampler": {"start": "localizer"}},
    "fit": {"method": "sample", "sampler": {"start": "fit"}, "M": 1, "r": 0},
}


@pytest.fixture(scope="module", params=STARTS)
def rough(request):
    return estimate(error=0.09, **STARTS[request.param])


def test_more_goes_on_with_the_average(rough):
    again = rough.more(0.05, progress=False)
    assert again.llc_sem <= 0.05 * again.llc
    assert abs(again.llc - EXACT) < 4 * again.llc_sem
    assert again.work.total_fge > rough.work.total_fge
    assert again.config.error == 0.05
    # what was averaged counts: it is the beginning of the longer record
    bins = rough.walk_llc.shape[1]
    np.testing.assert_array_equal(again.walk_llc[:, :bins], rough.walk_llc)
    assert again.correction.steps > rough.correction.steps
    assert again.correction.first_step == rough.correction.first_step
    assert again.timings.total > rough.timings.total


def test_a_finished_estimate_has_nothing_to_add(rough):
    assert rough.more(progress=False).llc == rough.llc


def test_what_ends_in_vain_keeps_the_better_number(rough):
    again = rough.more(1e-4, budget=3e5, time_limit=1e-3, progress=False)
    assert again.llc_sem <= rough.llc_sem
    assert again.work.total_fge >= rough.work.total_fge
    assert "time_limit of 0.001 s" in again.stopped


def test_a_budget_that_pays_for_nothing_is_refused(rough):
    with pytest.raises(ConfigError, match="pay for no"):
        rough.more(0.001, budget=1.0, progress=False)


def test_what_holds_no_walk_says_what_to_do(rough, tmp_path):
    loaded = LLCEstimate.load(rough.save(tmp_path))
    assert loaded.stopped is None
    with pytest.raises(DataError, match="loaded from disk"):
        loaded.more(0.01)
    with pytest.raises(DataError, match=r'fastvi.correct\(result, "sample"'):
        dataclasses.replace(loaded, correction=None).more(0.01)


@pytest.mark.parametrize("start", STARTS)
def test_a_time_limit_ends_with_the_error_of_what_there_is(start, tmp_path):
    ended = estimate(error=1e-4, time_limit=1e-3, **STARTS[start])
    assert ended.stopped == "its time_limit of 0.001 s"
    assert not ended.correction.settled
    (finding,) = [one for one in ended.health if one.name == "walk_unsettled"]
    assert "its time_limit of 0.001 s, which ended it" in finding.observed
    assert "result.more()" in finding.next_step
    assert abs(ended.llc - EXACT) < 4 * ended.llc_sem
    assert LLCEstimate.load(ended.save(tmp_path)).stopped == ended.stopped


def test_a_fit_ends_at_its_time_limit():
    ended = estimate(method="variational", time_limit=1e-3, num_chains=1, M=1, r=0)
    assert ended.stopped == "its time_limit of 0.001 s"
    assert ended.traces["elbo"].shape[1] < 5000
    assert "fit_stopped" in [finding.name for finding in ended.health]


@pytest.mark.parametrize("limit", [0, -1.0, "long", True])
def test_impossible_limits_are_refused(limit):
    with pytest.raises(ConfigError, match="time_limit must be a positive number of seconds"):
        EarlyEnd(limit)


def test_ctrl_c_ends_with_what_there_is_and_twice_at_once(capsys):
    def press(progress):
        if signal.getsignal(signal.SIGINT) is not before:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    ended = estimate(error=1e-4, progress=press, **STARTS["localizer"])
    assert ended.stopped == "Ctrl-C"
    assert abs(ended.llc - EXACT) < 4 * ended.llc_sem

    def press_twice(progress):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        estimate(error=1e-4, progress=press_twice, **STARTS["localizer"])
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_of_others_are_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with EarlyEnd().interruptible(tells=False):
            os.kill(os.getpid(), signal.SIGINT)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def elsewhere():
        with EarlyEnd().interruptible(tells=False):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_notebooks_show_number_findings_and_summary(rough):
    page = rough._repr_html_()
    assert f"llc {rough.llc_text}" in page
    assert "<script" not in page
    bad = dataclasses.replace(
        rough, health=(fastvi.results.findings.Finding("error", "x", "<b>", "c", "d"),)
    )
    assert "&lt;b&gt; c" in bad._repr_html_()
