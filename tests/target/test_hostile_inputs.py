"""What people pass by mistake.

Refused with the rule and the fix before anything compiles, or read right.
"""

import array
import collections
import itertools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import fastvi
import fastvi.api.estimate
from fastvi._errors import ConfigError, DataError, UnavailableError
from fastvi.target.inputs import check_data

X, CENTER = np.ones((40, 3), np.float32), jnp.zeros(3)


def loss(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w) ** 2)


class Batches:
    """A re-iterable of what a function makes, told which pass it is."""

    def __init__(self, make):
        self.make, self.passes = make, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.make(self.passes))


class Table:
    """What pandas and polars tables have in common."""

    def __init__(self, **columns):
        self.found, self.columns = columns, list(columns)

    def __iter__(self):
        return iter(self.columns)

    def __getitem__(self, name):
        return types.SimpleNamespace(to_numpy=lambda: self.found[name])

    def to_numpy(self):
        return np.stack(list(self.found.values()), axis=1)


def estimate(data=(X,), params=CENTER, loss_fn=loss, **options):
    return fastvi.estimate_llc(loss_fn, params, data, progress=False, **options)


def of(data):
    return lambda: estimate(data)


def with_params(params, **options):
    return lambda: estimate(params=params, loss_fn=lambda p, batch: jnp.sum(p["w"] ** 2), **options)


def with_loss(loss_fn, data=(X,)):
    return lambda: estimate(data, loss_fn=loss_fn)


def flat_fit(objective=None, **changes):
    arguments = {
        "rng_key": 0,
        "objective": objective or fastvi.make_flat_objective(loss),
        "wstar_flat": CENTER,
        "data": (X,),
        "n_data": len(X),
        "beta": 0.3,
        "gamma": 1.0,
        "vi_cfg": {"steps": 4},
    }
    return lambda: fastvi.fit(**(arguments | changes))


