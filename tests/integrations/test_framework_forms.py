"""Models in the forms that people train them in: the loss and its gradient are those of the same
network written by hand, and what is no function of the parameters is refused by name."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import enable_x64, quick_jit

import fastvi
from fastvi.integrations.equinox import equinox_loss

COUNT, WIDTH, EPS = 24, 3, 1e-5
rng = np.random.default_rng(5)
X, Y = (rng.normal(size=(COUNT, columns)).astype(np.float32) for columns in (2, 1))
# A network with batch statistics: "mean" and "var" are none of its parameters.
SHAPES = {"w1": (2, WIDTH), "b1": WIDTH, "scale": WIDTH, "shift": WIDTH, "w2": (WIDTH, 1), "b2": 1}
LEAVES = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
MEAN, VAR = rng.normal(size=WIDTH).astype(np.float32), rng.uniform(1, 2, WIDTH).astype(np.float32)


def mean_squared(outputs, targets):
    return 0.5 * jnp.mean((outputs - targets) ** 2)


def by_hand(weights, batch):
    hidden = jnp.tanh(batch[0] @ weights["w1"] + weights["b1"])
    hidden = (hidden - MEAN) / jnp.sqrt(VAR + EPS) * weights["scale"] + weights["shift"]
    return mean_squared(hidden @ weights["w2"] + weights["b2"], batch[1])


def in_double(tree):
    return jax.tree_util.tree_map(lambda leaf: jnp.asarray(leaf, float), tree)


def value_and_leaves(loss_fn, params, batch):
    value, gradient = quick_jit(jax.value_and_grad(loss_fn))(in_double(params), in_double(batch))
    return float(value), jax.tree_util.tree_leaves(gradient)


@functools.cache
def expected():
    with enable_x64(True):
        value, gradient = quick_jit(jax.value_and_grad(by_hand))(
            in_double(LEAVES), in_double((X, Y))
        )
    return float(value), {name: np.asarray(leaf) for name, leaf in gradient.items()}


def assert_by_hand(loss_fn, params, order, transposed=False):
    """The leaves of the parameters, in their order, are those of the network of these names."""
    with enable_x64(True):
        value, gradient = value_and_leaves(loss_fn, params, (X, Y))
    wanted, by_name = expected()
    assert value == pytest.approx(wanted, rel=1e-6)
    for leaf, name in zip(gradient, order, strict=True):
        leaf = np.asarray(leaf).T if transposed else np.reshape(leaf, by_name[name].shape)
        # statistics of a module stay in float32, as they are in training
        np.testing.assert_allclose(leaf, by_name[name], rtol=2e-5, atol=1e-6)


def refused(words, function, *arguments, **options):
    with pytest.raises((fastvi.DataError, fastvi.ConfigError), match=re.escape(words)) as caught:
        function(*arguments, **options)
    return str(caught.value)


# haiku


def haiku_network(is_training_of_dropout=False):
    hk = pytest.importorskip("haiku")

    def function(x, is_training=True):
        hidden = hk.BatchNorm(True, True, 0.9)(jnp.tanh(hk.Linear(WIDTH)(x)), is_training)
        if is_training_of_dropout and is_training:
            hidden = hk.dropout(hk.next_rng_key(), 0.5, hidden)
        return hk.Linear(1)(hidden)

    params = {
        "batch_norm": {"offset": LEAVES["shift"][None], "scale": LEAVES["scale"][None]},
        "linear": {"b": LEAVES["b1"], "w": LEAVES["w1"]},
        "linear_1": {"b": LEAVES["b2"], "w": LEAVES["w2"]},
    }
    averages = {"mean_ema": MEAN[None], "var_ema": VAR[None]}
    state = {
        f"batch_norm/~/{name}": {"average": value, "counter": np.int32(1), "hidden": value}
        for name, value in averages.items()
    }
    return hk.transform_with_state(function), params, state


HAIKU_ORDER = ("shift", "scale", "b1", "w1", "b2", "w2")


def test_haiku_with_the_options_of_evaluation():
    hk = pytest.importorskip("haiku")
    from fastvi.integrations.haiku import haiku_loss

    transformed, params, state = haiku_network()
    for form in (transformed, hk.without_apply_rng(transformed)):
        loss_fn = haiku_loss(form, mean_squared, state=state, is_training=False)
        assert_by_hand(loss_fn, params, HAIKU_ORDER)


@pytest.mark.parametrize("drops", [False, True])
def test_haiku_in_training_is_refused(drops):
    pytest.importorskip("haiku")
    from fastvi.integrations.haiku import haiku_loss

    transformed, params, state = haiku_network(drops)
    loss_fn = haiku_loss(transformed, mean_squared, state=state)
    text = refused("haiku_loss(..., is_training=False)", loss_fn, params, (X, Y))
    assert ("random key" if drops else "['batch_norm/~/mean_ema']['average']") in text
    refused("haiku_loss(..., state=state)", haiku_loss, transformed, mean_squared)


def test_a_haiku_function_of_many_is_named_by_the_error_of_all():
    hk = pytest.importorskip("haiku")
    from fastvi.integrations.haiku import haiku_loss

    def both():
        linear = hk.Linear(1)
        return linear, (linear, lambda x: -linear(x))

    many = hk.multi_transform(both)
    refused("hk.Transformed(init, one of its applies)", haiku_loss, many, mean_squared)
    params = {"linear": {"w": LEAVES["w1"][:, :1], "b": LEAVES["b2"]}}
    value = haiku_loss(hk.Transformed(many.init, many.apply[1]), mean_squared)(params, (X, Y))
    outputs = -(X @ LEAVES["w1"][:, :1] + LEAVES["b2"])
    assert float(value) == pytest.approx(0.5 * np.mean((outputs - Y) ** 2), rel=1e-5)


def test_haiku_that_drops_by_a_fixed_key_is_no_mean_over_examples():
    hk = pytest.importorskip("haiku")
    from fastvi.integrations.haiku import haiku_loss

    drops = hk.transform(lambda x: hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(1)(x)))
    params = {"linear": {"w": LEAVES["w1"][:, :1], "b": LEAVES["b2"]}}
    loss_fn = haiku_loss(drops, mean_squared, rng=jax.random.key(0))
    refused("dropout", fastvi.estimate_llc, loss_fn, params, (X, Y), progress=False)


# flax linen


def linen_network():
    nn = pytest.importorskip("flax.linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=True):
            x = nn.BatchNorm(use_running_average=not train)(jnp.tanh(nn.Dense(WIDTH)(x)))
            return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(x))

    variables = {
        "params": {
            "BatchNorm_0": {"bias": LEAVES["shift"], "scale": LEAVES["scale"]},
            "Dense_0": {"bias": LEAVES["b1"], "kernel": LEAVES["w1"]},
            "Dense_1": {"bias": LEAVES["b2"], "kernel": LEAVES["w2"]},
        },
        "batch_stats": {"BatchNorm_0": {"mean": MEAN, "var": VAR}},
    }
    return Network(), variables


def train_states(module, variables):
    from flax.training.train_state import TrainState

    class WithStatistics(TrainState):
        batch_stats: dict
        dropout_key: jax.Array

    made = {"apply_fn": module.apply, "tx": optax.adam(1e-3)}
    beside = {"batch_stats": variables["batch_stats"], "dropout_key": jax.random.key(0)}
    return (
        WithStatistics.create(params=variables["params"], **made, **beside),
        TrainState.create(params=variables, **made),
    )


def test_linen_variables_and_train_states():
    core = pytest.importorskip("flax.core")
    from fastvi.integrations.flax_linen import linen_loss, train_state_loss

    module, variables = linen_network()
    states = train_states(module, variables)
    made = [
        linen_loss(module, given, mean_squared, train=False)
        for given in (variables, core.freeze(variables), *states)
    ]
    made += [train_state_loss(state, mean_squared, train=False) for state in states]
    first = made[0][0](variables["params"], (X, Y))
    for loss_fn, params in made[1:]:
        assert len(jax.tree_util.tree_leaves(params)) == len(HAIKU_ORDER)
        assert loss_fn(params, (X, Y)) == first
    assert_by_hand(*made[0], HAIKU_ORDER)
    refused("linen_loss", train_state_loss, variables, mean_squared)


def test_linen_bare_params_and_tied_weights():
    """With an embedding E that reads and writes, the loss is a function of E E' alone."""
    nn = pytest.importorskip("flax.linen")
    from fastvi.integrations.flax_linen import linen_loss

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(5, 3)
            return embed.attend(embed(tokens))

    table = rng.normal(size=(5, 3))
    loss_fn, params = linen_loss(Tied(), {"Embed_0": {"embedding": table}}, mean_squared)
    assert_tied(loss_fn, params, table)
    with pytest.raises(fastvi.DataError, match="do not fit the module"):
        linen_loss(Tied(), {"embedding": table}, mean_squared)[0]({"embedding": table}, TOKENS)


