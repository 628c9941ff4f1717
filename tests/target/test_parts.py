"""Parts of the weights by name: which numbers they are, and what is estimated of them."""

import dataclasses
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import fastvi
from fastvi._compilation import CompileWatch
from fastvi.api import parts as parts_api
from fastvi.target.data import Problem, hold
from fastvi.target.look import weigh
from fastvi.target.losses import passed_examples, take_examples
from fastvi.target.restrict import restrict_to_each

rng = np.random.default_rng(1)
WIDTH, HEADS, COUNT, NBETA, GAMMA = 4, 2, 512, 10.0, 20.0


def block():
    """One layer with a fused projection of the queries, keys and values of two heads."""
    qkv = rng.normal(size=(WIDTH, 3 * WIDTH)).astype(np.float32)
    return {"qkv": qkv, "out": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)}


PARAMS = {"embed": rng.normal(size=(6, WIDTH)).astype(np.float32), "blocks": [block(), block()]}
LAYOUTS = {"blocks/*/qkv": "d (3 h c)", "blocks/*/out": "(h c) d"}
PARTS = {
    **{
        name: mask
        for name, mask in fastvi.attention_heads(PARAMS, LAYOUTS, HEADS).items()
        if name in ("head 0.0", "head 1.1")
    },
    "rows": "embed[1:4]",
}
SIZE = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
AXES = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
HESSIAN = (AXES * np.geomspace(0.5, 8.0, SIZE)) @ AXES.T
POINTS = 0.3 * rng.normal(size=(COUNT, SIZE))
WEIGHTS = rng.uniform(0.5, 1.5, COUNT).astype(np.float32)
POINTS = (POINTS - np.average(POINTS, axis=0, weights=WEIGHTS)).astype(np.float32)
CENTER = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(PARAMS)])


def example_losses(params, points):
    """Quadratic, about a point of each example's own, so that gradients of batches are noisy."""
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
    away = flat - CENTER - points
    return 0.5 * jnp.sum(away @ HESSIAN.astype(np.float32) * away, axis=1)


def weighted(params, batch):
    return example_losses(params, batch[0]), batch[1]


def mean(params, batch):
    return jnp.mean(example_losses(params, batch[0] - jnp.mean(POINTS, axis=0)))


def columns(mask):
    """Return which coordinates of the flat parameters vary."""
    pairs = zip(jax.tree.leaves(mask), jax.tree.leaves(PARAMS), strict=True)
    return np.concatenate([np.broadcast_to(one, leaf.shape).ravel() for one, leaf in pairs])


def exact(mask):
    """1/2 tr(A (A + gamma)^-1) of the rows and columns that vary."""
    some = np.flatnonzero(columns(mask))
    precision = NBETA * HESSIAN[np.ix_(some, some)]
    return 0.5 * np.trace(precision @ np.linalg.inv(precision + GAMMA * np.eye(some.size)))


def mask_of(part):
    return fastvi.select_part(PARAMS, part) if isinstance(part, str) else part


# what a pattern of these names selects

NESTED = {
    "emb": {"w": np.zeros((5, 3), np.float32)},
    "layers": [
        {"attn": {"w_q": np.zeros((3, 4)), "w_o": np.zeros((4, 3))}, "b": np.zeros(3)}
        for _ in range(2)
    ],
    "blocks.0.attn.qkv.weight": np.zeros((12, 4)),
    "mlp/~/linear_0": {"w": np.zeros((2, 2)), "count": np.arange(3)},
}


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("emb/w", ["emb/w"]),
        ("emb", ["emb/w"]),
        ("layers/*/attn", [f"layers/{i}/attn/{n}" for i in "01" for n in ("w_o", "w_q")]),
        ("layers/1/**", ["layers/1/attn/w_o", "layers/1/attn/w_q", "layers/1/b"]),
        ("**/w_?", [f"layers/{i}/attn/{n}" for i in "01" for n in ("w_o", "w_q")]),
        ("layers.0.b", ["layers/0/b"]),
        ("blocks.*.attn.qkv.weight", ["blocks.0.attn.qkv.weight"]),
        ("mlp/~/linear_*/w", ["mlp/~/linear_0/w"]),
        (["emb/w", "layers/0/b"], ["emb/w", "layers/0/b"]),
    ],
)
def test_patterns_name_arrays(patterns, names):
    found = fastvi.preview(NESTED, {"part": patterns}).parts["part"]
    assert sorted(one.array for one in found) == sorted(names)
    assert all(one.slices == "" for one in found)


