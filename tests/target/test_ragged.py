"""Padded sequences have the loss and the llc of the tokens that they hold."""

import numpy as np
import pytest

import fastvi

COUNT, DIM = 400, 3
rng = np.random.default_rng(5)
LENGTHS = rng.choice([1, 2, 11], size=COUNT)
# long sequences have larger inputs, so that a mean over sequences is another loss
INPUTS = [(rng.normal(size=(n, DIM)) * n / 11).astype(np.float32) for n in LENGTHS]
TARGETS = [(row @ np.ones(DIM) + rng.normal(size=len(row))).astype(np.float32) for row in INPUTS]
X, Y = np.concatenate(INPUTS), np.concatenate(TARGETS)
W = np.linalg.lstsq(X, Y, rcond=None)[0].astype(np.float32)


def padded():
    inputs, weights = fastvi.pad_sequences(INPUTS, pad_value=7.0)
    targets, same = fastvi.pad_sequences(TARGETS, pad_value=-3.0)
    np.testing.assert_array_equal(weights, same)
    return inputs, targets, weights


def weighted(w, batch):
    inputs, targets, weights = batch
    return 0.5 * (inputs @ w - targets) ** 2, weights


def test_the_weighted_loss_is_the_mean_over_tokens():
    data = padded()
    assert data[0].shape == (COUNT, LENGTHS.max(), DIM)
    assert data[2].sum() == len(Y)
    for w in (W, W + 1):
        losses, weights = (np.asarray(part, float) for part in weighted(w, data))
        mean = 0.5 * np.mean((X.astype(float) @ w - Y) ** 2)
        assert np.sum(weights * losses) / np.sum(weights) == pytest.approx(mean, rel=1e-6)


def llc_of(hessian, nbeta=20.0, localization=20.0):
    return 0.5 * np.trace(
        nbeta * hessian @ np.linalg.inv(nbeta * hessian + localization * np.eye(DIM))
    )


def test_padded_sequences_have_the_llc_of_their_tokens():
    options = {"budget": 1e6, "sampler": {"start": "localizer"}, "progress": False}
    result = fastvi.estimate_llc(weighted, W, padded(), nbeta=20.0, localization=20.0, **options)
    assert abs(result.llc - llc_of(X.T @ X / len(X))) < 4 * result.llc_sem
    # and not that of a mean over sequences
    by_sequence = np.mean([row.T @ row / len(row) for row in INPUTS], axis=0)
    assert abs(result.llc - llc_of(by_sequence)) > 8 * result.llc_sem
    # nor that of a mean over all rows of the padded arrays
    assert abs(result.llc - llc_of(X.T @ X / (COUNT * LENGTHS.max()))) > 8 * result.llc_sem


def test_tokens_stay_where_they_were():
    tokens, weights = fastvi.pad_sequences([[5, 6, 7], [8], []], pad_value=-1)
    np.testing.assert_array_equal(tokens, [[5, 6, 7], [8, -1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(weights, [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert tokens.dtype.kind == "i"
    cut, weights = fastvi.pad_sequences([[5, 6, 7], [8]], length=2, truncate=True)
    np.testing.assert_array_equal(cut, [[5, 6], [8, 0]])
    np.testing.assert_array_equal(weights, [[1, 1], [1, 0]])
    longer, weights = fastvi.pad_sequences([np.array([1], np.uint8)], length=3)
    assert longer.dtype == np.uint8
    assert (longer.tolist(), weights.tolist()) == ([[1, 0, 0]], [[1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: fastvi.pad_sequences([]), fastvi.DataError, "no tokens"),
        (lambda: fastvi.pad_sequences([[], []]), fastvi.DataError, "no tokens"),
        (lambda: fastvi.pad_sequences([1, 2]), fastvi.DataError, r"sequences\[0\] is a number"),
        (lambda: fastvi.pad_sequences([["a"]]), fastvi.DataError, r"sequences\[0\] has dtype <U1"),
        (lambda: fastvi.pad_sequences(["ab"]), fastvi.DataError, r"sequences\[0\] has dtype <U2"),
        (
            lambda: fastvi.pad_sequences([np.ones((2, 3)), np.ones((2, 4))]),
            fastvi.DataError,
            r"first axis alone.*\(3,\), \(4,\)",
        ),
        (
            lambda: fastvi.pad_sequences([[1, 2, 3]], length=2),
            fastvi.DataError,
            "3 tokens is longer than length=2.*truncate=True",
        ),
        (lambda: fastvi.pad_sequences([[1]], length=0), fastvi.ConfigError, "length.*got 0"),
        (lambda: fastvi.pad_sequences([[1]], pad_value=0.5), fastvi.ConfigError, "pad_value.*0.5"),
        (
            lambda: fastvi.pad_sequences([np.ones(1, np.uint8)], pad_value=-1),
            fastvi.ConfigError,
            "uint8 holds; got -1",
        ),
        (
            lambda: fastvi.pad_sequences([[1.0]], pad_value=np.nan),
            fastvi.ConfigError,
            "pad_value.*nan",
        ),
    ],
)
def test_what_cannot_be_padded(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
