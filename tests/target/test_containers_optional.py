"""Data sets and loaders of torch, grain and Hugging Face give the examples that they hold."""

import sys
import types
import warnings

import numpy as np
import pytest

import fastvi
from fastvi.target import containers
from fastvi.target.batches import Streamed
from fastvi.target.containers import hold_data, open_data

COUNT, DIM = 600, 3
rng = np.random.default_rng(4)
X = rng.normal(size=(COUNT, DIM)).astype(np.float32)
Y = rng.normal(size=COUNT).astype(np.float32)


def check_examples(container):
    """Compare the examples that come out with those that went in: a set of rows, bit for bit."""
    data, count = hold_data(container, dtype=np.float32)
    assert count == COUNT
    data = [data["x"], data["y"]] if isinstance(data, dict) else data
    rows = [np.column_stack([np.asarray(leaf) for leaf in one]) for one in (data, (X, Y))]
    found, wanted = (one[np.lexsort(one.T)] for one in rows)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def map_style(torch, make):
    class ByIndex(torch.utils.data.Dataset):
        def __len__(self):
            return COUNT

        def __getitem__(self, index):
            return make(index)

    return ByIndex()


def by_iteration(torch):
    class OneByOne(torch.utils.data.IterableDataset):
        def __iter__(self):
            return ((x, y) for x, y in zip(torch.tensor(X), torch.tensor(Y), strict=True))

    return OneByOne()


def tensors(torch):
    return torch.tensor(X), torch.tensor(Y)


def pairs(torch):
    return torch.utils.data.TensorDataset(*tensors(torch))


def parts(torch):
    data = torch.utils.data
    return data.ConcatDataset(
        [data.Subset(pairs(torch), range(200, COUNT)), data.Subset(pairs(torch), range(200))]
    )


def loader(torch, data, **options):
    return torch.utils.data.DataLoader(data, **{"batch_size": 250, "shuffle": True} | options)


def share(torch, processes):
    return torch.utils.data.DistributedSampler(pairs(torch), num_replicas=processes, rank=0)