@pytest.mark.parametrize(
    "text", ["1:3, 2", "..., -1", ":, ::2", "-2:", "4", "2:3, ...", " 0 : 4 , 0:1"]
)
def test_slices_are_those_of_numpy(text):
    expected = np.zeros((5, 3), bool)
    expected[eval(f"np.s_[{text}]")] = True
    mask = fastvi.select_part(NESTED, f"emb/w[{text}]")
    np.testing.assert_array_equal(mask["emb"]["w"], expected)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves({**mask, "emb": False}))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers/0/atn/w_q", "matches no array.*Near names are 'layers/0/attn/w_q'"),
        ("mlp/~/linear_0/count", "matches no array"),
        ("emb/w[0:6]", r"out of range: 6 on axis 0 of 'emb/w', which has shape \(5, 3\)"),
        ("emb/w[..., 3]", "out of range: 3 on axis 1"),
        ("emb/w[0, 0, 0]", "more axes"),
        ("emb/w[2:2]", "is empty"),
        ("emb/w[a]", "must have numbers"),
        ("emb/w[0][1]", "one slice in brackets"),
        ([], "at least one pattern"),
        (["emb/w", 3], "must be a text"),
    ],
)
def test_patterns_that_select_nothing_are_refused(pattern, message):
    with pytest.raises(fastvi.ConfigError, match=message):
        fastvi.select_part(NESTED, pattern)


# heads: the numbers that a head's output depends on


def heads_of(layout, array):
    """Return the projection of each head, [heads, ...], written without the package."""
    width, channels = 4, 2
    shapes = {
        "d (3 h c)": lambda w: w.reshape(width, 3, HEADS, channels).transpose(2, 0, 1, 3),
        "(3 h c) d": lambda w: w.reshape(3, HEADS, channels, width).transpose(1, 0, 2, 3),
        "d (h 3 c)": lambda w: w.reshape(width, HEADS, 3, channels).transpose(1, 0, 2, 3),
        "(h c) d": lambda w: w.reshape(HEADS, channels, width),
        "d h c": lambda w: w.reshape(width, HEADS, channels).transpose(1, 0, 2),
        "(3 h c)": lambda w: w.reshape(3, HEADS, channels).transpose(1, 0, 2),
    }
    return shapes[layout](array)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("d (3 h c)", (4, 12)),
        ("(3 h c) d", (12, 4)),
        ("d (h 3 c)", (4, 12)),
        ("(h c) d", (4, 4)),
        ("d h c", (4, 2, 2)),
        ("(3 h c)", (12,)),
    ],
)
def test_heads_are_what_their_outputs_depend_on(layout, shape):
    params = {"layers": [{"w": np.arange(np.prod(shape), dtype=float).reshape(shape)}] * 2}
    found = fastvi.attention_heads(params, {"layers/*/w": layout}, HEADS)
    assert list(found) == ["head 0.0", "head 0.1", "head 1.0", "head 1.1"]
    for head in range(HEADS):
        own = np.isin(params["layers"][1]["w"], heads_of(layout, params["layers"][1]["w"])[head])
        np.testing.assert_array_equal(found[f"head 1.{head}"]["layers"][1]["w"], own)
        assert not np.any(found[f"head 1.{head}"]["layers"][0]["w"])


@pytest.mark.parametrize(
    ("layouts", "heads", "message"),
    [
        ({"embed": "d (h c)"}, 3, r"does not fit 'embed', of shape \(6, 4\)"),
        ({"embed": "h"}, 2, "has 1 axes"),
        ({"embed": "d c"}, 2, "one of them or a part of one h"),
        ({"embed": "d (h c e)"}, 2, "does not fit"),
        ({"embd": "d (h c)"}, 2, "Near names are 'embed'"),
        ({"embed": "d (h c)"}, 0, "num_heads must be"),
        ({}, 2, "at least one array"),
    ],
)
def test_layouts_that_do_not_fit(layouts, heads, message):
    with pytest.raises(fastvi.ConfigError, match=message):
        fastvi.attention_heads(PARAMS, layouts, heads)


# names of the frameworks


def haiku_params():
    hk = pytest.importorskip("haiku")
    net = hk.transform(lambda x: hk.nets.MLP([3, 2])(x))
    return net.init(jax.random.key(0), jnp.ones((1, 4))), "mlp/~/linear_1/w", (3, 2)


def linen_params():
    nn = pytest.importorskip("flax.linen")
    net = nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(2)])
    return net.init(jax.random.key(0), jnp.ones((1, 4))), "params/layers_2/kernel", (3, 2)


def nnx_params():
    nnx = pytest.importorskip("flax.nnx")
    net = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
    return nnx.split(net, nnx.Param)[1], "layers/1/kernel", (3, 2)


def equinox_params():
    return eqx.nn.MLP(4, 2, 3, 1, key=jax.random.key(0)), "layers/1/weight", (2, 3)