def chains(**changes):
    """Three chains of 40 exact draws of a quadratic in two dimensions."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(3, 40, 2)) / np.sqrt(3)
    arguments = {
        "samples": draws,
        "gradients": draws,
        "losses": 0.5 * np.sum(draws**2, axis=-1),
        "nbeta": 2.0,
        "localization": 1.0,
        "center": np.zeros(2),
        "init_loss": 0.0,
    }
    return lambda: fastvi.virial_llc(**(arguments | changes))


def squares(w, batch):
    return (1 + batch[0] @ w) ** 2


big = np.array([2**33 + 1, 1])
rng = np.random.default_rng(0)
ROWS = rng.normal(size=(40, 3)).astype(np.float32), np.arange(40, dtype=np.float32)

# name: (call, error, words)
CASES = {
    "a list of sequences": (
        of([np.ones(7)] * 40),
        DataError,
        "list of 40 entries of one shape.*jnp.stack",
    ),
    "a tuple of long sequences": (
        of((np.ones(100),) * 12),
        DataError,
        "tuple of 12 entries.*columns as a dict",
    ),
    "a list of batches": (of([(X, X)] * 50), DataError, "list of 50 entries.*concatenate batches"),
    "a list of numbers": (
        of([[1.0, 2.0], [3.0, 4.0]]),
        DataError,
        r"data\[0\]\[0\] is a scalar.*np.asarray",
    ),
    "integers beyond int32": (
        of((X, big)),
        DataError,
        r"data\[1\] has dtype int64 .* do not fit int32.*enable_x64",
    ),
    "integers beyond uint32": (of(np.array([2**63], np.uint64)), DataError, "do not fit uint32"),
    "floats beyond float32": (
        of((X, np.full(40, 1e300))),
        DataError,
        r"data\[1\] holds numbers too large for float32",
    ),
    "a masked array": (
        of(np.ma.masked_invalid([1.0, np.nan])),
        DataError,
        "masked array.*mask would be dropped",
    ),
    "a sparse matrix": (of(sparse.BCOO.fromdense(jnp.eye(4))), DataError, "sparse matrix.*todense"),
    "durations": (of(np.array([1, 2], "m8[s]")), DataError, "dtype timedelta64"),
    "random keys": (of(jax.random.split(jax.random.key(0), 4)), DataError, "dtype key<fry>"),
    "a set": (of({1, 2}), DataError, "got set. Pass a tuple or a dict"),
    "a view of a dict": (
        of({"x": X}.values()),
        DataError,
        "got dict_values. Pass a tuple or a dict",
    ),
    "a mapping that is no dict": (
        of(collections.UserDict(x=X)),
        DataError,
        "UserDict. Pass a dict of arrays",
    ),
    "a range": (of(range(5)), DataError, "got range.*np.arange"),
    "the path of a file": (of("data.npz"), DataError, "got str. Load the file"),
    "a pathlib path": (of(pathlib.Path("data.npz")), DataError, "as numpy reads pathlib"),
    "an endless generator": (of(itertools.repeat(X)), DataError, "read only once"),
    "a generator among arrays": (of((X, (row for row in X))), DataError, r"data\[1\].*generator"),
    "numbers that iterate": (
        of(array.array("d", [1.0, 2.0])),
        DataError,
        "array.array gave.*Make it give batches",
    ),
    "a table of words": (
        of(Table(a=np.array(["x", "y"]))),
        DataError,
        r"data\['a'\] has dtype <U1",
    ),
    "a stream of words": (of(Batches(lambda _: ["a"])), DataError, "batch has dtype <U1"),
    "a stream of single examples": (
        of(Batches(lambda _: [(X[0], 1.0)])),
        DataError,
        "same leading axis.*Batches gave",
    ),
    "a stream of lists of examples": (
        of(Batches(lambda _: [[X[0]] * 40])),
        DataError,
        "list of 40 entries",
    ),
    "a stream beyond int32": (
        of(Batches(lambda _: [big])),
        DataError,
        "batch has dtype int64.*int32",
    ),
    "a stream that changes": (
        of(Batches(lambda number: [number * X])),
        DataError,
        "other examples in a later pass",
    ),
    "a stream that grows": (
        of(Batches(lambda number: [X] * number)),
        DataError,
        "40 examples first and 80 later",
    ),
    "a lone float": (
        with_params({"w": CENTER, "b": 0.0}),
        DataError,
        r"params\['b'\] is the Python float 0.0",
    ),
    "a lone float that the mask lets vary": (
        with_params({"w": CENTER, "b": 0.0}, param_mask={"w": True, "b": True}),
        DataError,
        r"params\['b'\] is the Python float",
    ),
    "empty parameters": (with_params({"w": np.zeros((0, 3))}), DataError, "1 empty arrays"),
    "parameters beyond float32": (
        with_params({"w": np.full(2, 1e300)}),
        DataError,
        "too large for float32",
    ),
    "float8 parameters": (
        with_params({"w": CENTER.astype(jnp.float8_e4m3fn)}),
        DataError,
        "float8_e4m3fn, too coarse",
    ),
    "a mean in half precision": (
        lambda: estimate(loss_fn=lambda w, batch: loss(w, batch).astype(jnp.bfloat16)),
        DataError,
        r"bfloat16\[\], too coarse.*mean in float32",
    ),
    "progress that is no folder": (
        lambda: estimate(resume_from=3),
        ConfigError,
        "resume_from must be a folder.*got int",
    ),
    "progress in an earlier result": (
        lambda: estimate(resume_from=loss),
        ConfigError,
        "resume_from must be a folder.*got function",
    ),
    "nothing varies": (lambda: estimate(param_mask=False), ConfigError, "let some parameter vary"),
    "within jit": (
        lambda: jax.jit(lambda w: estimate(params=w).llc)(CENTER),
        UnavailableError,
        "use fastvi.fit",
    ),
    "within grad": (
        lambda: jax.grad(lambda g: estimate(localization=g).llc)(1.0),
        UnavailableError,
        "use fastvi.fit",
    ),
    "within jit of something else": (
        lambda: jax.jit(lambda x: x + estimate().llc)(1.0),
        UnavailableError,
        "use fastvi.fit",
    ),
    "a loss with its auxiliary": (
        with_loss(lambda w, b: (loss(w, b), jnp.ones(()))),
        DataError,
        r"a pair of scalars, as of has_aux.*\[0\]",
    ),
    "a loss for each class": (
        with_loss(lambda w, b: jnp.ones(7) * w[0]),
        DataError,
        "first axis is not that of the batch",
    ),
    "weights of another shape": (
        with_loss(lambda w, b: (squares(w, b), w)),
        DataError,
        "need one shape",
    ),
    "negative weights": (
        with_loss(lambda w, b: (squares(w, b), -b[1]), ROWS),
        DataError,
        "weights.*at least 0",
    ),
    "a mask of nothing": (
        with_loss(lambda w, b: (squares(w, b), 0 * b[1]), ROWS),
        DataError,
        "weights.*are all 0",
    ),
    "weights that are learned": (
        with_loss(lambda w, b: (squares(w, b), b[1] * jnp.exp(w[0])), ROWS),
        DataError,
        "weights.*change with the parameters",
    ),
    "a mean over what a batch keeps": (
        with_loss(lambda w, b: jnp.sum(b[1] * squares(w, b)) / jnp.sum(b[1]), ROWS),
        DataError,
        "not a mean over the examples.*return .losses, weights.",
    ),
    "a sum": (with_loss(lambda w, b: jnp.sum(squares(w, b)), ROWS), DataError, "It is their sum"),
    "a median": (
        with_loss(lambda w, b: jnp.median(squares(w, b)), ROWS),
        DataError,
        "not a mean over the examples",
    ),
    "noise of numpy": (
        with_loss(lambda w, b: loss(w, b) * (1 + rng.normal())),
        DataError,
        "not deterministic: traced twice",
    ),
    "log of zero at w*": (
        with_loss(lambda w, b: loss(w, b) - jnp.log(w[0] ** 2)),
        DataError,
        "is inf at w. itself",
    ),
    "a norm at zero": (
        with_loss(lambda w, b: jnp.linalg.norm(w)),
        DataError,
        "gradient.*not finite in 3 of 3",
    ),
    "a loss that rounds": (
        with_loss(lambda w, b: jnp.round(50 * jnp.mean(squares(w, b)))),
        DataError,
        "disagrees",
    ),
    "a gradient with another sign": (
        flat_fit(fastvi.make_flat_objective(loss, lambda w, b: -jax.grad(loss)(w, b))),
        DataError,
        "gradient of objective disagrees",
    ),
    "a full loss that is a sum": (
        flat_fit(loss_full_flat=lambda w: 40 * loss(w, (X,))),
        DataError,
        "loss_full_flat is another loss",
    ),
    "a negative beta": (flat_fit(beta=-1.0), ConfigError, "beta must be a number > 0"),
    "gamma given twice": (
        lambda: estimate(localization=2.0, config={"gamma": 1.0}),
        ConfigError,
        "gamma.*2.0",
    ),
    "components of a flow": (lambda: estimate(family="flow", M=4), ConfigError, "M.*family"),
    "probes that nothing reads": (
        lambda: estimate(trace_probes=4),
        ConfigError,
        "trace_probes.*hvp",
    ),
    "a pair of odd draws": (
        lambda: estimate(antithetic=True, samples_per_step=3),
        ConfigError,
        "antithetic.*pairs",
    ),
    "events without a folder": (flat_fit(vi_cfg={"tensorboard": True}), ConfigError, "tensorboard"),
    "chains by draws": (
        chains(samples=np.zeros((40, 3, 2)), gradients=np.zeros((40, 3, 2))),
        DataError,
        r"\(40, 3|\(3, 40\)",
    ),
    "a negative burn-in": (chains(discard=-5), (ConfigError, DataError), "discard"),
    "a negative nbeta": (chains(nbeta=-2.0), (ConfigError, DataError), "nbeta"),
    "checkpoints in a dict": (
        lambda: fastvi.llc_curve(loss, {"w": CENTER}, (X,), progress=False),
        DataError,
        "got a mapping",
    ),
}


@pytest.mark.parametrize(
    ("call", "kind", "words"), [pytest.param(*case, id=name) for name, case in CASES.items()]
)
def test_refused_before_anything_compiles(call, kind, words, monkeypatch):
    def unreachable(*args, **kwargs):
        raise AssertionError("reached the compiled stages")

    monkeypatch.setattr(fastvi.api.estimate, "run_fit", unreachable)
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert type(caught.value) in (kind if isinstance(kind, tuple) else (kind,))


def test_a_table_is_read_by_columns():
    data, count = check_data(Table(x=np.arange(4.0), y=np.array([1, 2, 3, 4])))
    assert count == 4
    assert sorted(data) == ["x", "y"]
    np.testing.assert_array_equal(data["x"], [0, 1, 2, 3])
    np.testing.assert_array_equal(data["y"], [1, 2, 3, 4])


def test_two_columns_in_a_tuple_are_two_arrays():
    data, count = check_data((np.arange(4.0), np.ones(4)))
    assert count == 4
    np.testing.assert_array_equal(data[0], [0, 1, 2, 3])


def test_a_stream_may_come_in_another_order():
    """The same examples in other batches, of a kind that numpy itself does not know."""
    from fastvi.target.stream import HostStream

    rows = np.arange(40.0).reshape(20, 2).astype(jnp.bfloat16)
    batches = Batches(lambda number: np.array_split(np.roll(rows, number, axis=0), number + 1))
    stream = HostStream(batches, np.float32, jax.random.key(0), 4)
    found = np.concatenate([np.asarray(piece.examples) for piece in stream.pieces()])
    np.testing.assert_array_equal(np.sort(found[:, 0]), np.arange(0.0, 40, 2))
    assert found.dtype == np.float32


def test_a_loss_that_is_a_python_number_is_a_constant():
    result = fastvi.estimate_llc(
        lambda w, batch: 1.0, CENTER, X, method="variational", M=1, r=0, progress=False, throw=False
    )
    assert "constant_loss" in [finding.name for finding in result.health]