OF_TORCH = {
    "tensors": tensors,
    "tensors with gradients": lambda torch: [one.requires_grad_() for one in tensors(torch)],
    "tensor data set": pairs,
    "parts of data sets": parts,
    "map-style tuples": lambda torch: map_style(torch, lambda i: (torch.tensor(X[i]), float(Y[i]))),
    "map-style dicts": lambda torch: map_style(torch, lambda i: {"x": X[i], "y": Y[i]}),
    "iterable": by_iteration,
    "loader": lambda torch: loader(torch, pairs(torch)),
    "loader in order": lambda torch: loader(torch, pairs(torch), shuffle=False, batch_size=64),
    "loader of dicts": lambda torch: loader(
        torch, map_style(torch, lambda i: {"x": X[i], "y": Y[i]})
    ),
    "loader of an iterable": lambda torch: loader(torch, by_iteration(torch), shuffle=None),
    "loader without batches": lambda torch: loader(torch, pairs(torch), batch_size=None),
    "loader of lists of indices": lambda torch: loader(
        torch,
        pairs(torch),
        batch_size=None,
        shuffle=None,
        sampler=torch.utils.data.BatchSampler(range(COUNT), 250, drop_last=False),
    ),
    "loader of the only process": lambda torch: loader(
        torch, pairs(torch), shuffle=None, sampler=share(torch, 1)
    ),
    "loader that drops nothing": lambda torch: loader(
        torch, pairs(torch), batch_size=100, drop_last=True
    ),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_examples_of_torch(name, torch):
    check_examples(OF_TORCH[name](torch))


def test_vectors_of_a_loader_without_batches_are_examples(torch):
    data = map_style(torch, lambda i: (X[i], 2 * X[i]))
    found = open_data(loader(torch, data, batch_size=None, shuffle=False))
    np.testing.assert_array_equal(found[0], X)
    np.testing.assert_array_equal(found[1], 2 * X)


def test_half_precision_of_torch_is_read_exactly(torch):
    numbers = torch.tensor(X).to(torch.bfloat16)
    data = hold_data(numbers)[0]
    assert data.dtype == np.float32
    np.testing.assert_array_equal(data, numbers.float().numpy())


def test_a_derived_tensor_data_set_gives_what_it_says(torch):
    class Twice(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            return tuple(2 * one for one in super().__getitem__(index))

    np.testing.assert_array_equal(hold_data(Twice(*tensors(torch)))[0][0], 2 * X)


def noisy(torch):
    return map_style(torch, lambda i: (X[i] + torch.rand(()).item(), Y[i]))


def raising(torch):
    return map_style(torch, lambda i: (X[i], [Y[i]][i // 300]))


REFUSED_OF_TORCH = {
    "examples that are dropped": (
        lambda torch: loader(torch, pairs(torch), drop_last=True),
        "drop_last=True leaves 100 examples of each pass out.*drop_last=False",
    ),
    "examples that an iterable may drop": (
        lambda torch: loader(torch, by_iteration(torch), shuffle=None, drop_last=True),
        "leaves the last examples.*drop_last=False",
    ),
    "the share of a process": (
        lambda torch: loader(torch, pairs(torch), shuffle=None, sampler=share(torch, 4)),
        "share of one process of 4, not all data. Pass its dataset",
    ),
    "draws with replacement": (
        lambda torch: loader(
            torch,
            pairs(torch),
            shuffle=None,
            sampler=torch.utils.data.RandomSampler(range(COUNT), replacement=True),
        ),
        "other examples in a later pass.*with replacement",
    ),
    "augmentation": (lambda torch: loader(torch, noisy(torch)), "other examples in a later pass"),
    "text": (
        lambda torch: loader(torch, map_style(torch, lambda i: {"x": X[i], "name": "abc"})),
        r"batch\['name'\] has dtype <U3, which is text",
    ),
    "a sparse tensor": (lambda torch: torch.eye(3).to_sparse(), "Tensor.*to_dense"),
}


@pytest.mark.parametrize("name", REFUSED_OF_TORCH)
def test_what_is_refused_of_torch(name, torch):
    make, words = REFUSED_OF_TORCH[name]
    with warnings.catch_warnings():
        # torch says that its sparse tensors are a beta
        warnings.simplefilter("ignore", UserWarning)
        data = make(torch)
    with pytest.raises(fastvi.DataError, match=words):
        hold_data(data)


def test_what_a_data_set_of_torch_raises_passes_through(torch):
    with pytest.raises(IndexError):
        hold_data(loader(torch, raising(torch)))


def test_a_loader_of_torch_that_does_not_fit_is_a_stream(torch, monkeypatch):
    monkeypatch.setattr(containers, "HELD_WINDOWS", 0)
    opened = open_data(loader(torch, pairs(torch)))
    assert isinstance(opened, Streamed)
    found = np.concatenate([np.asarray(batch[1]) for batch in opened])
    np.testing.assert_array_equal(np.sort(found), np.sort(Y))


@pytest.fixture
def datasets():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("datasets")


def table(datasets):
    return datasets.Dataset.from_dict({"x": X, "y": Y})


OF_HUGGING_FACE = {
    "python": table,
    "numpy": lambda datasets: table(datasets).with_format("numpy"),
    "jax": lambda datasets: table(datasets).with_format("jax"),
    "columns": lambda datasets: (
        table(datasets).add_column("name", ["a"] * COUNT).with_format("numpy", columns=["x", "y"])
    ),
    "transform": lambda datasets: table(datasets).with_transform(
        lambda batch: {name: np.asarray(column, np.float32) for name, column in batch.items()}
    ),
    "iterable": lambda datasets: table(datasets).to_iterable_dataset(),
    "shuffled": lambda datasets: table(datasets).shuffle(seed=0),
}


@pytest.mark.parametrize("name", OF_HUGGING_FACE)
def test_examples_of_hugging_face(name, datasets):
    check_examples(OF_HUGGING_FACE[name](datasets))


FINE = np.linspace(0, 1, 5) + 1e-9 * np.arange(5)  # float32 rounds it by 3e-8


def fine_table(datasets):
    return datasets.Dataset.from_dict({"x": FINE, "y": np.outer(FINE, [1, 2])})


@pytest.mark.parametrize(
    "make",
    [
        fine_table,
        lambda datasets: fine_table(datasets).with_format("numpy", dtype=np.float64),
        lambda datasets: fine_table(datasets).to_iterable_dataset(),
    ],
    ids=["python", "numpy", "iterable"],
)
def test_double_precision_of_hugging_face_is_kept(make, datasets):
    found = open_data(make(datasets), np.float64)
    np.testing.assert_array_equal(found["x"], FINE)
    np.testing.assert_array_equal(found["y"], np.outer(FINE, [1, 2]))


def test_integers_of_hugging_face_do_not_wrap_around(datasets):
    arrow = pytest.importorskip("pyarrow")
    large = datasets.Dataset(arrow.table({"x": np.full(3, 2**63 + 5, np.uint64)}))
    with pytest.raises(fastvi.DataError, match=f"uint64 and values from {2**63 + 5}"):
        open_data(large)


def test_matrices_and_images_of_hugging_face_are_decoded(datasets):
    pytest.importorskip("PIL")
    images = np.arange(2 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5)
    matrices = images.astype(np.float64) + 1e-9
    kinds = {
        "image": datasets.Image(),
        "matrix": datasets.Array2D((4, 5), "float64"),
        "y": datasets.Value("float64"),
    }
    columns = {"image": list(images), "matrix": matrices, "y": [1e-9 + 1, 2.0]}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    found = open_data(data, np.float64)
    for name, wanted in (("image", images), ("matrix", matrices), ("y", [1e-9 + 1, 2.0])):
        np.testing.assert_array_equal(found[name], wanted)
    np.testing.assert_array_equal(open_data(data.select_columns("image"))["image"], images)


def test_a_module_of_the_name_of_a_package_is_none(monkeypatch):
    """A person's own datasets.py is taken for what its classes can do."""
    own = types.ModuleType("datasets")
    members = {"__len__": lambda _: COUNT, "__getitem__": lambda _, i: {"x": X[i], "y": Y[i]}}
    own.Dataset = type("Dataset", (), members | {"__module__": "datasets"})
    monkeypatch.setitem(sys.modules, "datasets", own)
    check_examples(own.Dataset())


REFUSED_OF_HUGGING_FACE = {
    "text": (
        lambda datasets: table(datasets).add_column("name", ["a"] * COUNT),
        r"data\['name'\] has dtype object.*data.remove_columns\(\['name'\]\)",
    ),
    "ragged": (
        lambda datasets: datasets.Dataset.from_dict({"ids": [[1], [1, 2]], "y": [0, 1]}),
        r"batch\['ids'\] holds sequences of different lengths.*fastvi.pad_sequences",
    ),
    "splits": (
        lambda datasets: datasets.DatasetDict({"train": table(datasets)}),
        r'DatasetDict.*data\["train"\]',
    ),
}


@pytest.mark.parametrize("name", REFUSED_OF_HUGGING_FACE)
def test_what_is_refused_of_hugging_face(name, datasets):
    make, words = REFUSED_OF_HUGGING_FACE[name]
    with pytest.raises(fastvi.DataError, match=words):
        hold_data(make(datasets))


def test_a_table_of_arrow_is_read_by_column():
    arrow = pytest.importorskip("pyarrow")
    found = arrow.table({"x": list(X), "y": Y})
    check_examples(found)
    with pytest.raises(fastvi.DataError, match=r"data.drop_columns\(\['name'\]\)"):
        hold_data(found.append_column("name", [["a"] * COUNT]))
    with pytest.raises(fastvi.DataError, match=r"RecordBatch.*data.to_pandas\(\)"):
        hold_data(found.to_batches()[0])


@pytest.fixture
def grain():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("grain")


class Source:
    """A random access data source, as grain calls it."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return {"x": X[index], "y": Y[index]}


def grain_set(grain):
    return grain.MapDataset.source(Source())


OF_GRAIN = {
    "source": lambda grain: Source(),
    "examples": grain_set,
    "shuffled": lambda grain: grain_set(grain).shuffle(seed=0),
    "batches": lambda grain: grain_set(grain).shuffle(seed=0).batch(250),
    "batches on": lambda grain: grain_set(grain).batch(250).map(lambda batch: batch),
    "iterated examples": lambda grain: grain_set(grain).to_iter_dataset(),
    "iterated batches": lambda grain: grain_set(grain).to_iter_dataset().batch(250),
    "loader": lambda grain: grain_loader(grain),
    "part of a repeated one": lambda grain: grain_set(grain).repeat()[:COUNT].batch(250),
    "batches that drop nothing": lambda grain: grain_set(grain).batch(100, drop_remainder=True),
}


@pytest.mark.parametrize("name", OF_GRAIN)
def test_examples_of_grain(name, grain):
    check_examples(OF_GRAIN[name](grain))


def grain_loader(grain, num_epochs=1, **options):
    return grain.DataLoader(
        data_source=Source(),
        sampler=grain.samplers.IndexSampler(COUNT, shuffle=True, seed=0, num_epochs=num_epochs),
        operations=[grain.transforms.Batch(250, **options)],
    )


REFUSED_OF_GRAIN = {
    "no end": (
        lambda grain: grain_set(grain).repeat(),
        r"repeats without an end.*Leave repeat\(\) out",
    ),
    "batches without an end": (
        lambda grain: grain_set(grain).repeat().batch(250),
        r"repeats without an end.*Leave repeat\(\) out",
    ),
    "iterated batches without an end": (
        lambda grain: grain_set(grain).repeat().to_iter_dataset().batch(250),
        r"repeats without an end.*Leave repeat\(\) out",
    ),
    "an iteration repeated without an end": (
        lambda grain: grain.experimental.RepeatIterDataset(grain_set(grain).to_iter_dataset()),
        r"repeats without an end.*Leave repeat\(\) out",
    ),
    "a loader without an end": (
        lambda grain: grain_loader(grain, num_epochs=None),
        "IndexSampler repeats without an end.*num_epochs=1",
    ),
    "batches that drop": (
        lambda grain: grain_set(grain).batch(250, drop_remainder=True).map(lambda batch: batch),
        r"drop_remainder=True leave 100 examples.*\.batch\(size\)",
    ),
    "iterated batches that may drop": (
        lambda grain: grain_set(grain).to_iter_dataset().batch(250, drop_remainder=True),
        r"leave the last examples.*\.batch\(size\)",
    ),
    "a loader that may drop": (
        lambda grain: grain_loader(grain, drop_remainder=True),
        r"leave the last examples.*Batch\(size\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED_OF_GRAIN)
def test_what_is_refused_of_grain(name, grain):
    make, words = REFUSED_OF_GRAIN[name]
    with pytest.raises(fastvi.DataError, match=words):
        open_data(make(grain))
