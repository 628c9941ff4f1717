"""Data read in batches from the host give the llc of data in memory."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.fitting import stages
from fastvi.target import stream as streaming
from fastvi.target.batches import regrouped
from fastvi.target.stream import HostStream, OnePassStream, open_stream

COUNT, DIM, BATCH = 20_000, 5, 64
OPTIONS = {
    "method": "variational",
    "batch_size": BATCH,
    "steps": 1000,
    "eval_samples": 64,
    "progress": False,
    "M": 1,
    "r": 0,
}

rng = np.random.default_rng(1)
X = (rng.normal(size=(COUNT, DIM)) * np.logspace(-0.5, 0.5, DIM)).astype(np.float32)
Y = (X @ np.ones(DIM) + 0.5 * rng.normal(size=COUNT)).astype(np.float32)
W = np.linalg.lstsq(X, Y, rcond=None)[0].astype(np.float32)
ORDER = np.argsort(Y)  # the worst order for a reader that trusts it


class Batches:
    """Uneven batches in an order that says everything of the next."""

    def __init__(self, inputs=X[ORDER], targets=Y[ORDER], size=700):
        self.inputs, self.targets, self.size = inputs, targets, size

    def __iter__(self):
        for start in range(0, len(self.inputs), self.size):
            yield self.inputs[start : start + self.size], self.targets[start : start + self.size]


def loss_fn(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def stream(batches=None, most_bytes=1):
    return HostStream(batches or Batches(), np.float32, jax.random.key(0), BATCH, most_bytes)


def test_a_stream_has_the_llc_of_its_data(monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 1)
    held, streamed = (
        fastvi.estimate_llc(loss_fn, W, data, **OPTIONS) for data in ((X, Y), Batches())
    )
    nbeta = COUNT / np.log(COUNT)
    precision = nbeta * X.T @ X / COUNT
    exact = 0.5 * np.trace(precision @ np.linalg.inv(precision + np.eye(DIM)))
    assert streamed.fitted.problem.data.num_examples == 100 * BATCH < streamed.n_data == COUNT
    assert abs(streamed.llc - held.llc) < 4 * np.hypot(streamed.llc_sem, held.llc_sem)
    assert streamed.llc == pytest.approx(exact, rel=0.01)
    assert streamed.init_loss == pytest.approx(held.init_loss, rel=1e-5)
    assert streamed.work.total_fge == pytest.approx(held.work.total_fge, rel=0.2)
    with pytest.raises(fastvi.UnavailableError, match="in memory"):
        fastvi.correct(streamed, "sample", progress=False)


def test_a_stream_that_fits_is_held():
    """The same arrays in the same order, and the same program in the same process.

    The same bits.
    """
    held = fastvi.estimate_llc(loss_fn, W, (X[ORDER], Y[ORDER]), **OPTIONS)
    assert fastvi.estimate_llc(loss_fn, W, Batches(), **OPTIONS).llc == held.llc


def test_windows_are_uniform_draws():
    numbers = np.arange(COUNT, dtype=np.int32)
    source = stream(Batches(numbers, numbers))
    first, second = (np.asarray(source.window(step).examples[0]) for step in (0, 100))
    assert first.size == 100 * BATCH
    assert not np.array_equal(first, second)
    assert np.array_equal(
        first, np.asarray(stream(Batches(numbers, numbers)).window(99).examples[0])
    )
    both = np.concatenate([first, second])
    expected = both.size / 10
    counts = np.histogram(both, bins=10, range=(0, COUNT))[0]
    assert np.sum((counts - expected) ** 2 / expected) < 27.9  # chi squared, 9 degrees, 0.1 %
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / np.sqrt(first.size)


def test_pieces_are_all_the_data_in_order():
    parts = list(stream().pieces())
    assert [part.num_examples for part in parts] == [4096] * 4 + [COUNT - 4 * 4096]
    np.testing.assert_array_equal(np.concatenate([part.examples[1] for part in parts]), Y[ORDER])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (itertools.repeat((X, Y)), "Pass nbeta"),
        (Batches(X[:0], Y[:0]), "no examples"),
        (Batches(np.where(X > 3, np.nan, X), Y), "NaN or infinity"),
    ],
)
def test_streams_that_cannot_be_used(data, message):
    with pytest.raises(fastvi.DataError, match=message):
        fastvi.estimate_llc(loss_fn, W, data, progress=False)


@pytest.mark.parametrize("method", ["auto", "sample"])
def test_walkers_that_follow_a_fit_need_the_data(method, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 1)
    options = {"method": method, "batch_size": BATCH}
    with pytest.raises(fastvi.UnavailableError, match="in memory"):
        fastvi.estimate_llc(loss_fn, W, Batches(), progress=False, **options)


@pytest.mark.parametrize("source", [Batches, lambda: drawn_batches(X, Y)])
def test_walkers_walk_on_streams(source, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 1)
    monkeypatch.setattr(streaming, "CHUNK", 10)  # windows of 2,560 of the 20,000 examples
    options = {"nbeta": 20.0, "localization": 20.0, "error": 0.1, "budget": 2e4}
    result = fastvi.estimate_llc(loss_fn, W, source(), progress=False, **options)
    exact = exact_llc(20.0, localization=20.0)
    assert not result.has_fit
    assert abs(result.llc - exact) < 4 * result.llc_sem
    assert result.llc_sem < 0.2 * exact
    assert result.work.total_fge * result.n_data <= options["budget"]


def test_a_feed_makes_no_pass_for_the_rows_that_a_window_holds():
    numbers = np.arange(COUNT, dtype=np.int32)
    source = stream(Batches(numbers, numbers))
    expected = [np.asarray(source.window(step).examples[0]) for step in (0, 100)]
    source.window(0)
    passes, draw = [], source._draw
    source._draw = lambda number: passes.append(number) or draw(number)
    feed = source.feed()
    first = feed.take(50 * BATCH)[0]
    assert passes in ([], [1])  # the thread that reads ahead may have gone on to the second window
    rest = feed.take(150 * BATCH)[0]
    feed.close()
    assert passes[0] == 1
    np.testing.assert_array_equal(np.concatenate([first, rest]), np.concatenate(expected))


def test_an_iterator_is_read_no_further_than_the_walk():
    read = itertools.count()
    batches = (one for one, _ in zip(drawn_batches(X, Y, size=40), read, strict=False))
    options = {"nbeta": 20.0, "localization": 20.0, "budget": 3000.0}
    result = fastvi.estimate_llc(loss_fn, W, batches, progress=False, **options)
    # all but what the thread has read ahead
    assert (next(read) - 4) * 40 <= result.n_data <= next(read) * 40
    assert result.work.total_fge * result.n_data <= 3000


def test_an_iterator_that_ends_ends_the_walk():
    batches = itertools.islice(drawn_batches(X, Y, size=100), 60)
    options = {"nbeta": 20.0, "localization": 20.0, "error": 1e-3}
    result = fastvi.estimate_llc(loss_fn, W, batches, progress=False, **options)
    assert "data_ended" in [finding.name for finding in result.health]
    assert 3000 < result.n_data <= 6000
    assert abs(result.llc - exact_llc(20.0, localization=20.0)) < 4 * result.llc_sem


def test_what_an_iterator_raises_passes_through():
    def broken():
        yield from itertools.islice(drawn_batches(X, Y, size=100), 10)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        fastvi.estimate_llc(
            loss_fn, W, broken(), nbeta=20.0, localization=20.0, error=1e-3, progress=False
        )


def drawn_batches(*arrays, size=300, seed=5):
    """An endless generator of uniform draws."""
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(COUNT, size=size)
        yield tuple(array[rows] for array in arrays)


ONE_PASS = {**OPTIONS, "nbeta": 300.0, "steps": 400, "num_chains": 2}


def exact_llc(nbeta, weights=None, localization=1.0):
    hessian = np.average(X[:, :, None] * X[:, None], axis=0, weights=weights)
    localizer = localization * np.eye(DIM)
    return 0.5 * np.trace(nbeta * hessian @ np.linalg.inv(nbeta * hessian + localizer))


def test_data_that_are_read_once_have_their_llc():
    result = fastvi.estimate_llc(loss_fn, W, drawn_batches(X, Y), **ONE_PASS)
    assert result.n_data == 100 * BATCH
    assert abs(result.llc - exact_llc(300.0)) < 3 * result.llc_sem < 0.2
    assert result.fitted.fit.outcome.data_error > 0
    with pytest.raises(fastvi.UnavailableError, match="a sample"):
        fastvi.correct(result, "reweight", progress=False)


def test_a_weighted_loss_of_data_that_are_read_once():
    """The mean weight is that of the first window, and its error a part of the error."""
    weights = np.where(rng_of_weights.uniform(size=COUNT) < 0.2, 4.0, 0.5).astype(np.float32)
    minimum = np.linalg.solve((X * weights[:, None]).T @ X, (X * weights[:, None]).T @ Y)

    def weighted(w, batch):
        return 0.5 * (batch[0] @ w - batch[1]) ** 2, batch[2]

    source = drawn_batches(X, Y, weights)
    result = fastvi.estimate_llc(weighted, minimum.astype(np.float32), source, **ONE_PASS)
    assert abs(result.llc - exact_llc(300.0, weights)) < 3 * result.llc_sem < 0.3
    relative = np.std(weights) / np.mean(weights) / np.sqrt(100 * BATCH)
    assert result.fitted.fit.outcome.data_error > 0.5 * relative * result.llc


def walk_on_weighted(batches, weights):
    """Walk at the minimum of the squares with these weights."""
    minimum = np.linalg.solve((X * weights[:, None]).T @ X, (X * weights[:, None]).T @ Y)

    def weighted(w, batch):
        return 0.5 * (batch[0] @ w - batch[1]) ** 2, batch[2]

    result = fastvi.estimate_llc(
        weighted,
        minimum.astype(np.float32),
        batches,
        nbeta=20.0,
        localization=20.0,
        error=0.05,
        budget=1e5,
        progress=False,
    )
    assert not result.has_fit
    return result


def test_a_weighted_loss_walks_on_a_stream():
    weights = np.where(rng_of_weights.uniform(size=COUNT) < 0.2, 4.0, 0.5).astype(np.float32)
    result = walk_on_weighted(drawn_batches(X, Y, weights), weights)
    exact = exact_llc(20.0, weights, localization=20.0)
    assert abs(result.llc - exact) < 4 * result.llc_sem
    # of the 512 examples whose mean weight stands for that of all
    assert result.llc_sem > np.std(weights) / np.mean(weights) / np.sqrt(2 * 512) * exact


rng_of_weights = np.random.default_rng(8)


class WeightedBatches:
    """Batches in the order of the data, of some passes."""

    def __init__(self, weights, passes=1):
        self.weights, self.passes = weights, passes

    def __iter__(self):
        for start in itertools.chain(*(range(0, COUNT, 500) for _ in range(self.passes))):
            yield tuple(array[start : start + 500] for array in (X, Y, self.weights))


@pytest.mark.parametrize("later", [0.2, -1.0])
def test_weights_that_come_sorted_are_seen(later):
    weights = np.where(np.arange(COUNT) < COUNT // 2, 1.0, later).astype(np.float32)
    batches = iter(WeightedBatches(weights, passes=20))
    if later < 0:  # the first batches, which are looked at ahead, have none of these
        with pytest.raises(fastvi.DataError, match="must be finite and at least 0"):
            walk_on_weighted(batches, np.abs(weights))
        return
    result = walk_on_weighted(batches, weights)
    assert "weights_drift" in [finding.name for finding in result.health]
    exact = exact_llc(20.0, weights, localization=20.0)
    # divided by 1, the mean of the first half, where that of all is 0.6
    assert abs(result.llc - exact) < 4 * result.llc_sem
    assert 0.25 < result.llc_sem / result.llc < 0.6


def test_weights_of_random_examples_do_not_drift():
    weights = np.where(rng_of_weights.uniform(size=COUNT) < 0.05, 10.0, 0.5).astype(np.float32)
    result = walk_on_weighted(WeightedBatches(weights), weights)
    assert "weights_drift" not in [finding.name for finding in result.health]
    assert abs(result.llc - exact_llc(20.0, weights, localization=20.0)) < 4 * result.llc_sem


def test_an_iterator_that_ends_soon_is_held():
    held = fastvi.estimate_llc(loss_fn, W, (X[:5000], Y[:5000]), **ONE_PASS)
    batches = iter(Batches(X[:5000], Y[:5000]))
    result = fastvi.estimate_llc(loss_fn, W, batches, **ONE_PASS)
    assert (result.llc, result.llc_sem, result.n_data) == (held.llc, held.llc_sem, 5000)


def test_the_last_batch_may_have_fewer_examples_than_arrays():
    """Three arrays of one shape, as of tokens, masks and labels; one row is left for the end."""
    columns = [np.arange(9, dtype=np.float32)[:, None] + shift for shift in range(3)]

    def batches():
        for start in (0, 8):
            yield tuple(column[start : start + 8] for column in columns)

    source = open_stream(batches(), np.float32, jax.random.key(0), BATCH)
    assert source.fits
    np.testing.assert_array_equal(np.asarray(source.window(0).examples[2]), columns[2])


def test_a_saddle_of_data_that_are_read_once_needs_no_more_of_them():
    """Only as many batches as the fit and its evaluation take; the direction is followed after."""

    def saddle(w, batch):
        return 0.5 * jnp.mean(batch) * (w[0] ** 2 - 0.5 * w[1] ** 2 + 0.25 * w[1] ** 4)

    options = ONE_PASS | {"steps": 200, "curvature_rank": 0, "nbeta": 1e3, "localization": 1.0}
    rows = np.ones((3 * 100 * BATCH, 1), np.float32)  # two chunks of steps, and a sample
    batches = iter([rows[start : start + 500] for start in range(0, len(rows), 500)])
    result = fastvi.estimate_llc(saddle, np.zeros(2, np.float32), batches, **options)
    assert "not_a_minimum" in {finding.name for finding in result.health}


def test_pieces_of_one_size_hold_every_example_once():
    rows = np.arange(200)
    for size in (1, 7, 64, 50, 199, 200, 400):
        for cut in (1, 20, 67, 200):
            given = (rows[start : start + cut] for start in range(0, 200, cut))
            pieces = list(regrouped(given, size))
            np.testing.assert_array_equal(np.concatenate(pieces), rows)
            assert {len(piece) for piece in pieces[:-1]} <= {size}
            assert len(pieces[-1]) <= size


def test_hessian_products_of_a_stream_are_taken_once(monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 1)
    calls = []
    original = stages.evaluate
    monkeypatch.setattr(
        stages, "evaluate", lambda *args, **options: calls.append(1) or original(*args, **options)
    )

    def fresh_loss(w, batch):  # of its own, so that its programs are traced here
        return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2) + 0.0 * jnp.sum(w)

    options = OPTIONS | {"steps": 100, "control_variate": "hvp"}
    result = fastvi.estimate_llc(fresh_loss, W, Batches(), num_chains=1, **options)
    assert len(calls) == 1  # traced for the last piece alone
    assert abs(result.llc - exact_llc(COUNT / np.log(COUNT))) < 0.05 * result.llc


def test_what_an_iterator_cannot_do():
    with pytest.raises(fastvi.DataError, match="ended after"):
        fastvi.estimate_llc(loss_fn, W, iter(Batches()), **ONE_PASS)
    with pytest.raises(fastvi.DataError, match="read again"):
        fastvi.estimate_llc(loss_fn, W, drawn_batches(X, Y), **ONE_PASS, resume_from="nowhere")
    with pytest.raises(fastvi.DataError, match="only once"):
        fastvi.llc_curve(loss_fn, [W], drawn_batches(X, Y), **ONE_PASS)
    source = OnePassStream(drawn_batches(X, Y), np.float32, BATCH)
    first, cursor = source.next(source.num_data)
    assert cursor == source.num_data + first[1].size
    with pytest.raises(fastvi.DataError, match="only once"):
        source.next(source.num_data)


MEMORY = """
import resource, sys
import jax.numpy as jnp, numpy as np, fastvi, fastvi.target.stream
fastvi.target.stream.WINDOW_BYTES = 2**22

class Batches:
    def __iter__(self):
        for number in range(int(sys.argv[1])):
            rng = np.random.default_rng(number)
            inputs = rng.normal(size=(1000, 100)).astype(np.float32)
            yield inputs, inputs[:, 0] + rng.normal(size=1000).astype(np.float32)

def loss_fn(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)

options = dict(steps=200, num_chains=1, batch_size=64, eval_samples=16, early_stop=False)
result = fastvi.estimate_llc(loss_fn, jnp.eye(100)[0], Batches(), progress=False, **options)
print(result.n_data, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_is_flat():
    """100 times the examples, 800 MB against 8, in windows of 4.

    Less than 20 MB more at the peak.
    """
    peaks = {}
    for batches in (20, 2000):
        out = subprocess.run(
            [sys.executable, "-c", MEMORY, str(batches)], capture_output=True, text=True, check=True
        )
        count, peak = out.stdout.split()
        assert int(count) == 1000 * batches
        peaks[batches] = float(peak)
    assert peaks[2000] - peaks[20] < 20, peaks