def torch_params():
    return {f"layers.{i}.weight": np.ones((2, 3)) for i in range(2)}, "layers.1.weight", (2, 3)


@pytest.mark.parametrize(
    "make", [haiku_params, linen_params, nnx_params, equinox_params, torch_params]
)
def test_names_of_frameworks(make):
    params, pattern, shape = make()
    whole = fastvi.restrict(lambda params, batch: 0.0, params, fastvi.select_part(params, pattern))
    assert [array.shape for array in whole[1]] == [shape]
    mask = fastvi.select_part(params, pattern + "[1:, 0]")
    loss, free = fastvi.restrict(lambda params, batch: 0.0, params, mask)
    moved = loss.put([array + 1 for array in free])
    changes = [
        np.asarray(new) - np.asarray(old)
        for new, old in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True)
        if hasattr(old, "dtype")
    ]
    (change,) = [one for one in changes if np.any(one)]
    np.testing.assert_allclose(change[1:, 0], 1, rtol=1e-6)
    assert np.count_nonzero(change) == shape[0] - 1


# the table of parts


def test_preview_counts_what_is_shared_and_what_is_left():
    parts = {"rows": "embed[1:3]", "column": "embed[:, 0]", "head": PARTS["head 0.0"]}
    found = fastvi.preview(PARAMS, parts)
    assert found.sizes == {"rows": 8, "column": 6, "head": 32}
    assert found.overlaps == {("rows", "column"): 2}
    assert found.uncovered == {
        "blocks/0/out": 8,
        "blocks/0/qkv": 24,
        "blocks/1/out": 16,
        "blocks/1/qkv": 48,
        "embed": 12,
    }
    assert found.total == SIZE
    table = str(found)
    assert "rows: 8 of 152 numbers, 5.26 %" in table
    assert "[:, 0:2+4:6+8:10]" in table
    assert "rows and column: 2" in table
    scattered = {"odd": {"embed": rng.normal(size=(6, WIDTH)) > 0, "blocks": False}}
    assert fastvi.preview(PARAMS, scattered).parts["odd"][0].slices == "scattered entries"
    for parts in ({}, ["embed"], {1: "embed"}):
        with pytest.raises(fastvi.ConfigError, match="mapping from names"):
            fastvi.preview(PARAMS, parts)


# one program for parts of one shape


def test_shared_programs_compute_the_restricted_loss():
    """Of two dtypes, a setting, an integer array, and arrays that vary as a whole."""
    params = {
        "a": [jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))],
        "half": [jnp.ones(3, jnp.bfloat16), jnp.full(3, 2, jnp.bfloat16)],
        "table": jnp.array([2, 0, 1]),
        "activation": jnp.tanh,
    }

    def loss_fn(params, batch):
        hidden = params["activation"](batch @ params["a"][0][:, params["table"]])
        own = hidden * params["half"][0] + params["half"][1]
        return jnp.mean(own @ params["a"][1].T)

    parts = ["a/0[:, 1]", "a/1[0, :2]", ["a/0", "half/1"], ["a/1", "half/0"], ["a/0[1]", "half/0"]]
    masks = [fastvi.select_part(params, part) for part in parts]
    batch = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
    made = restrict_to_each(loss_fn, params, masks)
    texts = []
    for mask, (loss, free) in zip(masks, made, strict=True):
        alone, _ = fastvi.restrict(loss_fn, params, mask)
        moved = tuple(array + jnp.asarray(0.25, array.dtype) for array in free)
        beside = loss.beside(batch)
        found, expected = quick_jit(
            lambda moved, beside, loss=loss, alone=alone: (
                jax.value_and_grad(loss)(moved, beside),
                jax.value_and_grad(alone)(moved, beside.examples),
            )
        )(moved, beside)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=1e-6)
        texts.append(str(jax.make_jaxpr(loss)(moved, beside)))
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert len(set(texts)) == 3


def test_examples_are_weighed_and_cut_beside_what_they_share():
    loss, free = fastvi.restrict(weighted, PARAMS, mask_of("embed"))
    batch = loss.beside((jnp.asarray(POINTS), jnp.asarray(WEIGHTS)))
    kept = [leaf for leaf in batch.shared.arrays[0] if leaf is not None]
    assert [leaf.shape for leaf in kept] == [(4, 4), (4, 12), (4, 4), (4, 12)]
    objective, center = fastvi.ravel_loss(loss, free)
    posterior = fastvi.LocalPosterior(center, jnp.float32(NBETA), jnp.float32(GAMMA))
    data = weigh(objective, Problem(posterior, hold(batch), 8), "loss_fn").data
    each = np.asarray(example_losses(PARAMS, POINTS) * WEIGHTS) / WEIGHTS.mean()
    assert data.num_examples == COUNT
    some = take_examples(data.examples, slice(3, 7))
    np.testing.assert_array_equal(passed_examples(some)[1], WEIGHTS[3:7])
    assert objective.loss(center, some) == pytest.approx(each[3:7].mean(), rel=1e-5)
    # in slices, of which the last is shorter
    data = dataclasses.replace(data, max_batch=200)
    whole = data.mean(lambda batch: objective.loss(center, batch))
    assert whole == pytest.approx(each.mean(), rel=1e-5)


