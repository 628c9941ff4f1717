"""Each adapter gives the loss of the same network written by hand on a raw pytree.

Its llc is within the error.
"""

import functools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64, quick_jit

import fastvi
from fastvi._optional import MissingExtraError

COUNT, WIDTH, NOISE = 120, 4, 0.1
OPTIONS = {
    "steps": 40,
    "method": "variational",
    "num_chains": 1,
    "eval_samples": 32,
    "M": 1,
    "r": 0,
    "progress": False,
    "batch_size": COUNT,
}

rng = np.random.default_rng(9)
X = rng.normal(size=(COUNT, 2)).astype(np.float32)
Y = (
    np.tanh(X @ rng.normal(size=(2, 3))) @ rng.normal(size=(3, 1))
    + NOISE * rng.normal(size=(COUNT, 1))
).astype(np.float32)
W1, B1 = rng.normal(size=(2, WIDTH)).astype(np.float32), rng.normal(size=WIDTH).astype(np.float32)
W2, B2 = rng.normal(size=(WIDTH, 1)).astype(np.float32), rng.normal(size=1).astype(np.float32)
LEAVES = {"w1": W1, "b1": B1, "w2": W2, "b2": B2}


def mean_squared(outputs, targets):
    return 0.5 * jnp.mean((outputs - targets) ** 2)


