"""Checkpoints come back bit for bit, into the structure of the model, and damage is told."""

import json
import re
import shutil
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import fastvi
from fastvi._optional import MissingExtraError
from fastvi.cli.sweep_plan import read_plan
from fastvi.integrations.checkpoints import Checkpoints, load_checkpoint, open_checkpoints
from fastvi.results import runs
from tests.support.command_line import run

rng = np.random.default_rng(2)
PARAMS = {
    "embed": rng.normal(size=(5, 3)).astype(np.float32),
    "blocks": {
        "0": {"w": rng.normal(size=(3, 3)).astype(jnp.bfloat16), "b": rng.normal(size=3)},
        "1": {"w": rng.normal(size=(3, 3)).astype(np.float16), "b": np.float32(rng.normal())},
    },
}


def flat_names(tree, separator):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {separator.join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def in_numpy(tree):
    """The same tree without bfloat16, which numpy's own files do not hold."""
    return jax.tree_util.tree_map(
        lambda leaf: leaf.astype(np.float32) if leaf.dtype == jnp.bfloat16 else leaf, tree
    )


def assert_same_bits(tree, expected):
    assert jax.tree_util.tree_structure(tree) == jax.tree_util.tree_structure(expected)
    for got, wanted in zip(*map(jax.tree_util.tree_leaves, (tree, expected)), strict=True):
        assert isinstance(got, np.ndarray)
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        assert got.tobytes() == np.asarray(wanted).tobytes()


def save_npz(path, tree):
    np.savez(path, **flat_names(tree, "/"))


def save_orbax(folder, tree):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def refused(words, function, *arguments, **options):
    with pytest.raises((fastvi.DataError, fastvi.ConfigError), match=re.escape(words)) as caught:
        function(*arguments, **options)
    return str(caught.value)


# one checkpoint


def test_npz_gives_the_nested_dict_whose_names_it_has(tmp_path):
    expected = in_numpy(PARAMS)
    save_npz(tmp_path / "a.npz", expected)
    assert_same_bits(load_checkpoint(tmp_path / "a.npz"), expected)
    assert_same_bits(load_checkpoint(tmp_path / "a.npz", part="blocks/1"), expected["blocks"]["1"])
    refused("no 'x' in ['blocks', 'embed']", load_checkpoint, tmp_path / "a.npz", part="x/y")
    np.savez(tmp_path / "clash.npz", **{"a": np.ones(1), "a/b": np.ones(1)})
    refused("clash at 'a/b'", load_checkpoint, tmp_path / "clash.npz")
    np.savez(tmp_path / "half.npz", w=PARAMS["blocks"]["0"]["w"])
    refused("holds w without its dtype", load_checkpoint, tmp_path / "half.npz")


def test_safetensors_with_bfloat16(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    flat = flat_names(PARAMS, ".")
    save_file(flat, tmp_path / "a.safetensors")
    assert_same_bits(load_checkpoint(tmp_path / "a.safetensors"), flat)
    assert_same_bits(load_checkpoint(tmp_path / "a.safetensors", separator="."), PARAMS)
    part = load_checkpoint(tmp_path / "a.safetensors", separator=".", part="blocks/0")
    assert_same_bits(part, PARAMS["blocks"]["0"])
    # as safetensors.torch.save_model writes a weight with two names
    names = {"format": "pt", "a": "embed", "embed": "blocks.0.b"}
    save_file(flat, tmp_path / "tied.safetensors", metadata=names)
    tied = load_checkpoint(tmp_path / "tied.safetensors")
    assert_same_bits(tied, {**flat, "a": flat["embed"]})
    like = {name: flat[name] for name in flat if name != "embed"} | {"a": flat["embed"]}
    assert_same_bits(load_checkpoint(tmp_path / "tied.safetensors", like=like), like)


def test_shards_by_their_index(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    flat, places = flat_names(PARAMS, "."), {}
    for number, name in enumerate(flat):
        places[name] = f"model-0000{number % 2 + 1}-of-00002.safetensors"
    for file in set(places.values()):
        save_file({name: flat[name] for name in flat if places[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same_bits(load_checkpoint(index), flat)
    assert_same_bits(load_checkpoint(tmp_path), flat)  # as Hugging Face's libraries read a folder
    index.write_text(json.dumps({"weight_map": {**places, "other": file}}))
    refused("names other, which its files do not hold", load_checkpoint, index)
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    refused("no file beside it", load_checkpoint, index)
    index.write_text("{}")
    refused("no index", load_checkpoint, index)


@pytest.fixture(scope="module")
def orbax_folder(tmp_path_factory):
    ocp = pytest.importorskip("orbax.checkpoint")
    folder = tmp_path_factory.mktemp("orbax")
    with ocp.CheckpointManager(folder / "run") as manager:
        for step in (10, 9, 100):
            tree = {"params": times(step), "step": step}
            manager.save(step, args=ocp.args.StandardSave(tree), force=True)
            manager.wait_until_finished()
    with ocp.CheckpointManager(folder / "items") as manager:
        items = {name: ocp.args.StandardSave(PARAMS) for name in ("ema", "params")}
        manager.save(3, args=ocp.args.Composite(**items))
    save_orbax(folder / "one", PARAMS)
    return folder


def test_orbax(orbax_folder):
    assert_same_bits(load_checkpoint(orbax_folder / "one"), as_arrays(PARAMS))
    step = load_checkpoint(orbax_folder / "run" / "9", part="params")
    assert_same_bits(step, as_arrays(times(9)))
    assert_same_bits(load_checkpoint(orbax_folder / "items" / "3" / "ema"), as_arrays(PARAMS))
    text = refused("the items ema, params", load_checkpoint, orbax_folder / "items" / "3")
    assert text.endswith("such as {}.".format(orbax_folder / "items" / "3" / "ema"))
    refused("use open_checkpoints", load_checkpoint, orbax_folder / "run")
    refused("is for flat names", load_checkpoint, orbax_folder / "one", separator="/")


def times(factor):
    return jax.tree_util.tree_map(lambda leaf: leaf * factor, PARAMS)


def as_arrays(tree):
    return jax.tree_util.tree_map(np.asarray, tree)


def test_damaged_orbax(orbax_folder, tmp_path):
    shutil.copytree(orbax_folder / "one", tmp_path / "one")
    (tmp_path / "one" / "_METADATA").write_text("{")
    refused("is damaged", load_checkpoint, tmp_path / "one")
    # of one array: orbax reads several at once, and leaves the others behind after an error
    save_orbax(tmp_path / "data", {"w": PARAMS["embed"]})
    for file in (tmp_path / "data").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:20])
    refused("is damaged", load_checkpoint, tmp_path / "data")


def test_torch_state_dicts(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is large, and not in the test group")
    expected = flat_names(PARAMS, ".")
    state = {
        name: torch.from_numpy(np.array(array, np.float32)).bfloat16()
        if array.dtype == jnp.bfloat16
        else torch.from_numpy(np.array(array))
        for name, array in expected.items()
    }
    for suffix in (".pt", ".pth", ".bin", ".ckpt"):
        torch.save(state, tmp_path / f"a{suffix}")
        assert_same_bits(load_checkpoint(tmp_path / f"a{suffix}"), expected)
    path = tmp_path / "whole.pt"
    torch.save({"model": state, "optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3}, path)
    assert_same_bits(load_checkpoint(path, part="model"), expected)
    assert_same_bits(load_checkpoint(path, part="model", separator="."), PARAMS)
    assert load_checkpoint(path)["epoch"] == 3
    torch.save({"w": torch.ones(2, 2).to_sparse()}, path)
    refused("cannot be a NumPy array", load_checkpoint, path)
    torch.save(torch.nn.Linear(2, 3), path)
    refused("torch.save(module.state_dict(), path)", load_checkpoint, path)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-200])
    refused("is damaged", load_checkpoint, path)
    path.write_bytes(b"")
    refused("is damaged", load_checkpoint, path)


def test_files_that_cannot_be_read_are_told(tmp_path):
    save_npz(tmp_path / "a.npz", in_numpy(PARAMS))
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x80\x04K\x01."):
        (tmp_path / "broken.npz").write_bytes(content)
        refused("is damaged", load_checkpoint, tmp_path / "broken.npz")
    flipped = bytearray(whole)
    flipped[200] ^= 1
    (tmp_path / "broken.npz").write_bytes(bytes(flipped))
    refused("is damaged", load_checkpoint, tmp_path / "broken.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}, 1], dtype=object))
    refused("may run any code", load_checkpoint, tmp_path / "objects.npz")
    refused("there is no checkpoint", load_checkpoint, tmp_path / "absent.npz")
    (tmp_path / "model.h5").write_bytes(b"")
    refused("known are .npz, .safetensors, .pt", load_checkpoint, tmp_path / "model.h5")
    pytest.importorskip("safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    refused("is damaged", load_checkpoint, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [
        ("safetensors", "a.safetensors", "checkpoints"),
        ("torch", "a.pt", "torch"),
        ("orbax", "a", "checkpoints"),
    ],
)
def test_absent_packages_of_checkpoints_are_named(tmp_path, monkeypatch, package, name, extra):
    if package == "orbax":
        (tmp_path / name).mkdir()
        (tmp_path / name / "_METADATA").write_text("{}")
    else:
        (tmp_path / name).write_bytes(b"")
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"fastvi\[{extra}\]"):
        load_checkpoint(tmp_path / name)


# into the structure of a model


def test_arrays_go_where_their_names_are(tmp_path):
    """An equinox module, dicts of lists and a flat dict of dotted names are one to a checkpoint."""
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    arrays = {"0": model.layers[0], "1": model.layers[1]}
    named = {
        f"layers/{number}/{name}": np.asarray(getattr(layer, name)) + 1
        for number, layer in arrays.items()
        for name in ("weight", "bias")
    }
    np.savez(tmp_path / "a.npz", **named)
    loaded = load_checkpoint(tmp_path / "a.npz", like=model)
    np.testing.assert_array_equal(loaded.layers[1].weight, named["layers/1/weight"])
    assert loaded.activation is model.activation
    dotted = {name.replace("/", "."): array for name, array in named.items()}
    as_flat = load_checkpoint(tmp_path / "a.npz", like=dotted)
    np.testing.assert_array_equal(as_flat["layers.0.bias"], named["layers/0/bias"])
    brackets = {f"['layers'][{name[7]}].{name[9:]}": array for name, array in named.items()}
    np.savez(tmp_path / "b.npz", **brackets)
    loaded = load_checkpoint(tmp_path / "b.npz", like=model)
    np.testing.assert_array_equal(loaded.layers[0].weight, named["layers/0/weight"])
    lists = {"layers": [{"weight": layer.weight, "bias": layer.bias} for layer in model.layers]}
    shapes = jax.eval_shape(lambda: lists)
    as_lists = load_checkpoint(tmp_path / "a.npz", like=shapes)
    np.testing.assert_array_equal(as_lists["layers"][0]["bias"], named["layers/0/bias"])


def test_nnx_states(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    pytest.importorskip("orbax.checkpoint")
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    more = jax.tree_util.tree_map(lambda leaf: leaf + 1, params)
    save_orbax(tmp_path / "state", more)
    save_orbax(tmp_path / "pure", nnx.to_pure_dict(more))
    for name in ("state", "pure"):
        loaded = load_checkpoint(tmp_path / name, like=params)
        np.testing.assert_array_equal(loaded["kernel"][...], more["kernel"][...])


def test_what_does_not_fit_is_listed(tmp_path):
    like = {"a": np.ones(3), "b": {"c": np.ones((2, 2)), "d": np.ones(1)}}
    np.savez(tmp_path / "a.npz", **{"a": np.ones(4), "b/c": np.ones((2, 2), int), "e": np.ones(1)})
    text = refused("does not fit the parameters", load_checkpoint, tmp_path / "a.npz", like=like)
    for words in (
        "missing: b/d",
        "unexpected: e",
        "of other shapes: a (4,) for (3,)",
        "not floating-point: b/c",
        "checkpoint of the same model",
    ):
        assert words in text
    np.savez(tmp_path / "state.npz", **{"net/a": np.ones(3), "net/b/c": np.ones((2, 2)), "n": 1})
    some = {"a": np.ones(3), "b": {"c": np.ones((2, 2))}}
    text = refused('pass part="net"', load_checkpoint, tmp_path / "state.npz", like=some)
    assert "PATH:net to --params" in text
    np.savez(tmp_path / "dots.npz", **{"net.a": np.ones(3), "net.b.c": np.ones((2, 2)), "n": 1})
    refused('separator="." and part="net"', load_checkpoint, tmp_path / "dots.npz", like=some)
    options = {"separator": ".", "part": "net"}
    assert_same_bits(load_checkpoint(tmp_path / "dots.npz", like=some, **options), some)
    many = {f"layer_{number}": np.ones(1) for number in range(8)}
    text = refused("missing", load_checkpoint, tmp_path / "a.npz", like=many)
    assert "layer_4 and 3 more" in text
    twice = {"a": {"b": np.ones(1)}, "a.b": np.ones(1)}
    refused("one name", load_checkpoint, tmp_path / "a.npz", like=twice)


def test_a_second_name_of_a_tied_weight_is_left_out(tmp_path):
    like = {"embed": np.arange(6.0).reshape(2, 3), "bias": np.zeros(2)}
    np.savez(tmp_path / "tied.npz", **like, head=like["embed"])
    assert_same_bits(load_checkpoint(tmp_path / "tied.npz", like=like), like)
    # Not the same weight: one bit of sign, another dtype or shape, or equal by chance.
    signed = like["embed"] * np.where(like["embed"] == 0, -1, 1)
    others = signed, like["embed"].astype(np.float32), like["embed"].reshape(3, 2), np.zeros(2)
    for other in others:
        np.savez(tmp_path / "other.npz", **like, head=other)
        refused("unexpected: head", load_checkpoint, tmp_path / "other.npz", like=like)


def test_names_that_are_no_parameters_are_left_out_where_that_is_asked(tmp_path):
    like = {"w": np.arange(3.0)}
    path = tmp_path / "step_1.npz"
    np.savez(path, w=like["w"], **{"norm.running_mean": np.arange(4.0), "count": np.int64(3)})
    text = refused("module.load_state_dict", load_checkpoint, path, like=like)
    assert 'ignore=["count", "*/running_mean"]' in text
    for ignore in (["*/running_mean", "count"], ("*.running_*", "cou*"), ["*"]):
        assert_same_bits(load_checkpoint(path, like=like, ignore=ignore), like)
    (one,) = open_checkpoints(tmp_path, like=like, ignore=["*"])
    assert_same_bits(one, like)
    refused("unexpected: count.", load_checkpoint, path, like=like, ignore=["norm.*"])
    for function in (load_checkpoint, open_checkpoints):
        refused("Pass like too", function, tmp_path, ignore=["*"])
        refused('Pass ["*"]', function, tmp_path, like=like, ignore="*")
    # What is wanted is never left out, and nothing stands in for what is missing.
    more = {**like, "v": np.ones(1)}
    refused("missing: v", load_checkpoint, path, like=more, ignore=["*"])


def test_state_dicts_of_tied_weights_and_buffers(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is large, and not in the test group")
    from fastvi.integrations.torch import torch_loss

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(4, 3)
            self.norm = torch.nn.BatchNorm1d(3)
            self.out_norm = self.norm  # scales at 1 and biases at 0 under two names
            self.head = torch.nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.out_norm(self.norm(self.embed(tokens))))

    module = Tied().eval()
    loss_fn, params = torch_loss(module, torch.nn.functional.cross_entropy)
    path = tmp_path / "model.pt"
    torch.save(module.state_dict(), path)
    text = refused(
        "unexpected: norm/num_batches_tracked, norm/running_mean",
        load_checkpoint,
        path,
        like=params,
    )
    assert "head" not in text
    assert "out_norm/weight" not in text
    loaded = load_checkpoint(path, like=params, ignore=re.findall(r'"([^"]*)"', text))
    assert_same_bits(loaded, as_arrays(params))
    batch = np.array([0, 1, 2]), np.array([1, 2, 3])
    assert loss_fn(loaded, batch) == loss_fn(params, batch)


# the checkpoints of a run


OUT = {"weight": np.zeros((1, 2), np.float32), "bias": np.zeros(1, np.float32)}
FAST = {"method": "variational", "steps": 30, "M": 1, "r": 0, "eval_samples": 32}
FAST |= {"whitening_mode": "none", "curvature_rank": 0, "early_stop": False}


def of_step(step):
    return jax.tree_util.tree_map(lambda leaf: leaf + np.float32(step / 1000), OUT)


def test_a_folder_is_read_in_the_order_of_its_steps(tmp_path):
    for step in (100, 9, 20):
        save_npz(tmp_path / f"step_{step}.npz", of_step(step))
    (tmp_path / "log.txt").write_text("")
    checkpoints = open_checkpoints(tmp_path, like=OUT)
    assert isinstance(checkpoints, Checkpoints)
    assert checkpoints.steps == (9, 20, 100)
    assert len(checkpoints) == 3
    for params, step in zip(checkpoints, checkpoints.steps, strict=True):
        assert_same_bits(params, of_step(step))
    assert_same_bits(checkpoints[-1], of_step(100))


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["epoch=3-step=500", "model_v2_step1000_lr3", "global_step_7-ema"], (500, 1000, 7)),
        (["model_epoch1_loss0.5", "epoch2_loss0.4", "epoch10_loss0.3"], (1, 2, 10)),
        (["epoch=9-val_loss=.25-v1", "epoch=10-val_loss=1.5e-3"], (9, 10)),
        (["Iter_0005000", "iteration-6000_3", "2_writer3_iter7"], (5000, 6000, 7)),
        (["ckpt-7-ema", "my.checkpoint_8_lr1e-4"], (7, 8)),
        (
            ["model_100", "9", "resnet18_20", "gpt2_30", "mlp40", "0.5_50"],
            (100, 9, 20, 30, 40, 50),
        ),
    ],
)
def test_names_of_steps(tmp_path, names, steps):
    for name in names:
        (tmp_path / f"{name}.npz").write_bytes(b"")
    for number in (1, 2):  # the shards of another, which its index names
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"")
    checkpoints = open_checkpoints(tmp_path)
    expected = sorted(zip(steps, names, strict=True))
    assert checkpoints.steps == tuple(step for step, _ in expected)
    assert [path.stem for path in checkpoints.paths] == [name for _, name in expected]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["step_1.npz", "final.npz"], 'pattern="step_*.npz"'),
        (["w_final.npz", "w_1.npz"], 'pattern="w_[0-9]*.npz"'),
        (["loss0.5.npz", "v2.npz"], "tells its step. Rename it, such as step_100."),
        (["mlp_64_100.npz"], "may tell step 64 or 100. Rename it, such as step_100.npz, or pass"),
        (["step_1_of_step_9.npz"], "may tell step 1 or 9"),
        (["epoch_3.npz", "step_500.npz"], 'pattern="epoch_*.npz" or "step_*.npz"'),
        (["3.npz", "step_500.npz"], 'pattern="[0-9]*.npz" or "step_*.npz"'),
        (["model_100.pt", "optimizer_100.pt"], 'pattern="model_*.pt" or "optimizer_*.pt"'),
        (["model_1.pt", "model_100.pt", "optimizer_100.pt"], 'such as pattern="model_*.pt".'),
        (["step_500.npz", "step_500.pt"], 'pattern="step_*.npz" or "step_*.pt"'),
        (["epoch=1-step=5.ckpt", "epoch=1-step=5-v1.ckpt"], 'pattern="epoch=*-step=*-v*.ckpt"'),
        (["step_1.pt", "step_5.pt", "step_5-v1.pt"], "both of step 5. Move one of them out"),
    ],
)
def test_names_that_tell_no_order_name_the_way_out(tmp_path, names, words):
    """Each pattern that an error names leaves an order."""
    for name in names:
        (tmp_path / name).write_bytes(b"")
    text = refused(words, open_checkpoints, tmp_path)
    for pattern in re.findall(r'"([^"]*)"', text):
        assert len(open_checkpoints(tmp_path, pattern=pattern)) >= 1


