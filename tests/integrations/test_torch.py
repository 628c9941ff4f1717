"""A torch module has the losses, gradients and products of the same network in jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64

torch = pytest.importorskip("torch", reason="torch is large; `make test-torch` installs it")

from fastvi.integrations.torch import model as torch_model  # noqa: E402
from fastvi.integrations.torch import torch_loss  # noqa: E402

F = torch.nn.functional
COUNT, INPUTS, WIDTH, CLASSES = 24, 5, 6, 3
FORMS = ("mean", "each", "weighted")
rng = np.random.default_rng(4)
X = rng.normal(size=(COUNT, INPUTS)).astype(np.float32)
Y = rng.integers(0, CLASSES, COUNT)


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(INPUTS, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, CLASSES)
    )


def of_outputs(form):
    """The cross-entropy in torch, in each form that a loss may have."""

    def loss(outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return {"mean": losses.mean(), "each": losses, "weighted": (losses, targets + 1)}[form]

    return loss


def in_jax(form):
    """The same network and loss, written by hand."""

    def loss_fn(params, batch):
        hidden = jnp.tanh(batch[0] @ params["0.weight"].T + params["0.bias"])
        outputs = hidden @ params["2.weight"].T + params["2.bias"]
        every = jax.nn.log_softmax(outputs)
        losses = -jnp.take_along_axis(every, batch[1][:, None], axis=1)[:, 0]
        weights = (batch[1] + 1).astype(losses.dtype)
        return {"mean": losses.mean(), "each": losses, "weighted": (losses, weights)}[form]

    return loss_fn


def reduced(loss_fn):
    """The mean of a batch, weighted where weights come, by a factor that is none of torch's."""

    def loss(params, batch):
        value = loss_fn(params, batch)
        losses, weights = value if isinstance(value, tuple) else (value, 1.0)
        return 0.7 * jnp.mean(weights * losses)

    return loss


def assert_close(got, wanted, tolerance):
    leaves = map(jax.tree_util.tree_leaves, (got, wanted))
    for one, other in zip(*leaves, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def product(loss, params, batch, tangent):
    return jax.jvp(lambda at: jax.grad(loss)(at, batch), (params,), (tangent,))[1]


def waves(params):
    return jax.tree_util.tree_map(
        lambda one: jnp.cos(1 + jnp.arange(one.size)).reshape(one.shape).astype(one.dtype), params
    )


@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_values_gradients_and_products_are_those_of_jax(form, is_double):
    with enable_x64(is_double):
        dtype, tolerance = (np.float64, 1e-12) if is_double else (np.float32, 1e-6)
        loss_fn, params = torch_loss(network(), of_outputs(form))
        params = {name: one.astype(dtype) for name, one in params.items()}
        batch, both = (jnp.asarray(X, dtype), jnp.asarray(Y)), (loss_fn, in_jax(form))
        assert_close(*(one(params, batch) for one in both), tolerance)
        ours, theirs = map(reduced, both)
        for mode in (jax.jit, lambda function: function):
            value_and_grad = [
                mode(jax.value_and_grad(one))(params, batch) for one in (ours, theirs)
            ]
            assert_close(*value_and_grad, tolerance)
        tangent = waves(params)
        found = [jax.jit(lambda p, t, one=one: product(one, p, batch, t)) for one in (ours, theirs)]
        assert_close(*(one(params, tangent) for one in found), 4 * tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_walkers_side_by_side(form, axes):
    loss_fn, params = torch_loss(network(), of_outputs(form))
    batch = (X, Y)
    if axes[0] == 0:
        params = {
            name: one + 0.1 * jnp.arange(4.0).reshape(4, *[1] * one.ndim)
            for name, one in params.items()
        }
    if axes[1] == 0:
        batch = (X.reshape(4, -1, INPUTS), Y.reshape(4, -1))
    found = [
        jax.jit(jax.vmap(jax.value_and_grad(reduced(one)), axes))(params, batch)
        for one in (loss_fn, in_jax(form))
    ]
    assert_close(*found, 1e-6)


@pytest.mark.parametrize("form", ["mean", "each"])
def test_products_of_many_tangents_at_one_point(form):
    """Twice vmapped, as curvature is found; the seeds of the losses are no mean's."""
    loss_fn, params = torch_loss(network(), of_outputs(form))
    shares = jnp.arange(1.0, 1.0 + COUNT) / COUNT if form == "each" else 1.0
    tangents = jax.tree_util.tree_map(lambda one: jnp.stack([one, 2 * one, one**2]), waves(params))
    found = []
    for one in (loss_fn, in_jax(form)):
        push = jax.linearize(
            jax.grad(lambda p, one=one: jnp.sum(shares * one(p, (X, Y)) ** 2)), params
        )[1]
        found.append(jax.jit(jax.vmap(push))(tangents))
    assert_close(*found, 2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_large_batches_go_through_torch_in_parts(form, monkeypatch):
    """A pass holds 7 of the 24 examples; each part weighs what its examples do."""
    loss_fn, params = torch_loss(network(), of_outputs(form))
    whole = loss_fn(params, (X, Y))
    kept = 4 * (INPUTS + WIDTH + CLASSES + 1)  # bytes of an example, and what softmax keeps
    monkeypatch.setattr(torch_model, "PASS_BYTES", 7 * kept)
    loss_fn, _ = torch_loss(network(), of_outputs(form))
    assert_close(loss_fn(params, (X, Y)), whole, 1e-6)
    ours, theirs = reduced(loss_fn), reduced(in_jax(form))
    assert_close(*(jax.grad(one)(params, (X, Y)) for one in (ours, theirs)), 1e-6)
    tangent = waves(params)
    assert_close(*(product(one, params, (X, Y), tangent) for one in (ours, theirs)), 4e-6)


def test_one_callback_gives_a_value_and_its_gradient(monkeypatch):
    """A forward pass and a backward one, also of a loss for each example."""
    calls = []

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, inputs):
            calls.append(len(inputs))
            return self.inner(inputs)

    for form in FORMS:
        loss_fn, params = torch_loss(Counting(), of_outputs(form))
        jax.eval_shape(loss_fn, params, (X, Y))
        calls.clear()
        jax.block_until_ready(jax.jit(jax.value_and_grad(reduced(loss_fn)))(params, (X, Y)))
        assert calls == [COUNT]