TOKENS = np.array([0, 3, 3, 1]), rng.normal(size=(4, 5))


def assert_tied(loss_fn, params, table):
    """One table counts once; its gradient by hand is the sum of what both its places have."""
    with enable_x64(True):
        tokens, targets = TOKENS
        value, gradients = quick_jit(jax.value_and_grad(loss_fn))(
            in_double(params), (tokens, jnp.asarray(targets, float))
        )
        (gradient,) = jax.tree_util.tree_leaves(gradients)
    error = (table[tokens] @ table.T - targets) / targets.size
    of_outputs, of_inputs = error.T @ table[tokens], np.zeros_like(table)
    np.add.at(of_inputs, tokens, error @ table)
    assert float(value) == pytest.approx(0.5 * np.sum(error**2) * targets.size, rel=1e-6)
    np.testing.assert_allclose(gradient, of_inputs + of_outputs, rtol=1e-5, atol=1e-7)


def test_linen_in_training_is_refused():
    nn = pytest.importorskip("flax.linen")
    from fastvi.integrations.flax_linen import linen_loss

    module, variables = linen_network()
    params = variables["params"]
    loss_fn, _ = linen_loss(module, variables, mean_squared)
    text = refused("linen_loss(..., train=False)", loss_fn, params, (X, Y))
    assert 'updates its statistics (Cannot update variable "mean" in "/BatchNorm_0"' in text
    bare, _ = linen_loss(module, {"params": params}, mean_squared, train=False)
    refused('collection "batch_stats" in "/BatchNorm_0"', bare, params, (X, Y))
    for options in ({"rngs": {"dropout": jax.random.key(0)}}, {"mutable": ["batch_stats"]}):
        refused("train=False", linen_loss, module, variables, mean_squared, **options)

    class StochasticDepth(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=False):
            keeps = deterministic or jax.random.bernoulli(self.make_rng("depth"))
            return nn.Dense(1)(x) * keeps

    deep = {"params": {"Dense_0": {"kernel": LEAVES["w1"][:, :1], "bias": LEAVES["b2"]}}}
    loss_fn, params = linen_loss(StochasticDepth(), deep, mean_squared)
    refused("Pass deterministic=True", loss_fn, params, (X, Y))
    steady = linen_loss(StochasticDepth(), deep, mean_squared, deterministic=True)[0]
    outputs = X @ LEAVES["w1"][:, :1] + LEAVES["b2"]
    assert float(steady(params, (X, Y))) == pytest.approx(
        0.5 * np.mean((outputs - Y) ** 2), rel=1e-5
    )