def test_a_folder_without_checkpoints(tmp_path):
    refused("holds no checkpoint", open_checkpoints, tmp_path, pattern="*.pt")
    refused("there is no folder", open_checkpoints, tmp_path / "absent")


def test_folders_of_steps(orbax_folder, tmp_path):
    shutil.copytree(orbax_folder / "run", tmp_path / "run")
    unfinished = tmp_path / "run" / "200.orbax-checkpoint-tmp-17"
    shutil.copytree(orbax_folder / "run" / "9", unfinished)
    checkpoints = open_checkpoints(tmp_path / "run", part="params")
    assert checkpoints.steps == (9, 10, 100)
    assert_same_bits(checkpoints[1], as_arrays(times(10)))
    shutil.rmtree(tmp_path / "run")
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "pytorch_model.bin").write_bytes(b"")
    assert open_checkpoints(tmp_path).steps == (500, 1000)


def test_a_curve_over_a_folder_reads_one_at_a_time(finished, tmp_path):
    """The losses are those of the files before the one that does not fit.

    The target is that of the command line, whose programs it shares.
    """
    for step in (0, 30):
        save_npz(tmp_path / f"step_{step}.npz", of_step(step))
    save_npz(tmp_path / "step_40.npz", {"weight": OUT["weight"]})
    (loss_fn, params), data = sys.modules["checkpoint_model"].target()
    checkpoints = open_checkpoints(tmp_path, like=params)
    options = {"num_chains": 1, "warm_start": False, "progress": False, **FAST}
    with pytest.raises(fastvi.DataError, match="missing: bias") as caught:
        fastvi.llc_curve(loss_fn, checkpoints, data, **options)
    losses = [0.5 * np.mean((data[0].sum(1) + 1) ** 2) * (step / 1000) ** 2 for step in (0, 30)]
    np.testing.assert_allclose(caught.value.partial.init_loss, losses, rtol=1e-5, atol=1e-12)