def network(weights, inputs):
    return jnp.tanh(inputs @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"]


def estimate(loss_fn, params):
    return fastvi.estimate_llc(loss_fn, params, (X, Y), key=3, **OPTIONS)


def written_by_hand(order, transposed=False):
    """The network on a plain list of arrays, in the order that the other pytree has."""

    def loss_fn(params, batch):
        weights = dict(zip(order, params, strict=True))
        if transposed:
            weights = {name: leaf.T for name, leaf in weights.items()}
        return mean_squared(network(weights, batch[0]), batch[1])

    return loss_fn, [LEAVES[name].T if transposed else LEAVES[name] for name in order]


@functools.cache
def estimate_by_hand():
    """One for all: an llc does not know the order of the coordinates."""
    return estimate(*written_by_hand(("b1", "w1", "b2", "w2")))


def assert_same_loss(loss_fn, params, raw, raw_params, batch):
    """Two programs are alike in values and gradients; an llc is a sampled number of one program."""
    with enable_x64(True):
        double = functools.partial(jax.tree_util.tree_map, lambda leaf: jnp.asarray(leaf, float))
        value, gradient = quick_jit(jax.value_and_grad(loss_fn))(double(params), double(batch))
        expected, raw_gradient = quick_jit(jax.value_and_grad(raw))(
            double(raw_params), double(batch)
        )
        assert value == pytest.approx(float(expected), rel=1e-12)
        leaves, raw_leaves = map(jax.tree_util.tree_leaves, (gradient, raw_gradient))
        for got, wanted in zip(leaves, raw_leaves, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


def assert_within_errors(result, expected):
    joint = np.hypot(result.llc_sem, expected.llc_sem)
    assert abs(result.llc - expected.llc) < 4 * joint
    assert result.init_loss == pytest.approx(expected.init_loss, rel=1e-5)


def assert_same(loss_fn, params, order, transposed=False):
    assert_same_loss(loss_fn, params, *written_by_hand(order, transposed), (X, Y))
    result = estimate(loss_fn, params)
    assert result.dim == 4 * WIDTH + 1
    assert_within_errors(result, estimate_by_hand())


def test_haiku():
    hk = pytest.importorskip("haiku")
    from fastvi.integrations.haiku import haiku_loss

    def function(x):
        hidden = jnp.tanh(hk.Linear(WIDTH)(x))
        return hk.Linear(1)(hidden)

    transformed = hk.transform(function)
    assert jax.eval_shape(transformed.init, jax.random.key(0), X).keys() == {"linear", "linear_1"}
    params = {
        "linear": {"w": jnp.asarray(W1), "b": jnp.asarray(B1)},
        "linear_1": {"w": jnp.asarray(W2), "b": jnp.asarray(B2)},
    }
    assert_same(haiku_loss(transformed, mean_squared), params, ("b1", "w1", "b2", "w2"))
    keyless = haiku_loss(hk.without_apply_rng(transformed), mean_squared)
    assert keyless(params, (X, Y)) == haiku_loss(transformed, mean_squared)(params, (X, Y))
    with pytest.raises(fastvi.DataError, match="rng is given"):
        haiku_loss(hk.without_apply_rng(transformed), mean_squared, rng=jax.random.key(0))
    with pytest.raises(fastvi.DataError, match="state is given"):
        haiku_loss(transformed, mean_squared, state={})
    with pytest.raises(fastvi.DataError, match="transformed must be"):
        haiku_loss(function, mean_squared)


def test_haiku_with_state():
    hk = pytest.importorskip("haiku")
    from fastvi.integrations.haiku import haiku_loss

    def function(x):
        return hk.get_state("shift", (), init=jnp.zeros) + hk.Linear(1)(x)

    transformed = hk.transform_with_state(function)
    params, state = transformed.init(jax.random.key(0), X)
    loss_fn = haiku_loss(transformed, mean_squared, state={"~": {"shift": jnp.asarray(2.0)}})
    layer = params["linear"]
    assert state["~"]["shift"] == 0
    keyless = haiku_loss(
        hk.without_apply_rng(transformed), mean_squared, state={"~": {"shift": jnp.asarray(2.0)}}
    )
    assert keyless(params, (X, Y)) == loss_fn(params, (X, Y))
    assert loss_fn(params, (X, Y)) == pytest.approx(
        float(mean_squared(2 + X @ layer["w"] + layer["b"], Y)), rel=1e-5
    )


def test_flax_linen():
    nn = pytest.importorskip("flax.linen")
    from fastvi.integrations.flax_linen import linen_loss

    class Network(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            hidden = jnp.tanh(nn.Dense(WIDTH)(inputs))
            return nn.Dense(1)(hidden)

    first, second = {"kernel": W1, "bias": B1}, {"kernel": W2, "bias": B2}
    variables = {"params": {"Dense_0": first, "Dense_1": second}, "batch_stats": {}}
    assert_same(*linen_loss(Network(), variables, mean_squared), ("b1", "w1", "b2", "w2"))
    with pytest.raises(fastvi.DataError, match="collection"):
        linen_loss(Network(), {"batch_stats": {}}, mean_squared)


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")
    from fastvi.integrations.flax_nnx import nnx_loss

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = (
                nnx.Linear(2, WIDTH, rngs=rngs),
                nnx.Linear(WIDTH, 1, rngs=rngs),
            )

        def __call__(self, inputs):
            return self.second(jnp.tanh(self.first(inputs)))

    model = Network(nnx.Rngs(0))
    for layer, kernel, bias in ((model.first, W1, B1), (model.second, W2, B2)):
        layer.kernel, layer.bias = nnx.Param(jnp.asarray(kernel)), nnx.Param(jnp.asarray(bias))
    assert_same(*nnx_loss(model, mean_squared), ("b1", "w1", "b2", "w2"))


def layer_arrays(model):
    first, second = model.layers
    return first.weight, first.bias, second.weight, second.bias


def test_equinox():
    from fastvi.integrations.equinox import equinox_loss

    model = eqx.nn.MLP(2, 1, WIDTH, 1, activation=jnp.tanh, key=jax.random.key(0))
    model = eqx.tree_at(layer_arrays, model, tuple(map(jnp.asarray, (W1.T, B1, W2.T, B2))))
    assert_same(*equinox_loss(model, mean_squared), ("w1", "b1", "w2", "b2"), transposed=True)


def test_numpyro():
    numpyro = pytest.importorskip("numpyro")
    from numpyro import distributions as dist

    from fastvi.integrations.numpyro import numpyro_loss

    def model(inputs, targets):
        weights = {
            name: numpyro.sample(name, dist.Normal(0, 2).expand(leaf.shape).to_event())
            for name, leaf in LEAVES.items()
        }
        scale = numpyro.sample("scale", dist.LogNormal(0, 1))
        with numpyro.plate("examples", inputs.shape[0]):
            numpyro.sample(
                "y", dist.Normal(network(weights, inputs)[:, 0], scale), obs=targets[:, 0]
            )

    loss_fn, params = numpyro_loss(model, {**LEAVES, "scale": 0.5}, (X, Y))

    def raw(params, batch):
        """-log likelihood per example, and 1/n of -log prior, with log scale as the coordinate."""
        b1, b2, log_scale, w1, w2 = params
        error = network({"b1": b1, "b2": b2, "w1": w1, "w2": w2}, batch[0]) - batch[1]
        gaussian = (
            0.5 * jnp.mean(error**2) / jnp.exp(2 * log_scale)
            + log_scale
            + 0.5 * jnp.log(2 * jnp.pi)
        )
        squares = sum(jnp.sum(leaf**2) for leaf in (b1, b2, w1, w2))
        size = 4 * WIDTH + 1
        constants = size * jnp.log(2.0) + 0.5 * (size + 1) * jnp.log(2 * jnp.pi)
        return gaussian + (squares / 8 + log_scale**2 / 2 + constants) / COUNT

    raw_params = [B1, B2, jnp.log(0.5), W1, W2]
    assert float(params["scale"]) == pytest.approx(np.log(0.5), rel=1e-6)
    assert_same_loss(loss_fn, params, raw, raw_params, (X[:60], Y[:60]))
    # the loss is the same to rounding, so that one estimate says all
    result = estimate(loss_fn, params)
    assert np.isfinite(result.llc)
    assert result.init_loss == pytest.approx(float(raw(raw_params, (X, Y))), rel=1e-5)


@pytest.mark.parametrize(
    ("module", "function", "package", "arguments"),
    [
        ("haiku", "haiku_loss", "haiku", (None, None)),
        ("flax_linen", "linen_loss", "flax", (None, {}, None)),
        ("flax_linen", "train_state_loss", "flax", (None, None)),
        ("flax_nnx", "nnx_loss", "flax", (None, None)),
        ("numpyro", "numpyro_loss", "numpyro", (None, {}, ())),
        ("torch", "torch_loss", "torch", (None, None)),
    ],
)
def test_absent_packages_are_named(monkeypatch, module, function, package, arguments):
    """Each adapter imports without its package, and says what to install when it is used."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    adapter = __import__(f"fastvi.integrations.{module}", fromlist=[function])
    with pytest.raises(MissingExtraError, match=r"pip install .fastvi\["):
        getattr(adapter, function)(*arguments)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_of_outputs_may_return_each_example_s(weighted):
    """The loss at w* is the weighted mean over the examples, written out in NumPy."""
    from fastvi.integrations.equinox import equinox_loss

    weights = np.where(np.arange(COUNT) % 3, 1.0, 0.0).astype(np.float32) if weighted else None
    data = (X, Y if weights is None else np.stack([Y[:, 0], weights], axis=1))

    def loss(outputs, targets):
        losses = 0.5 * (outputs[:, 0] - targets[:, 0]) ** 2
        return (losses, targets[:, 1]) if weighted else losses

    params = {name: jnp.asarray(leaf) for name, leaf in LEAVES.items()}
    model = Perceptron(params)
    loss_fn, part = equinox_loss(model, loss, batched=True)
    result = fastvi.estimate_llc(loss_fn, part, data, key=3, **OPTIONS, curvature_rank=0)
    each = 0.5 * (np.asarray(network(LEAVES, X))[:, 0] - Y[:, 0]) ** 2
    np.testing.assert_allclose(result.init_loss, np.average(each, weights=weights), rtol=1e-5)


class Perceptron(eqx.Module):
    weights: dict

    def __call__(self, inputs):
        return network(self.weights, inputs)