# estimates

OPTIONS = {"nbeta": NBETA, "localization": GAMMA, "progress": False}
OF_WALKS = {"sampler": {"start": "localizer"}, "budget": 3e4, "error": 0.03}


@pytest.fixture(scope="module")
def walks():
    with CompileWatch() as watch:
        found = fastvi.estimate_parts(mean, PARAMS, (POINTS,), PARTS, **OPTIONS, **OF_WALKS)
    return types.SimpleNamespace(found=found, programs=watch.programs)


def test_parts_meet_the_closed_form(walks):
    assert list(walks.found) == list(PARTS)
    for name, part in PARTS.items():
        one = walks.found[name]
        assert one.dim == columns(mask_of(part)).sum()
        assert abs(one.llc - exact(mask_of(part))) < 4 * one.llc_sem
    assert walks.found.sample_gradients == sum(one.sample_gradients for one in walks.found.values())
    assert "head 1.1  32 " in walks.found.summary()
    assert walks.found.llc["rows"] == walks.found["rows"].llc


def test_a_part_of_the_same_shape_compiles_nothing(walks):
    """Another layer's head, and the same by its mask alone."""
    assert walks.programs > 0
    heads = fastvi.attention_heads(PARAMS, LAYOUTS, HEADS)
    others = {name: heads[name] for name in ("head 1.0", "head 0.1")}
    with CompileWatch() as watch:
        found = fastvi.estimate_parts(mean, PARAMS, (POINTS,), others, **OPTIONS, **OF_WALKS)
    assert watch.programs == 0
    for name, one in found.items():
        assert abs(one.llc - exact(others[name])) < 4 * one.llc_sem


def test_a_part_is_its_mask(walks):
    mask = PARTS["head 1.1"]
    alone = fastvi.estimate_llc(mean, PARAMS, (POINTS,), param_mask=mask, **OPTIONS, **OF_WALKS)
    # the same walk by another program, which rounds otherwise
    assert alone.llc == pytest.approx(walks.found["head 1.1"].llc, rel=1e-3)


def test_walkers_of_a_part_go_on(walks):
    draws = fastvi.sample_posterior(
        walks.found["head 0.0"],
        40,
        losses={"train": (POINTS,)},
        observables={"outside": lambda params, data: jnp.sum(params["embed"]) + 0 * data[0][0, 0]},
        keep_params=True,
        progress=False,
    )
    found = draws.llc_estimate
    assert abs(found.value - exact(PARTS["head 0.0"])) < 4 * found.sem
    # each example by itself, and their mean
    of_examples = NBETA * (draws.losses["train"] - draws.init_losses["train"]).mean(axis=2)
    np.testing.assert_allclose(of_examples, draws.energies.mean(axis=2), atol=1e-3)
    np.testing.assert_allclose(draws.observables["outside"], PARAMS["embed"].sum(), rtol=1e-6)
    assert draws.params(0, 0)["blocks"][1]["qkv"].shape == (WIDTH, 3 * WIDTH)


def test_errors_name_the_part_and_hold_those_before(walks, monkeypatch):
    with pytest.raises(fastvi.DataError, match="held in memory"):
        fastvi.estimate_parts(mean, PARAMS, iter([(POINTS,)]), PARTS, **OPTIONS)
    bad = {**PARTS, "nothing": lambda path: False}
    with pytest.raises(fastvi.ConfigError, match="must let some parameter vary") as caught:
        fastvi.estimate_parts(mean, PARAMS, (POINTS,), bad, **OPTIONS)
    assert caught.value.__notes__ == ["fastvi: of part 'nothing'."]

    def fail(loss, free, *args, **options):
        if free[0].size == 12:
            raise KeyError("lost")
        return walks.found["head 0.0"]

    monkeypatch.setattr(parts_api, "estimate_target", fail)
    with pytest.raises(KeyError, match="lost") as caught:
        fastvi.estimate_parts(mean, PARAMS, (POINTS,), PARTS, **OPTIONS)
    assert list(caught.value.partial) == ["head 0.0", "head 1.1"]
    assert "at part 'rows'" in caught.value.__notes__[0]