# the command line

TARGET = """
import jax.numpy as jnp
import numpy as np

from fastvi.integrations.equinox import equinox_loss
import equinox as eqx
import jax

INPUTS = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)


def target():
    model = eqx.nn.Linear(2, 1, key=jax.random.key(0))
    loss = lambda outputs, targets: 0.5 * jnp.mean((outputs - targets) ** 2)
    return equinox_loss(model, loss), (INPUTS, np.zeros((40, 1), np.float32))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the command line on an adapter's model, with parameters from a file."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "checkpoint_model.py").write_text(TARGET)
    np.savez(folder / "w.npz", **{"best/weight": np.ones((1, 2)), "best/bias": np.zeros(1)})
    np.savez(folder / "other.npz", weight=np.ones((1, 3)))
    settings = [f"{name}={str(value).lower()}" for name, value in FAST.items()]
    context = pytest.MonkeyPatch()
    context.chdir(folder)
    context.setattr(sys, "path", [*sys.path])
    # figures take more than the fit, and have tests of their own
    context.setattr(runs, "plot_traces", lambda result: Figure())
    context.setattr(runs, "write_report", lambda result, path: path.write_text(""))
    command = ["llc", "checkpoint_model:target", "--out", "run", "--num-chains", "1"]
    yield folder, run([*command, "--params", "w.npz:best", "--set", *settings])
    context.undo()


def test_parameters_of_a_target_may_come_from_a_file(finished):
    folder, (status, text, errors) = finished
    assert status == 0, errors
    assert f"parameters     {folder / 'w.npz'}:best" in text
    inputs = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    written = json.loads((folder / "run" / "result.json").read_text())
    assert written["init_loss"] == pytest.approx(0.5 * np.mean(inputs.sum(1) ** 2), rel=1e-5)
    assert (
        json.loads((folder / "run" / "run.json").read_text())["params"]
        == f"{folder / 'w.npz'}:best"
    )


def test_a_run_is_redone_with_the_parameters_that_it_had(finished, monkeypatch, tmp_path):
    from fastvi.cli import llc

    seen = []
    monkeypatch.setattr(llc, "estimate_origin", lambda problem, *rest, **more: seen.append(problem))
    monkeypatch.setattr(llc, "write_and_print", lambda *rest, **more: 0)
    folder, _ = finished
    monkeypatch.chdir(tmp_path)  # the file's name was relative to another folder
    again = ["llc", str(folder / "run"), "--trust", "--out", "again"]
    assert run(again)[0] == 0
    np.testing.assert_array_equal(seen[0].params.weight, np.ones((1, 2)))
    shutil.copytree(folder / "run", tmp_path / "moved")
    record = json.loads((tmp_path / "moved" / "run.json").read_text())
    gone = f"{tmp_path / 'gone.npz'}:best"
    (tmp_path / "moved" / "run.json").write_text(json.dumps({**record, "params": gone}))
    status, _, errors = run(["llc", "moved", "--trust", "--out", "x"])
    assert status == 2
    assert f"there is no checkpoint {gone}. Name one that is there: --params" in errors
    assert run(["llc", "moved", "--trust", "--params", f"{folder / 'w.npz'}:best"])[0] == 0


def test_a_sweep_takes_parameters_from_a_file_too(finished):
    folder, _ = finished
    (folder / "own.yaml").write_text(
        "target: checkpoint_model:target\nparams: other.npz\ngrid: {gamma: [1, 2]}"
    )
    (folder / "redo.yaml").write_text("target: run\ngrid: {gamma: [1, 2]}")
    for name, params in (("own.yaml", "other.npz"), ("redo.yaml", "w.npz:best")):
        plan = read_plan(folder / name, trust=True)
        expected = {str(folder / params)}
        assert {plan.params, *(cell.origin.params for cell in plan.cells)} == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("other.npz", "missing: bias; of other shapes: weight (1, 3) for (1, 2)"),
        ("w.npz", "missing: weight, bias; unexpected: best/bias, best/weight"),
        ("w.npz:last", "no part 'last'"),
        ("absent.npz", "/absent.npz. Name one that is there: --params PATH"),
    ],
)
def test_wrong_parameters_are_one_line_and_exit_2(finished, given, words):
    status, _, errors = run(["llc", "checkpoint_model:target", "--out", "x", "--params", given])
    assert status == 2
    assert words in errors
