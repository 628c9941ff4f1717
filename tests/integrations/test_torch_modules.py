"""Modules of all kinds: what stays fixed, what is shared, what is refused, whole estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64

import fastvi

torch = pytest.importorskip("torch", reason="torch is large; `make test-torch` installs it")

from fastvi.integrations.torch import torch_loss  # noqa: E402

F = torch.nn.functional
nn = torch.nn
rng = np.random.default_rng(2)
X = rng.normal(size=(30, 4)).astype(np.float32)
Y = np.tanh(X @ rng.normal(size=(4, 4))).astype(np.float32)


def squared(outputs, targets):
    return 0.5 * torch.mean((outputs - targets) ** 2)


class Tied(nn.Module):
    """x A tanh A': one matrix in two places, and a shift that is a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.full((4,), 0.5))
        self.scale = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs)) * self.scale + self.shift)


def tied_in_jax(params, batch):
    matrix = params["first.weight"]
    hidden = 2 * jnp.tanh(batch[0] @ matrix.T) + 0.5
    return 0.5 * jnp.mean((hidden @ matrix.T - batch[1]) ** 2)


@pytest.mark.parametrize("is_double", [False, True])
def test_shared_weights_vary_together_and_the_rest_stays_fixed(is_double):
    with enable_x64(is_double):
        module = Tied()
        loss_fn, params = torch_loss(module, squared)
        assert list(params) == ["first.weight"]
        # what becomes of the module afterwards is another loss
        (
            nn.init.zeros_(module.shift),
            nn.init.zeros_(module.scale),
            nn.init.zeros_(module.first.weight),
        )
        dtype = np.float64 if is_double else np.float32
        params = {name: one.astype(dtype) for name, one in params.items()}
        assert np.any(np.asarray(params["first.weight"]))
        batch = (X.astype(dtype), Y.astype(dtype))
        found = [jax.value_and_grad(one)(params, batch) for one in (loss_fn, tied_in_jax)]
        for got, wanted in zip(*map(jax.tree_util.tree_leaves, found), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12 if is_double else 2e-6, atol=1e-6)


def test_double_precision_reads_buffers_as_they_were_given():
    """0.1 in double precision is no number of single precision, in which the loss ran before."""
    with enable_x64(True):
        module = nn.Linear(4, 4).double()
        module.register_buffer("tenth", torch.tensor(0.1, dtype=torch.float64))
        loss_fn, params = torch_loss(
            module, batch_loss=lambda model, batch: model(batch).square().mean() + model.tenth
        )
        narrow = {name: one.astype(np.float32) for name, one in params.items()}
        assert loss_fn(narrow, X).dtype == np.float32
        outputs = X @ np.asarray(params["weight"]).T + np.asarray(params["bias"])
        wide = loss_fn(params, X.astype(float))
        assert float(wide) == pytest.approx(np.mean(outputs**2) + 0.1, rel=1e-14)


