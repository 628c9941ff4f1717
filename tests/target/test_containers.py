"""The same examples in every container that people have are the same examples."""

import collections
import collections.abc
import io
import itertools
import typing
import warnings

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
import xarray as xr
import zarr

import fastvi
from fastvi.target import containers, stream
from fastvi.target.batches import Streamed
from fastvi.target.containers import hold_data, open_data

COUNT, DIM = 600, 3
rng = np.random.default_rng(3)
X = (rng.normal(size=(COUNT, DIM)) * [0.5, 1.0, 2.0]).astype(np.float32)
Y = (X @ np.ones(DIM) + rng.normal(size=COUNT)).astype(np.float32)
W = np.linalg.lstsq(X, Y, rcond=None)[0].astype(np.float32)
NAMES = ["x0", "x1", "x2", "y"]
COLUMNS = dict(zip(NAMES, [*X.T, Y], strict=True))


class Batches:
    """A loader: batches anew in each pass, the last one short, in an order of the pass."""

    def __init__(self, make=lambda: (X, Y), size=250, shuffle=False):
        self.make, self.size, self.shuffle, self.passes = make, size, shuffle, 0

    def __len__(self):
        return -(-COUNT // self.size)

    def __iter__(self):
        self.passes += 1
        order = np.random.default_rng(self.passes).permutation(COUNT)
        order = order if self.shuffle else np.arange(COUNT)
        for rows in np.split(order, range(self.size, COUNT, self.size)):
            yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], self.make())


class OneBuffer:
    """A loader that fills the same memory with each batch."""

    def __iter__(self):
        inputs, targets = np.empty((100, DIM), np.float32), np.empty(100, np.float32)
        for start in range(0, COUNT, 100):
            inputs[:], targets[:] = X[start : start + 100], Y[start : start + 100]
            yield inputs, targets