def test_linen_outputs_with_what_layers_sow():
    """`mutable` of a collection that holds no state is honoured: apply returns it too."""
    nn = pytest.importorskip("flax.linen")
    from fastvi.integrations.flax_linen import linen_loss

    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x):
            outputs = nn.Dense(1)(x)
            self.sow("losses", "size", jnp.mean(outputs**2))
            return outputs

    def loss(outputs, targets):
        outputs, sown = outputs
        return mean_squared(outputs, targets) + sown["losses"]["size"][0]

    params = {"Dense_0": {"kernel": LEAVES["w1"][:, :1], "bias": LEAVES["b2"]}}
    loss_fn, _ = linen_loss(Sows(), {"params": params}, loss, mutable=["losses"])
    outputs = X @ LEAVES["w1"][:, :1] + LEAVES["b2"]
    wanted = 0.5 * np.mean((outputs - Y) ** 2) + np.mean(outputs**2)
    assert float(loss_fn(params, (X, Y))) == pytest.approx(wanted, rel=1e-5)


# flax nnx


def nnx_network():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(2, WIDTH, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.second = nnx.Linear(WIDTH, 1, rngs=rngs)

        def __call__(self, x):
            return self.second(self.drop(self.norm(jnp.tanh(self.first(x)))))

    model = Network(nnx.Rngs(0))
    places = {
        "w1": (model.first, "kernel"),
        "b1": (model.first, "bias"),
        "scale": (model.norm, "scale"),
        "shift": (model.norm, "bias"),
        "w2": (model.second, "kernel"),
        "b2": (model.second, "bias"),
    }
    for name, (layer, attribute) in places.items():
        setattr(layer, attribute, nnx.Param(jnp.asarray(LEAVES[name])))
    model.norm.mean = nnx.BatchStat(jnp.asarray(MEAN))
    model.norm.var = nnx.BatchStat(jnp.asarray(VAR))
    return model


def test_nnx_in_evaluation_and_in_training():
    nnx = pytest.importorskip("flax.nnx")
    from fastvi.integrations.flax_nnx import nnx_loss

    model = nnx_network()
    loss_fn, params = nnx_loss(model, mean_squared)
    for traced in (loss_fn, jax.jit(loss_fn)):
        text = refused("model.eval()", traced, params, (X, Y))
        assert "['drop']['rngs']['count'], ['norm']['mean'], ['norm']['var']" in text
    model.eval()
    assert_by_hand(*nnx_loss(model, mean_squared), ("b1", "w1", "shift", "scale", "b2", "w2"))
    first = nnx.All(nnx.Param, nnx.PathContains("first"))
    loss_fn, params = nnx_loss(model, mean_squared, wrt=first)
    assert_by_hand(loss_fn, params, ("b1", "w1"))


def test_nnx_optimizers_and_states_are_no_models():
    nnx = pytest.importorskip("flax.nnx")
    from fastvi.integrations.flax_nnx import nnx_loss

    model = nnx_network()
    holds = nnx.ModelAndOptimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    refused("Pass optimizer.model.", nnx_loss, holds, mean_squared)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    refused("Pass the model that it updates.", nnx_loss, optimizer, mean_squared)
    refused("nnx.merge(graph, state)", nnx_loss, nnx.split(model), mean_squared)


def test_nnx_tied_weights():
    nnx = pytest.importorskip("flax.nnx")
    from fastvi.integrations.flax_nnx import nnx_loss

    class Tied(nnx.Module):
        def __init__(self, table):
            self.reads = nnx.Param(jnp.asarray(table))
            self.writes = self.reads

        def __call__(self, tokens):
            return self.reads[...][tokens] @ self.writes[...].T

    table = rng.normal(size=(5, 3))
    assert_tied(*nnx_loss(Tied(table), mean_squared), table)


# equinox


class Normed(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    second: eqx.nn.Linear

    def __init__(self, key):
        self.first = eqx.nn.Linear(2, WIDTH, key=key)
        self.norm = eqx.nn.BatchNorm(WIDTH, axis_name="batch", mode="ema")
        self.drop = eqx.nn.Dropout(0.5)
        self.second = eqx.nn.Linear(WIDTH, 1, key=key)

    def __call__(self, x, state):
        hidden, state = self.norm(jnp.tanh(self.first(x)), state)
        return self.second(self.drop(hidden)), state


def equinox_network():
    model, state = eqx.nn.make_with_state(Normed)(jax.random.key(0))

    def leaves(model):
        first, norm, second = model.first, model.norm, model.second
        return first.weight, first.bias, norm.weight, norm.bias, second.weight, second.bias

    names = "w1", "b1", "scale", "shift", "w2", "b2"
    model = eqx.tree_at(leaves, model, tuple(jnp.asarray(LEAVES[name].T) for name in names))
    state = state.set(model.norm.ema_first_time_index, jnp.asarray(False))
    return model, state.set(model.norm.ema_state_index, (jnp.asarray(MEAN), jnp.asarray(VAR)))


def test_equinox_with_a_state():
    model, state = equinox_network()
    refused("Pass eqx.nn.inference_mode(model).", equinox_loss, model, mean_squared, state=state)
    model = eqx.nn.inference_mode(model)
    names = ("w1", "b1", "scale", "shift", "w2", "b2")
    loss_fn, params = equinox_loss(model, mean_squared, state=state)
    assert_by_hand(loss_fn, params, names, transposed=True)
    whole = Batched(model)
    loss_fn, params = equinox_loss(whole, mean_squared, state=state, batched=True)
    assert_by_hand(loss_fn, params, names, transposed=True)
    refused("equinox_loss(model, loss, state=state)", equinox_loss, model, mean_squared)
    refused("must be an eqx.nn.State", equinox_loss, model, mean_squared, state={})


class Batched(eqx.Module):
    one: Normed

    def __call__(self, inputs, state):
        outputs = jax.vmap(lambda x: self.one(x, state)[0])(inputs)
        # a layer may replace what it has read, also where nobody looks at it again
        return outputs, state.set(self.one.norm.ema_first_time_index, jnp.asarray(True))


def test_equinox_dropout_of_nothing_is_no_noise():
    attention = eqx.nn.MultiheadAttention(1, 2, key=jax.random.key(0))
    assert not attention.dropout.inference
    equinox_loss(attention, mean_squared)
    noisy = eqx.nn.MultiheadAttention(1, 2, dropout_p=0.1, key=jax.random.key(0))
    assert "Dropout" in refused("inference_mode", equinox_loss, noisy, mean_squared)
    refused("(model, opt_state)", equinox_loss, (attention, ()), mean_squared)


class SharedTable(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, table):
        reads = eqx.nn.Embedding(weight=jnp.asarray(table))
        writes = eqx.nn.Linear(3, 5, use_bias=False, key=jax.random.key(0))
        self.shared = eqx.nn.Shared(
            (reads, writes), where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight
        )

    def __call__(self, token):
        reads, writes = self.shared()
        return writes(reads(token))


def test_equinox_shared_weights():
    table = rng.normal(size=(5, 3))
    assert_tied(*equinox_loss(SharedTable(table), mean_squared), table)


# what training keeps beside the parameters


class OwnState(eqx.Module):
    params: dict
    opt_state: tuple


def of_training():
    params = {"w": jnp.ones(3)}
    opt_state = optax.adamw(1e-3).init(params)
    _, state = eqx.nn.make_with_state(Normed)(jax.random.key(0))
    return {
        "pair": ((params, opt_state), "params[1][0] is an optimiser's state, ScaleByAdamState"),
        "trace": ((params, optax.sgd(0.1, 0.9).init(params)), "optimiser's state, TraceState"),
        "own": (OwnState(params, opt_state), "a train state, OwnState. Pass its parameters alone"),
        "dict": ({"params": params, "opt_state": {}, "step": 3}, 'state["params"]'),
        "variables": ({"params": params, "batch_stats": params}, 'Pass variables["params"]'),
        "layers": ((params, state), "params[1] is the state of an equinox model"),
    }


@pytest.mark.parametrize("name", list(of_training()))
def test_states_of_training_are_no_parameters(name):
    params, words = of_training()[name]
    data = (np.ones((8, 3), np.float32),)
    refused(words, fastvi.estimate_llc, lambda w, batch: jnp.sum(batch[0]), params, data)


def test_a_flax_train_state_is_no_parameters():
    pytest.importorskip("flax.training.train_state")
    module, variables = linen_network()
    state = train_states(module, variables)[0]
    refused("a train state, WithStatistics", fastvi.ravel_loss, lambda w, batch: 0.0, state)


def test_a_whole_nnx_model_or_its_optimizer_is_no_parameters():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx_network()
    refused("params.norm.mean is a batch statistic", fastvi.ravel_loss, len, model)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    refused("a train state, Optimizer", fastvi.ravel_loss, len, optimizer)


def test_a_mask_by_name_lets_no_moments_vary():
    params = {"w": jnp.ones(3)}
    own = OwnState(params, optax.adam(1e-3).init(params))
    refused(
        "params.opt_state[0].mu['w'] vary", fastvi.restrict, len, own, lambda path: "'w'" in path
    )
    _, free = fastvi.restrict(len, own, lambda path: path == ".params['w']")
    assert [leaf.shape for leaf in free] == [(3,)]


# numpyro


def numpyro_regression():
    numpyro = pytest.importorskip("numpyro")
    from numpyro import distributions as dist

    def model(inputs, targets):
        noise = numpyro.param("noise", 0.5, constraint=dist.constraints.positive)
        weights = numpyro.sample("weights", dist.Normal(0, 2).expand([2]).to_event(1))
        outputs = numpyro.deterministic("outputs", inputs @ weights)
        with numpyro.plate("data", inputs.shape[0]):
            numpyro.sample("targets", dist.Normal(outputs, noise), obs=targets)

    return model


def gaussian(weights, noise, batch):
    """The negative log likelihood of each example, and 1/n of that of the prior N(0, 4)."""
    inputs, targets = batch
    error = (inputs @ weights - targets) / noise
    likelihood = 0.5 * jnp.mean(error**2) + jnp.log(noise) + 0.5 * jnp.log(2 * jnp.pi)
    prior = jnp.sum(weights**2) / 8 + 2 * jnp.log(2.0) + jnp.log(2 * jnp.pi)
    return likelihood + prior / COUNT


REGRESSION = X, Y[:, 0]
WEIGHTS = np.array([0.3, -1.2], np.float32)


def test_numpyro_param_sites_stay_or_vary():
    model = numpyro_regression()
    handlers = pytest.importorskip("numpyro.handlers")
    from fastvi.integrations.numpyro import numpyro_loss

    loss_fn, params = numpyro_loss(model, {"weights": WEIGHTS}, REGRESSION)
    assert_regression(loss_fn, params, lambda w, batch: gaussian(w["weights"], 0.5, batch))
    put = handlers.substitute(model, data={"noise": jnp.asarray(0.8)})
    loss_fn, params = numpyro_loss(put, {"weights": WEIGHTS}, REGRESSION)
    assert_regression(loss_fn, params, lambda w, batch: gaussian(w["weights"], 0.8, batch))
    both = {"weights": WEIGHTS, "noise": 0.7}
    loss_fn, params = numpyro_loss(model, both, REGRESSION)
    assert float(params["noise"]) == pytest.approx(np.log(0.7), rel=1e-6)
    assert_regression(
        loss_fn, params, lambda w, batch: gaussian(w["weights"], jnp.exp(w["noise"]), batch)
    )


def assert_regression(loss_fn, params, raw):
    batch = (REGRESSION[0][:10], REGRESSION[1][:10])
    with enable_x64(True):
        value, gradient = value_and_leaves(loss_fn, params, batch)
        wanted, raw_gradient = value_and_leaves(raw, params, batch)
    assert value == pytest.approx(wanted, rel=1e-6)
    for got, leaf in zip(gradient, raw_gradient, strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-7)


def test_numpyro_decentered():
    """Non-centered weights w = 2 z have the prior N(0, 1) on z."""
    model = numpyro_regression()
    handlers = pytest.importorskip("numpyro.handlers")
    from numpyro.infer.reparam import LocScaleReparam

    from fastvi.integrations.numpyro import numpyro_loss

    other = handlers.reparam(model, config={"weights": LocScaleReparam(0)})
    loss_fn, params = numpyro_loss(other, {"weights_decentered": WEIGHTS / 2}, REGRESSION)
    change = 2 * np.log(2) / COUNT  # log |dw/dz|
    assert_regression(
        loss_fn,
        params,
        lambda w, batch: gaussian(2 * w["weights_decentered"], 0.5, batch) - change,
    )


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "it lacks weights"),
        ({"weights": WEIGHTS, "outputs": REGRESSION[1]}, "leave out outputs (deterministic)"),
        ({"weights": WEIGHTS, "targets": REGRESSION[1]}, "leave out targets (observed)"),
        ({"weights": WEIGHTS, "else": 1.0}, "leave out else (no site)"),
    ],
)
def test_numpyro_names_are_those_of_latent_sites(params, words):
    model = numpyro_regression()
    from fastvi.integrations.numpyro import numpyro_loss

    text = refused(words, numpyro_loss, model, params, REGRESSION)
    assert "latent sites ['weights'], and may hold the param sites ['noise']" in text


