"""A mistake at the door is a ValueError of this package that names the field and what came."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
import fastvi.api.estimate
from fastvi._errors import ConfigError, DataError, NonFiniteError, UnavailableError
from fastvi.target.objective import make_flat_objective

DIM, COUNT = 3, 10
X, Y = np.ones((COUNT, DIM), np.float32), np.ones((COUNT, 1), np.float32)


def loss(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w) ** 2)


def raising(w, batch):
    raise RuntimeError("no such layer")


OBJECTIVE = make_flat_objective(loss)
CENTER = jnp.zeros(DIM)


def objective(fn):
    return make_flat_objective(fn)


def whitener(shape):
    return types.SimpleNamespace(A_sqrt=np.ones(shape, np.float32))


ESTIMATE = {"loss_fn": loss, "params": CENTER, "data": (X, Y), "progress": False}
FIT = {
    "rng_key": jax.random.key(0),
    "objective": OBJECTIVE,
    "wstar_flat": CENTER,
    "data": (X, Y),
    "n_data": COUNT,
    "beta": 0.4,
    "gamma": 1.0,
    "vi_cfg": {"steps": 10},
}
RUN_VI = {
    "key": 0,
    "posterior": CENTER,
    "data": (X, Y),
    "config": {"steps": 10},
    "num_chains": 2,
    "loss_minibatch_flat": loss,
    "grad_loss_minibatch": None,
    "loss_full_flat": lambda w: loss(w, (X, Y)),
    "n_data": COUNT,
    "beta": 0.4,
    "gamma": 1.0,
}
with_nan = X.copy()
with_nan[3, 1] = np.nan

# what is wrong: (what changes, the error, words that its message must hold)
ESTIMATE_CASES = {
    "data of different lengths": ({"data": (X, Y[:7])}, DataError, ["data", "10", "7"]),
    "NaN in the data": ({"data": (with_nan, Y)}, DataError, ["data[0]", "NaN"]),
    "infinite data": ({"data": (X, Y * np.inf)}, DataError, ["data[1]", "infinity"]),
    "no data arrays": ({"data": ()}, DataError, ["data", "empty"]),
    "data is None": ({"data": None}, DataError, ["data", "empty"]),
    "data without examples": ({"data": (X[:0], Y[:0])}, DataError, ["data", "length 0"]),
    "scalar data": ({"data": (X, np.float32(1))}, DataError, ["data[1]", "scalar"]),
    "strings as data": ({"data": (X, np.array(["a"] * COUNT))}, DataError, ["data[1]", "U1"]),
    "objects as data": ({"data": (X, np.array([None] * COUNT))}, DataError, ["data[1]", "object"]),
    "one example, no nbeta": ({"data": (X[:1], Y[:1])}, DataError, ["nbeta", "got 1"]),
    "integer parameters": (
        {"params": {"w": jnp.zeros(3, int)}},
        DataError,
        ["params['w']", "int32"],
    ),
    "NaN in the parameters": (
        {"params": {"w": jnp.full(3, jnp.nan)}},
        DataError,
        ["params['w']", "NaN"],
    ),
    "an object as parameter": ({"params": [CENTER, object()]}, DataError, ["params[1]", "object"]),
    "no parameters": ({"params": {}}, DataError, ["params", "no floating"]),
    "loss is no function": ({"loss_fn": 3.0}, DataError, ["loss_fn", "float"]),
    "loss returns a vector": (
        {"loss_fn": lambda w, b: w * b[0].mean(0)},
        DataError,
        ["loss_fn", "float32[3] for 10"],
    ),
    "loss returns an integer": (
        {"loss_fn": lambda w, b: jnp.int32(1)},
        DataError,
        ["loss_fn", "int32[]"],
    ),
    "loss returns a pair": (
        {"loss_fn": lambda w, b: (loss(w, b), w)},
        DataError,
        ["loss_fn", "float32[]", "float32[3]"],
    ),
    "loss returns nothing": ({"loss_fn": lambda w, b: None}, DataError, ["loss_fn", "nothing"]),
    "nbeta 0": ({"nbeta": 0}, ConfigError, ["nbeta", "0"]),
    "nbeta a string": ({"nbeta": "auto"}, ConfigError, ["nbeta", "'auto'"]),
    "negative localization": ({"localization": -1.0}, ConfigError, ["localization", "-1.0"]),
    "localization NaN": ({"localization": float("nan")}, ConfigError, ["localization", "nan"]),
    "two different gammas": (
        {"gamma": 2.0, "localization": 1.0},
        ConfigError,
        ["gamma", "2.0", "1.0"],
    ),
    "unknown option": ({"learning_rate": 0.1}, ConfigError, ["learning_rate", "0.1"]),
    "batch larger than the data": ({"batch_size": 11}, ConfigError, ["batch_size", "11", "10"]),
    "rank larger than the dimension": ({"r": 4}, ConfigError, ["r", "4", "dim=3"]),
    "core larger than the dimension": (
        {"curvature_rank": 4},
        ConfigError,
        ["curvature_rank", "4", "dim=3"],
    ),
    "too few ranks": (
        {"M": 3, "r_per_component": (1, 2)},
        ConfigError,
        ["r_per_component", "M=3", "(1, 2)"],
    ),
    "negative learning rate": ({"lr": -1}, ConfigError, ["lr", "-1"]),
    "no chains": ({"num_chains": 0}, ConfigError, ["num_chains", "0"]),
    "half a chain": ({"num_chains": 1.5}, ConfigError, ["num_chains", "1.5"]),
    "key is a string": ({"key": "seed"}, ConfigError, ["key", "'seed'"]),
    "key is a boolean": ({"key": True}, ConfigError, ["key", "True"]),
    "key of floats": ({"key": jnp.zeros(2)}, ConfigError, ["key", "float32[2]"]),
    "several keys": ({"key": jax.random.split(jax.random.key(0), 2)}, ConfigError, ["key", "[2]"]),
    "latent larger than the dimension": (
        {"family": "flow", "d_latent": 4},
        ConfigError,
        ["d_latent", "4", "dim=3"],
    ),
    "unknown backend": (
        {"backend": "flowjx"},
        ConfigError,
        ["backend", "'flowjx'", "did you mean 'flowjax'"],
    ),
    "flow layers of two widths": (
        {"family": "flow", "flow": {"hidden": (4, 8)}},
        ConfigError,
        ["flow.hidden", "(4, 8)", "equal"],
    ),
    "basis of another shape": (
        {"family": "flow", "latent_basis": np.eye(4, 2)},
        ConfigError,
        ["latent_basis", "(dim=3, d_latent=2)", "4 x 2"],
    ),
    "pruning of a flow": (
        {"family": "flow", "mixture_cap": 4},
        UnavailableError,
        ["mixture_cap", "mfa"],
    ),
    "float64 without x64": ({"dtype": "float64"}, ConfigError, ["dtype", "float64"]),
    "unknown dtype": ({"dtype": "float16"}, ConfigError, ["dtype", "float16"]),
}
FIT_CASES = {
    "other number of examples": ({"n_data": 9}, DataError, ["n_data", "9", "10"]),
    "zero examples": ({"n_data": 0}, ConfigError, ["n_data", "0"]),
    "fractional number of examples": ({"n_data": 10.0}, ConfigError, ["n_data", "10.0"]),
    "beta None": ({"beta": None}, ConfigError, ["beta", "None"]),
    "beta 0": ({"beta": 0}, ConfigError, ["beta", "0"]),
    "beta negative": ({"beta": -1}, ConfigError, ["beta", "-1"]),
    "beta NaN": ({"beta": float("nan")}, ConfigError, ["beta", "nan"]),
    "beta a vector": ({"beta": jnp.ones(2)}, ConfigError, ["beta", "[2]"]),
    "gamma negative": ({"gamma": -0.5}, ConfigError, ["localization", "-0.5"]),
    "gamma None": ({"gamma": None}, ConfigError, ["localization", "None"]),
    "wstar is a matrix": ({"wstar_flat": jnp.zeros((3, 1))}, DataError, ["wstar_flat", "[3, 1]"]),
    "wstar of integers": ({"wstar_flat": jnp.zeros(3, int)}, DataError, ["wstar_flat", "int32"]),
    "wstar empty": ({"wstar_flat": jnp.zeros(0)}, DataError, ["wstar_flat", "[0]"]),
    "wstar not finite": (
        {"wstar_flat": CENTER.at[0].set(jnp.inf)},
        DataError,
        ["wstar_flat", "infinity"],
    ),
    "whitener of another shape": (
        {"whitener": whitener(4)},
        ConfigError,
        ["whitener", "(4,)", "(3,)"],
    ),
    "whitener without A_sqrt": ({"whitener": object()}, ConfigError, ["whitener", "A_sqrt"]),
    "early_stop": ({"vi_cfg": {"early_stop": True}}, ConfigError, ["early_stop"]),
    "unknown entry": ({"vi_cfg": {"step": 10}}, ConfigError, ["step", "10", "steps"]),
    "batch larger than the data": (
        {"vi_cfg": {"batch_size": 64}},
        ConfigError,
        ["batch_size", "64", "10"],
    ),
    "latent larger than the dimension": (
        {"vi_cfg": {"algo": "flow", "d_latent": 4}},
        ConfigError,
        ["d_latent", "4", "dim=3"],
    ),
    "objective returns a vector": (
        {"objective": objective(lambda w, b: w * b[0].mean(0))},
        DataError,
        ["objective", "float32[3] for 10"],
    ),
    "objective is a function": ({"objective": loss}, DataError, ["objective"]),
    "gradient of another shape": (
        {"objective": make_flat_objective(loss, lambda w, b: w[:2])},
        DataError,
        ["gradient of objective", "(3,)", "(2,)"],
    ),
    "key is None": ({"rng_key": None}, ConfigError, ["key", "None"]),
    "data of different lengths": ({"data": (X, Y[:7])}, DataError, ["data", "10", "7"]),
}
RUN_VI_CASES = {
    "beta None": ({"beta": None}, ConfigError, ["beta", "None"]),
    "gamma None": ({"gamma": None}, ConfigError, ["gamma", "None"]),
    "beta negative": ({"beta": -1.0}, ConfigError, ["beta", "-1.0"]),
    "no chains": ({"num_chains": 0}, ConfigError, ["num_chains", "0"]),
    "other number of examples": ({"n_data": 9}, DataError, ["n_data", "9", "10"]),
    "NaN in the data": ({"data": (with_nan, Y)}, DataError, ["data[0]", "NaN"]),
    "loss is no function": (
        {"loss_minibatch_flat": None},
        DataError,
        ["loss_minibatch_flat", "None"],
    ),
    "gradient is no function": (
        {"grad_loss_minibatch": 1.0},
        DataError,
        ["grad_loss_minibatch", "float"],
    ),
    "early_stop": ({"config": {"early_stop": True}}, ConfigError, ["early_stop"]),
    "unknown entry": ({"config": {"step": 10}}, ConfigError, ["step", "10"]),
    "posterior without flat0": ({"posterior": object()}, DataError, ["object"]),
    "key is a string": ({"key": "seed"}, ConfigError, ["key", "'seed'"]),
}


def unreachable(*args, **kwargs):
    raise AssertionError("reached the compiled stages")


def cases(table):
    return [pytest.param(*case, id=name) for name, case in table.items()]


def check(call, changes, kind, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its kind and message are looked at below
        call(changes)
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(fastvi.api.estimate, "run_fit", unreachable)


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize(("changes", "kind", "words"), cases(ESTIMATE_CASES))
def test_estimate_llc(changes, kind, words):
    check(lambda more: fastvi.estimate_llc(**(ESTIMATE | more)), changes, kind, words)


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize(("changes", "kind", "words"), cases(FIT_CASES))
def test_fit(changes, kind, words):
    check(lambda more: fastvi.fit(**(FIT | more)), changes, kind, words)


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize(("changes", "kind", "words"), cases(RUN_VI_CASES))
def test_run_vi(changes, kind, words):
    check(lambda more: fastvi.run_vi(**(RUN_VI | more)), changes, kind, words)


def test_errors_of_the_loss_pass_unchanged_with_a_note():
    with pytest.raises(RuntimeError, match="no such layer") as caught:
        fastvi.estimate_llc(**(ESTIMATE | {"loss_fn": raising}))
    assert "raised by loss_fn on a batch of shapes" in caught.value.__notes__[-1]
    assert "float32[10, 3]" in caught.value.__notes__[-1]
    with pytest.raises(RuntimeError, match="no such layer") as caught:
        fastvi.fit(**(FIT | {"objective": objective(raising)}))
    assert "raised by objective" in caught.value.__notes__[-1]
    with pytest.raises(TypeError, match="dot_general") as caught:
        fastvi.estimate_llc(**(ESTIMATE | {"loss_fn": lambda w, b: loss(w[:2], b)}))
    assert "float32[10, 3]" in caught.value.__notes__[-1]


# A loss that overflows under q: nobody can know before trying.

OVERFLOWING = {
    "loss_fn": lambda w, batch: jnp.sum(jnp.exp((1e9 * w) ** 4)),  # flat at w*, infinite 1e-8 away
    "params": CENTER,
    "data": (X, Y),
    "progress": False,
    "steps": 100,
    "num_chains": 2,
    "M": 1,
    "r": 0,
}


def test_overflow_raises():
    with pytest.raises(NonFiniteError, match="step 0, chain 0, 1.*throw=False"):
        fastvi.estimate_llc(**OVERFLOWING)


def test_overflow_without_throw_is_a_finding():
    result = fastvi.estimate_llc(**OVERFLOWING, throw=False)
    assert [finding.name for finding in result.health] == ["non_finite"]
    assert result.health[0].severity == "error"
    assert not np.isfinite(result.llc)
    assert "NaN or infinity" in result.summary()


def test_overflow_in_fit_is_a_result_code():
    flat = make_flat_objective(OVERFLOWING["loss_fn"])
    result = fastvi.fit(**(FIT | {"objective": flat}))
    assert int(result["extras"]["result_code"]) == 1
    assert not np.isfinite(result["lambda_hat"])