class ByIndex:
    """A map-style data set."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return self.make(index)


class Example(typing.NamedTuple):
    x: np.ndarray
    y: float


def memmap(tmp_path):
    for name, array in (("x", X), ("y", Y)):
        np.save(tmp_path / f"{name}.npy", array)
    return tuple(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy")


def h5py_arrays(tmp_path):
    file = h5py.File(tmp_path / "data.h5", "w")
    return file.create_dataset("x", data=X), file.create_dataset("y", data=Y)


def structured(tmp_path):
    return np.rec.fromarrays([*X.T, Y], names=NAMES)


def data_set(tmp_path):
    return xr.Dataset({name: ("example", column) for name, column in COLUMNS.items()})


def data_set_of_axes(tmp_path):
    return xr.Dataset({"x": (("example", "feature"), X), "y": ("example", Y)})


# By name: what makes the container, in a folder.
CONTAINERS = {
    "numpy": lambda _: (X, Y),
    "jax": lambda _: (jnp.asarray(X), jnp.asarray(Y)),
    "dict": lambda _: {"x": X, "y": Y},
    "memmap": memmap,
    "h5py": h5py_arrays,
    "zarr": lambda _: (zarr.array(X), zarr.array(Y)),
    "structured": structured,
    "pandas": lambda _: pd.DataFrame(COLUMNS),
    "pandas series": lambda _: (pd.DataFrame(X), pd.Series(Y)),
    "pandas lists": lambda _: pd.DataFrame({"x": list(X), "y": Y}),
    "polars": lambda _: pl.DataFrame(COLUMNS),
    "polars lists": lambda _: pl.DataFrame({"x": X.tolist(), "y": Y}),
    "xarray": data_set,
    "xarray axes": data_set_of_axes,
    "xarray arrays": lambda _: (xr.DataArray(X), xr.DataArray(Y)),
    "map-style tuples": lambda _: ByIndex(lambda i: (X[i], Y[i])),
    "map-style dicts": lambda _: ByIndex(lambda i: {"x": X[i].tolist(), "y": float(Y[i])}),
    "list of tuples": lambda _: [(x, y) for x, y in zip(X, Y, strict=True)],
    "list of named tuples": lambda _: list(itertools.starmap(Example, zip(X, Y, strict=True))),
    "list of dicts": lambda _: [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)],
    "loader": lambda _: Batches(),
    "loader that shuffles": lambda _: Batches(shuffle=True),
    "loader of dicts": lambda _: Batches(lambda: {"x": X, "y": Y}),
    "loader of frames": lambda _: Chunks(),
    "one buffer": lambda _: OneBuffer(),
}


class Chunks:
    """A reader of a large table: a part of it at a time."""

    def __iter__(self):
        for start in range(0, COUNT, 100):
            yield pd.DataFrame(COLUMNS).iloc[start : start + 100]


def rows_of(data):
    """Return examples as sorted rows, whatever the structure."""
    if isinstance(data, dict):
        data = [data[name] for name in (NAMES if "x0" in data else ["x", "y"])]
    flat = [np.asarray(leaf).reshape(COUNT, -1) for leaf in data]
    rows = np.concatenate(flat, axis=1)
    assert rows.dtype == np.float32
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("name", CONTAINERS)
def test_examples_come_out_bit_for_bit(name, tmp_path):
    data, count = hold_data(CONTAINERS[name](tmp_path), COUNT, np.float32)
    assert count == COUNT
    np.testing.assert_array_equal(rows_of(data), rows_of((X, Y)))


def loss_fn(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


OPTIONS = {"nbeta": 20.0, "localization": 20.0, "budget": 1e6, "progress": False}
OPTIONS["sampler"] = {"start": "localizer"}


def exact_llc():
    precision = 20.0 * X.T @ X / COUNT
    return 0.5 * np.trace(precision @ np.linalg.inv(precision + 20.0 * np.eye(DIM)))


@pytest.fixture(scope="module")
def of_arrays():
    return fastvi.estimate_llc(loss_fn, W, (X, Y), **OPTIONS)


def test_a_loader_has_the_llc_of_its_arrays(of_arrays):
    """The same arrays, in the order of the first pass, give the same bits."""
    assert abs(of_arrays.llc - exact_llc()) < 4 * of_arrays.llc_sem < 0.1
    told = []
    found = fastvi.estimate_llc(loss_fn, W, Batches(), **OPTIONS | {"progress": told.append})
    assert found.llc == of_arrays.llc
    assert [one.step for one in told if one.stage == "data"] == [250, 500, 600]


def test_data_that_do_not_fit_have_the_llc_of_their_arrays(of_arrays, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_BYTES", 1)
    streamed = fastvi.estimate_llc(loss_fn, W, ByIndex(lambda i: (X[i], Y[i])), **OPTIONS)
    assert streamed.n_data == COUNT
    assert abs(streamed.llc - exact_llc()) < 4 * streamed.llc_sem < 0.1


def test_arrays_on_disk_that_do_not_fit_are_read_in_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "SLICE_BYTES", 100 * (DIM + 1) * 4)
    for make in (memmap, h5py_arrays, CONTAINERS["zarr"]):
        monkeypatch.setattr(containers, "HELD_WINDOWS", 8)
        assert not isinstance(open_data(make(tmp_path)), Streamed)
        monkeypatch.setattr(containers, "HELD_WINDOWS", 0)
        batches = list(open_data(make(tmp_path)))
        assert [len(batch[0]) for batch in batches] == [100] * 6
        np.testing.assert_array_equal(np.concatenate([batch[0] for batch in batches]), X)
        np.testing.assert_array_equal(np.concatenate([batch[1] for batch in batches]), Y)


def test_a_loader_is_read_once_and_looked_at_again(monkeypatch):
    loader, told = Batches(size=50), []
    open_data(loader, np.float32, told.append)
    assert (loader.passes, told) == (2, list(range(50, COUNT + 1, 50)))
    # what does not fit is read no further
    monkeypatch.setattr(containers, "HELD_WINDOWS", 0)
    opened = open_data(loader)
    assert loader.passes == 3
    # and another look leaves it as it is
    assert open_data(opened) is opened
    assert loader.passes == 3


def test_loaders_that_shuffle_give_one_order():
    """The same key then gives the same result, and a fit goes on in another process."""
    first, second = Batches(shuffle=True), Batches(shuffle=True, size=100)
    second.passes = 7  # orders of other passes
    found = [open_data(loader, np.float32) for loader in (first, second)]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    # rows and targets stay together
    np.testing.assert_array_equal(rows_of(found[0]), rows_of((X, Y)))


class Declared(collections.abc.Sequence):
    """A data set whose class says that it is a sequence, which iterates too."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return X[index], 2 * X[index]


def test_vectors_of_a_sequence_are_examples():
    found = open_data(Declared())
    np.testing.assert_array_equal(found[0], X)
    np.testing.assert_array_equal(found[1], 2 * X)


class Record(collections.UserDict):
    """What tokenizers give: a mapping that jax takes for a leaf."""


def test_mappings_in_batches_and_examples_are_dicts():
    in_batches = open_data(Batches(lambda: {"x": X, "y": Y}), np.float32)
    for data in (
        [Record(x=X[:300], y=Y[:300]), Record(x=X[300:], y=Y[300:])],
        [(Record(x=X, y=Y),)],
    ):
        found = open_data(Again(data), np.float32)
        np.testing.assert_equal(found[0] if isinstance(found, tuple) else found, in_batches)
    found = open_data(ByIndex(lambda i: Record(x=X[i].tolist(), y=Y[i])), np.float32)
    np.testing.assert_equal(found, in_batches)


