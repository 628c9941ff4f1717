"""Some of the weights, other data, the curve over training: losses whose llc is known."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64

import fastvi

COUNT = 400
OPTIONS = {
    "method": "variational",
    "steps": 400,
    "eval_samples": 64,
    "progress": False,
    "num_chains": 2,
    "early_stop": False,
    "M": 1,
    "r": 0,
}

rng = np.random.default_rng(3)
X = (rng.normal(size=(COUNT, 6)) * np.logspace(-1, 0.5, 6)).astype(np.float32)
W = np.arange(6, dtype=np.float32)
Y = (X @ W + 0.3 * rng.normal(size=COUNT)).astype(np.float32)
W = np.linalg.lstsq(X, Y, rcond=None)[0].astype(np.float32)
PARAMS = {"first": {"w": W[:2], "b": W[2:3]}, "last": W[3:]}
COLUMNS = {"['first']['b']": [2], "['first']['w']": [0, 1], "['last']": [3, 4, 5]}
NBETA = COUNT / np.log(COUNT)


def loss_fn(params, batch):
    flat = jnp.concatenate([params["first"]["w"], params["first"]["b"], params["last"]])
    return 0.5 * jnp.mean((batch[0] @ flat - batch[1]) ** 2)


def exact(columns, inputs=X):
    """1/2 tr(A (A + gamma)^-1), the posterior being that of X and the loss that of `inputs`."""
    precision = NBETA * X[:, columns].T @ X[:, columns] / COUNT
    measured = NBETA * inputs[:, columns].T @ inputs[:, columns] / len(inputs)
    return 0.5 * np.trace(measured @ np.linalg.inv(precision + np.eye(len(columns))))


@pytest.mark.parametrize(
    ("mask", "columns"),
    [
        ({"first": {"w": True, "b": False}, "last": False}, [0, 1]),
        ({"first": False, "last": True}, [3, 4, 5]),
        (
            {
                "first": {"w": np.array([False, True]), "b": True},
                "last": np.array([True, False, True]),
            },
            [1, 2, 3, 5],
        ),
        # each selects what a mask above does, and shares its programs
        (lambda path: path == "['first']['w']", [0, 1]),
        (lambda path: path.startswith("['last']"), [3, 4, 5]),
    ],
)
def test_weight_restricted(mask, columns):
    result = fastvi.estimate_llc(loss_fn, PARAMS, (X, Y), param_mask=mask, **OPTIONS)
    assert result.dim == len(columns)
    assert result.llc == pytest.approx(exact(columns), rel=0.02)
    assert result.init_loss == pytest.approx(float(loss_fn(PARAMS, (X, Y))), rel=1e-5)


def test_a_restricted_loss_is_the_loss():
    mask = {"first": {"w": np.array([True, False]), "b": True}, "last": False}
    restricted, free = fastvi.restrict(loss_fn, PARAMS, mask)
    assert [leaf.tolist() for leaf in free] == [W[2:3].tolist(), W[:1].tolist()]
    moved = {**PARAMS, "first": {"w": W[:2] + np.array([0.5, 0], np.float32), "b": W[2:3] - 1}}
    assert restricted((free[0] - 1, free[1] + 0.5), (X, Y)) == pytest.approx(
        float(loss_fn(moved, (X, Y))), rel=1e-6
    )
    again = fastvi.restrict(loss_fn, PARAMS, mask)[0]
    assert again == restricted
    assert hash(again) == hash(restricted)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda path: False, "must let some parameter vary"),
        ({"first": True}, "structure of params"),
        ({"first": True, "last": np.ones(2, bool)}, r"boolean array of shape \(3,\)"),
        ({"first": True, "last": 1}, "must be a bool"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(fastvi.ConfigError, match=message):
        fastvi.estimate_llc(loss_fn, PARAMS, (X, Y), param_mask=mask, **OPTIONS)


@pytest.fixture(scope="module")
def result():
    """A fit in float64, where losses of the same draws by another program are the same numbers."""
    with enable_x64(True):
        return fastvi.estimate_llc(loss_fn, PARAMS, (X, Y), dtype="float64", **OPTIONS)


@pytest.mark.usefixtures("x64")
def test_data_restricted(result):
    """The posterior of all data, the loss of every other example."""
    some = (X[::2], Y[::2])
    estimate = fastvi.llc_on(result, some)
    assert estimate.init_loss == pytest.approx(float(loss_fn(PARAMS, some)), rel=1e-5)
    # w* is no minimum of the part: its slope has no mean under q, which is centred at w*
    assert estimate.llc == pytest.approx(exact(range(6), X[::2]), abs=4 * estimate.llc_sem + 0.02)
    assert fastvi.llc_on(result, (X, Y)).llc == pytest.approx(
        np.mean(result.evaluation.llc_mc), rel=1e-9
    )


@pytest.mark.usefixtures("x64")
def test_losses_of_single_examples(result):
    traces = fastvi.example_losses(result, (X, Y))
    assert traces.shape == (2, 64, COUNT)
    reference = 0.5 * (X.astype(float) @ W - Y) ** 2
    llc = NBETA * (traces - reference).mean(axis=(1, 2))
    np.testing.assert_allclose(llc, result.evaluation.llc_mc, rtol=1e-9)


def test_loaded_estimates_hold_no_draws(result, tmp_path):
    loaded = fastvi.LLCEstimate.load(result.save(tmp_path))
    with pytest.raises(fastvi.DataError, match="holds no fit"):
        fastvi.llc_on(loaded, (X, Y))


def test_a_curve_has_no_use_for_walks_without_a_fit():
    with pytest.raises(fastvi.ConfigError, match="Call estimate_llc at each checkpoint"):
        fastvi.llc_curve(lambda w, b: jnp.mean(w), [W], (X, Y), sampler={"start": "localizer"})


def test_curve_over_checkpoints():
    """Two equal columns.

    The minima are a line, the posterior moves along it with w*, and its llc stays.
    """
    inputs = X[:, [0, 1, 2, 3, 4, 4]]
    precision = NBETA * inputs.T @ inputs / COUNT
    llc = 0.5 * np.trace(precision @ np.linalg.inv(precision + np.eye(6)))

    def loss(w, batch):
        return 0.5 * jnp.mean((batch[0] @ w) ** 2)

    checkpoints = [number * np.array([0, 0, 0, 0, 1, -1], np.float32) for number in range(4)]
    curve = fastvi.llc_curve(loss, checkpoints, (inputs,), **OPTIONS)
    np.testing.assert_allclose(curve.llc, llc, rtol=0.02)
    cold = fastvi.llc_curve(loss, checkpoints[:2], (inputs,), **OPTIONS, warm_start=False)
    spent = [
        one.work.total_fge - one.work.fge_look for one in (curve.estimates[0], *cold.estimates)
    ]
    assert spent[0] == spent[1] == pytest.approx(spent[2])
    assert np.all(curve.total_fge[1:] < cold.total_fge[1])
    short = fastvi.llc_curve(loss, checkpoints[:2], (inputs,), **OPTIONS, warm_steps=50)
    assert short.total_fge[0] == curve.total_fge[0]
    assert short.estimates[1].traces["elbo"].shape[1] == 50
    assert curve.estimates[1].work.n_hvp == 0
    assert [estimate.fitted is None for estimate in curve.estimates] == [True, True, True, False]
    with pytest.raises(fastvi.ConfigError, match="got warm_start=False"):
        fastvi.llc_curve(loss, checkpoints, (inputs,), **OPTIONS, warm_start=False, warm_steps=5)
    with pytest.raises(fastvi.DataError, match="at least one checkpoint"):
        fastvi.llc_curve(loss, [], (inputs,), **OPTIONS)
    # the first is the fit of before, which compiles nothing
    smaller = [checkpoints[0], np.zeros(5, np.float32)]
    with pytest.raises(fastvi.DataError, match="checkpoint 1 has 5 parameters, the one before 6"):
        fastvi.llc_curve(loss, smaller, (inputs,), **OPTIONS)
    folded = [checkpoints[0], np.zeros((3, 2), np.float32)]
    with pytest.raises(
        fastvi.DataError, match=r"checkpoint 1 has parameters .*\(3, 2\).*before .*\(6,\)"
    ):
        fastvi.llc_curve(loss, folded, (inputs,), **OPTIONS)
    with pytest.raises(fastvi.DataError, match="got a mapping"):
        fastvi.llc_curve(loss, {"w": checkpoints[0]}, (inputs,), **OPTIONS)
    # the work that is done is kept where a checkpoint, or what reads it, fails: the same programs,
    # the same bits
    with pytest.raises(fastvi.DataError, match="NaN or infinity.*\n.*at checkpoint 1") as caught:
        fastvi.llc_curve(
            loss, [checkpoints[0], np.full(6, np.nan, np.float32)], (inputs,), **OPTIONS
        )
    np.testing.assert_array_equal(caught.value.partial.llc, curve.llc[:1])
    assert caught.value.partial.estimates[0].fitted is not None
    with pytest.raises(OSError, match="no such file.*\n.*at checkpoint 1") as lost:
        fastvi.llc_curve(loss, unreadable(checkpoints[0]), (inputs,), **OPTIONS)
    np.testing.assert_array_equal(lost.value.partial.llc, curve.llc[:1])


def unreadable(first):
    yield first
    raise OSError("no such file")