def numpyro_refusals():
    numpyro = pytest.importorskip("numpyro")
    from numpyro import distributions as dist

    def per_example(inputs, targets):
        with numpyro.plate("data", inputs.shape[0]):
            local = numpyro.sample("local", dist.Normal(0, 1))
            numpyro.sample("targets", dist.Normal(local, 1), obs=targets)

    def subsampled(inputs, targets):
        with numpyro.plate("data", inputs.shape[0], subsample_size=5) as chosen:
            numpyro.sample("targets", dist.Normal(0, 1), obs=targets[chosen])

    def of_all(inputs, targets):
        with numpyro.plate("data", COUNT):
            numpyro.sample("targets", dist.Normal(inputs[:, 0], 1), obs=targets)

    def discrete(inputs, targets):
        kind = numpyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        numpyro.sample("targets", dist.Normal(kind, 1), obs=targets)

    def unobserved(inputs, targets):
        numpyro.sample("weights", dist.Normal(0, 1))

    return {
        "per_example": (per_example, {"local": np.ones(COUNT)}, "one for each example"),
        "subsampled": (subsampled, {}, "Leave out subsample_size"),
        "of_all": (of_all, {}, "on all 24 examples and not on 23"),
        "discrete": (discrete, {"kind": 1}, "'kind' is discrete"),
        "unobserved": (unobserved, {"weights": 1.0}, "observes nothing"),
    }


@pytest.mark.parametrize("name", ["per_example", "subsampled", "of_all", "discrete", "unobserved"])
def test_numpyro_models_without_a_loss_of_batches_are_refused(name):
    model, params, words = numpyro_refusals()[name]
    from fastvi.integrations.numpyro import numpyro_loss

    refused(words, numpyro_loss, model, params, REGRESSION)
    refused("a tuple of the arrays", numpyro_loss, model, params, {"inputs": X})