class Attention(nn.Module):
    """One layer of fused attention, for which torch has no second derivative."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.mix = nn.Embedding(7, 4), nn.Linear(4, 12, bias=False)

    def forward(self, ids, labels):
        x = self.embed(ids)
        query, keys, values = self.mix(x)[:, None].chunk(3, dim=-1)
        found = F.scaled_dot_product_attention(query, keys, values, is_causal=True)[:, 0]
        return F.mse_loss(found, F.one_hot(labels, 4).to(found.dtype))


def attention_in_jax(params, batch):
    x = params["embed.weight"][batch["ids"]]
    query, keys, values = jnp.split(x @ params["mix.weight"].T, 3, axis=-1)
    scores = query @ keys.transpose(0, 2, 1) / 2
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((5, 5))), scores, -jnp.inf), axis=-1)
    return jnp.mean((weights @ values - jax.nn.one_hot(batch["labels"], 4)) ** 2)


def test_products_through_fused_attention_on_a_dict_of_integers():
    ids = rng.integers(0, 7, (6, 5)).astype(np.int32)
    batch = {"ids": ids, "labels": ids % 4}
    loss_fn, params = torch_loss(Attention(), batch_loss=lambda model, batch: model(**batch))
    tangent = {name: jnp.cos(one * 9) for name, one in params.items()}
    both = [
        jax.jvp(lambda at, one=one: jax.grad(one)(at, batch), (params,), (tangent,))
        for one in (loss_fn, attention_in_jax)
    ]
    for got, wanted in zip(*map(jax.tree_util.tree_leaves, both), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_half_precision_stays_in_the_module():
    """Its gradient is that of the same module in single precision, but for its rounding."""
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    loss_fn, params = torch_loss(module, squared)
    narrow_fn, narrow = torch_loss(
        module.to(torch.bfloat16),
        batch_loss=lambda model, batch: squared(model(batch[0].bfloat16()).float(), batch[1]),
    )
    assert {one.dtype for one in narrow.values()} == {jnp.dtype("bfloat16")}
    found = jax.value_and_grad(narrow_fn)(narrow, (X, Y))
    wanted = jax.value_and_grad(loss_fn)(params, (X, Y))
    for got, one in zip(*map(jax.tree_util.tree_leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), one, rtol=0.1, atol=0.02)


def test_inputs_that_a_module_changes_in_place_stay_as_they_are():
    class InPlace(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.mul_(2.0))

    loss_fn, params = torch_loss(InPlace(4, 4), squared)
    inputs = jnp.array(X)
    first = loss_fn(params, (inputs, Y))
    np.testing.assert_array_equal(inputs, X)
    assert first == loss_fn(params, (inputs, Y))


def with_layer(layer):
    return nn.Sequential(nn.Linear(4, 4), layer)


def complex_linear():
    module = nn.Linear(4, 4)
    module.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return module


def integer_linear():
    module = nn.Linear(4, 4)
    module.counts = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    return module


def on_two_devices():
    module = nn.Linear(4, 4)
    module.far = nn.Parameter(torch.zeros(2, device="meta"))
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (with_layer(nn.Dropout(0.1)), r"'1', Dropout, is in training mode.*model\.eval\(\)"),
        (with_layer(nn.AlphaDropout(0.1)), "AlphaDropout"),
        (with_layer(nn.BatchNorm1d(4)), "'1', BatchNorm1d"),
        (with_layer(nn.InstanceNorm1d(4, track_running_stats=True)), "InstanceNorm1d"),
        (nn.GRU(4, 4, num_layers=2, dropout=0.5), "GRU"),
        (nn.MultiheadAttention(4, 2, dropout=0.5), "MultiheadAttention"),
        (complex_linear(), "'phase' has dtype torch.complex64"),
        (integer_linear(), "'counts' has dtype torch.int64"),
        (on_two_devices(), "one device.*cpu, meta"),
        (nn.Linear(4, 4).requires_grad_(False), "requires a gradient"),
        (nn.ReLU(), "nothing to vary"),
        (lambda inputs: inputs, "must be a torch.nn.Module; got function"),
    ],
)
def test_modules_that_cannot_vary_are_refused(module, message):
    with pytest.raises(fastvi.DataError, match=message):
        torch_loss(module, squared)


def test_layers_that_do_nothing_in_training_mode_are_not_refused():
    for layer in (nn.Dropout(0.0), nn.InstanceNorm1d(4), nn.LayerNorm(4)):
        torch_loss(with_layer(layer), squared)
    torch_loss(with_layer(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))).eval(), squared)


OTHER = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, targets: squared(outputs, targets).item(), "got float"),
        (lambda outputs, targets: None, "got NoneType"),
        (lambda outputs, targets: squared(outputs, targets).detach(), "no gradient"),
        (torch.no_grad()(squared), "no gradient"),
        (lambda outputs, targets: squared(OTHER(targets), targets), "no gradient"),
        (lambda outputs, targets: squared(outputs, targets).to("meta"), "device meta"),
        (lambda outputs, targets: (outputs > 0).sum(), "dtype torch.int64"),
        (lambda outputs, targets: (outputs - targets).flatten(), "axis first"),
        (lambda outputs, targets: (outputs, targets[:1]), "with weights of"),
        (lambda outputs, targets: (outputs, targets, targets), "Tensor, Tensor, Tensor"),
    ],
)
def test_losses_that_cannot_be_used_are_refused_before_anything_runs(loss, message):
    loss_fn, params = torch_loss(nn.Linear(4, 4), loss)
    with pytest.raises(fastvi.DataError, match=message):
        jax.eval_shape(loss_fn, params, (X, Y))


def test_arguments_are_checked():
    for losses in ({}, {"loss": squared, "batch_loss": squared}):
        with pytest.raises(fastvi.ConfigError, match="one of loss"):
            torch_loss(nn.Linear(4, 4), **losses)
    loss_fn, params = torch_loss(nn.Linear(4, 4), squared)
    with pytest.raises(fastvi.DataError, match="by name"):
        loss_fn({"weight": params["weight"]}, (X, Y))
    with pytest.raises(fastvi.DataError, match=r"params\['bias'\] must have shape"):
        loss_fn({**params, "bias": params["bias"][:1]}, (X, Y))
    with pytest.raises(fastvi.DataError, match="one leading axis"):
        loss_fn(params, (X, Y[:-1]))
    with pytest.raises(fastvi.UnavailableError, match="by its data"):
        jax.grad(lambda inputs: loss_fn(params, (inputs, Y)))(X)


def test_an_error_of_the_module_says_what_it_was_tried_on():
    loss_fn, params = torch_loss(nn.Linear(4, 4), squared)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        jax.eval_shape(loss_fn, params, (X[:, :3], Y))
    assert "torch.float32[2, 3]" in raised.value.__notes__[0]