class Again:
    """A loader of given batches."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_frames_of_mixed_columns_beside_arrays_are_matrices():
    nullable = pd.DataFrame({"a": pd.array([1, 2], "Int64"), "b": pd.array([0.5, 2], "Float64")})
    mixed = pd.DataFrame({"a": [True, False], "b": [0.5, 2.0]})
    found = hold_data((nullable, mixed, nullable["a"]))[0]
    for one, wanted in zip(found, ([[1, 0.5], [2, 2]], [[1, 0.5], [0, 2]], [1, 2]), strict=True):
        np.testing.assert_array_equal(one, wanted)


def test_numbers_beside_arrays_on_disk_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "HELD_WINDOWS", 0)
    for other in (3.0, [1.0] * COUNT):
        with pytest.raises(fastvi.DataError, match=r"data\[1\].* is a scalar"):
            open_data((memmap(tmp_path)[0], other))


def test_integers_among_the_floats_of_examples_are_floats():
    """Whatever part of the examples is stacked at a time."""
    numbers = [1] * 300 + [0.5] * 10
    found = open_data([{"x": 1.0, "y": number} for number in numbers], np.float32)
    assert found["y"].dtype == np.float32
    np.testing.assert_array_equal(found["y"], numbers)


def test_an_iterator_is_not_read():
    batches = iter(Batches())
    assert open_data(batches) is batches
    assert len(next(batches)[0]) == 250


def test_what_takes_arrays_alone_reads_loaders():
    """It counts their examples, and then finds that there are fewer than was said."""
    objective = fastvi.make_flat_objective(loss_fn)
    fit = {"rng_key": 0, "objective": objective, "wstar_flat": W, "beta": 0.1, "gamma": 20.0}
    for data in (Batches(), ByIndex(lambda i: (X[i], Y[i]))):
        with pytest.raises(fastvi.DataError, match="n_data=601 for 600 examples"):
            fastvi.fit(data=data, n_data=COUNT + 1, vi_cfg=None, **fit)
        with pytest.raises(fastvi.DataError, match="n_data=601 for 600 examples"):
            fastvi.run_vi(0, W, data, None, 1, loss_fn, None, loss_fn, 601, 0.1, 20.0)
    with pytest.raises(fastvi.DataError, match="list_iterator, which is read once"):
        fastvi.fit(data=iter([(X, Y)]), n_data=COUNT, vi_cfg=None, **fit)


class Once:
    """A reader of a file that it does not open again."""

    def __init__(self):
        self.batches = iter(Batches())

    def __iter__(self):
        yield from self.batches


def test_a_curve_reads_a_loader_once_and_other_data_may_be_one():
    loader = Batches()
    options = {"method": "variational", "steps": 5, "M": 1, "r": 0, "eval_samples": 4}
    curve = fastvi.llc_curve(loss_fn, [W, W], loader, progress=False, throw=False, **options)
    assert loader.passes == 2  # the second one of which is looked at
    on_loader, shuffled, on_arrays = (
        fastvi.llc_on(curve.estimates[-1], data).llc
        for data in (Batches(), Batches(shuffle=True), (X, Y))
    )
    assert on_loader == on_arrays
    # a mean has no order, losses by example have
    np.testing.assert_allclose(shuffled, on_arrays, 1e-4)
    on_loader, on_arrays = (
        fastvi.example_losses(curve.estimates[-1], data) for data in (Batches(), (X, Y))
    )
    np.testing.assert_array_equal(on_loader, on_arrays)
    with pytest.raises(fastvi.DataError, match="order of the examples changes.*shuffle=False"):
        fastvi.example_losses(curve.estimates[-1], Batches(shuffle=True))


TEXT = np.array(["a", "b"] * (COUNT // 2))
LIST_OF_TEXT = TEXT.tolist()


class Raising:
    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if index == 300:
            raise OSError("the disk is gone")
        return X[index], Y[index]


def closed_file():
    with h5py.File(io.BytesIO(), "w") as file:
        return file.create_dataset("x", data=X)


def ragged(lengths):
    return [np.arange(length) for length in lengths]


# By name: the data, and words of the error, which has the names and the fix.
REFUSED = {
    "text in a dict": (
        lambda: {"x": X, "name": TEXT, "city": LIST_OF_TEXT},
        r"data\['city'\] has dtype <U1, data\['name'\] has dtype <U1, which is text.*leave them",
    ),
    "text in pandas": (
        lambda: pd.DataFrame({"x": Y, "name": LIST_OF_TEXT}),
        r"data\['name'\] has dtype object.*data.drop\(columns=\['name'\]\)",
    ),
    "text in polars": (
        lambda: pl.DataFrame({"x": Y, "name": LIST_OF_TEXT}),
        r"data\['name'\].*data.drop\(\['name'\]\)",
    ),
    "text in xarray": (
        lambda: xr.Dataset({"x": ("i", Y), "name": ("i", TEXT)}),
        r"data\['name'\].*data.drop_vars\(\['name'\]\)",
    ),
    "text in batches": (
        lambda: Batches(lambda: {"x": X, "name": TEXT}),
        r"batch\['name'\] has dtype <U1",
    ),
    "text in examples": (
        lambda: ByIndex(lambda i: {"x": X[i], "name": "abc"}),
        r"an example\['name'\] has dtype <U3",
    ),
    "a lazy frame": (lambda: pl.LazyFrame({"x": Y}), r"LazyFrame.*Pass data.collect\(\)"),
    "names of two types": (lambda: pd.DataFrame({"x": Y, 0: Y}), "different names of one type"),
    "variables on other axes": (
        lambda: xr.Dataset({"x": (("i", "j"), X), "y": ("j", X[0])}),
        r"share their first dimension.*y: \('j',\).*transpose",
    ),
    "a sparse matrix": (lambda: scipy.sparse.csr_matrix(X), "csr_matrix.*todense"),
    "a file of arrays": (lambda: h5py.File(io.BytesIO(), "w"), "File. Pass a dict of arrays"),
    "a closed file": (closed_file, "h5py._hl.dataset.Dataset, which numpy cannot read"),
    "a group of arrays": (lambda: zarr.group(), "zarr.core.group.Group.*Pass a dict"),
    "ragged objects": (
        lambda: (np.array(ragged([1, 2]), object), Y[:2]),
        r"data\[0\] holds sequences of different lengths.*fastvi.pad_sequences",
    ),
    "ragged lists": (lambda: {"x": ragged(range(1, 30))}, r"x'\]\[0\]: 1.*fastvi.pad_sequences"),
    "ragged examples": (
        lambda: ByIndex(lambda i: (np.ones(1 + i % 2), 0.0)),
        r"example 0\[0\] has \(1,\), example 1\[0\] has \(2,\).*fastvi.pad_sequences",
    ),
    "ragged lists of examples": (
        lambda: [{"ids": [1, 2, 3], "y": 0}, {"ids": [], "y": 0}],
        r"example 0\['ids'\] has \(3,\), example 1\['ids'\] has \(0,\).*fastvi.pad_sequences",
    ),
    "examples of two kinds": (
        lambda: ByIndex(lambda i: (X[i], 1.0) if i else (X[i], 1.0, 2.0)),
        "example 1 is .* and example 0 is",
    ),
    "examples that change": (
        lambda: ByIndex(lambda i: (X[i] + rng.normal(), Y[i])),
        "other examples in a later pass.*augmentation",
    ),
    "a loader that ends": (Once, "gave 600 examples first and 0 later"),
    "a series of text": (
        lambda: (X, pd.Series(LIST_OF_TEXT)),
        r"data\[1\] has dtype object as numpy reads pandas.*Series.*Encode strings",
    ),
    "a loader among arrays": (lambda: (X, Batches()), r"data\[1\].*Batches.*is passed alone"),
    "lists of lists": (lambda: [[1, 2], [3]], r"data\[0\]\[0\] is a scalar.*fastvi.pad_sequences"),
    "pairs of rows": (lambda: zip(X, Y, strict=True), "zip gave .*Make it give batches"),
}


@pytest.mark.parametrize(
    ("make", "words"), [pytest.param(*case, id=name) for name, case in REFUSED.items()]
)
def test_what_cannot_be_read_is_named_with_the_fix(make, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(fastvi.DataError, match=words):
            fastvi.estimate_llc(loss_fn, W, make(), **OPTIONS)


def test_what_a_data_set_raises_passes_through_and_says_where():
    with pytest.raises(OSError, match="the disk is gone") as caught:
        fastvi.estimate_llc(loss_fn, W, Raising(), **OPTIONS)
    assert any("Raising was read from example 256 on" in note for note in caught.value.__notes__)


def test_rare_changes_are_seen_in_the_first_examples_of_a_second_pass():
    for changes, seen in ((1000, True), (2000, False)):
        passes = itertools.count()

        class Changes:
            def __iter__(self, passes=passes, changes=changes):
                number = next(passes)
                for start in range(0, 3000, 500):
                    rows = np.arange(start, start + 500, dtype=np.float32)
                    yield np.where(rows == changes, rows + 0.5 * number, rows)

        if seen:
            with pytest.raises(fastvi.DataError, match="other examples"):
                open_data(Changes())
        else:
            np.testing.assert_array_equal(open_data(Changes()), np.arange(3000))
