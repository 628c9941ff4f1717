"""Losses and modules that not every batch suits, and precisions that differ, beside torch alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is large; `make test-torch` installs it")

from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

from fastvi.integrations.torch import torch_loss  # noqa: E402

F = torch.nn.functional
nn = torch.nn
distributions = torch.distributions
rng = np.random.default_rng(8)
X = rng.normal(size=(10, 3)).astype(np.float32)
CLASSES = rng.integers(0, 2, 10)
BINARY = CLASSES.astype(np.float32)
LENGTHS = np.array([4, 2, 4, 1, 3, 4, 4, 2, 1, 3])


def column():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))


def bernoulli(outputs, targets):
    return -distributions.Bernoulli(logits=outputs).log_prob(targets)


def cross_entropy_of_shares(outputs, targets):
    return F.binary_cross_entropy(outputs.sigmoid(), targets)


def poisson(outputs, targets):
    return -distributions.Poisson(outputs.exp()).log_prob(targets).mean()


def gamma(outputs, targets):
    return -distributions.Gamma(outputs.exp(), outputs.exp()).log_prob(targets + 0.5).mean()


def scaled(outputs, targets):
    """A normal density whose spread is in the data: zeros are refused."""
    return -distributions.Normal(outputs, targets).log_prob(torch.ones_like(targets)).mean()


class Table(nn.Module):
    """Categories in the first of columns of floating-point numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.out = nn.Embedding(3, 2), nn.Linear(4, 2)

    def forward(self, rows):
        return self.out(torch.cat([rows[:, 1:], self.embed(rows[:, 0].long())], 1))


class Packed(nn.Module):
    """Sequences of several lengths, padded to the longest of the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.cells, self.out = nn.GRU(1, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x, lengths, labels):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.cells(packed)[0], batch_first=True)
        losses = F.cross_entropy(self.out(states).transpose(1, 2), labels, reduction="none")
        return losses, torch.arange(labels.shape[1]) < lengths[:, None]


def assert_as_torch(module, batch, *, loss=None, batch_loss=None, traced=True, tolerance=1e-6):
    """Compare the sum of losses, times weights, and its gradient with torch's own."""
    loss_fn, params = torch_loss(module, loss, batch_loss=batch_loss)

    def total(params, batch):
        value = loss_fn(params, batch)
        return (value[0] * value[1]).sum() if isinstance(value, tuple) else value.sum()

    function = jax.value_and_grad(total)
    found = (jax.jit(function) if traced else function)(params, batch)
    tensors = jax.tree_util.tree_map(lambda one: torch.from_numpy(np.asarray(one)), batch)
    value = batch_loss(module, tensors) if loss is None else loss(module(tensors[0]), tensors[1])
    value = (value[0] * value[1]).sum() if isinstance(value, tuple) else value.sum()
    wanted = torch.autograd.grad(value, list(module.parameters()))
    np.testing.assert_allclose(found[0], value.item(), rtol=tolerance)
    assert found[0].dtype == np.float32
    for (name, _), slope in zip(module.named_parameters(), wanted, strict=True):
        np.testing.assert_allclose(found[1][name], slope, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("loss", [bernoulli, cross_entropy_of_shares, poisson, gamma])
def test_losses_that_refuse_noise_are_taken(loss, traced):
    assert_as_torch(column(), (X, BINARY), loss=loss, traced=traced)


@pytest.mark.parametrize("traced", [False, True])
def test_losses_that_refuse_zeros_and_categories_among_columns_are_taken(traced):
    assert_as_torch(column(), (X, BINARY + 0.5), loss=scaled, traced=traced)
    rows = np.c_[np.arange(10) % 3, X[:, 1:]].astype(np.float32)
    assert_as_torch(Table(), (rows, CLASSES), loss=F.cross_entropy, traced=traced)


@pytest.mark.parametrize("traced", [False, True])
def test_packed_sequences_are_taken(traced):
    x = rng.normal(size=(10, 4, 1)).astype(np.float32)
    batch = {"x": x, "lengths": LENGTHS, "labels": rng.integers(0, 2, (10, 4))}
    step = lambda model, batch: model(**batch)  # noqa: E731
    assert_as_torch(Packed(), batch, batch_loss=step, traced=traced, tolerance=4e-6)


def needs_rows(outputs, targets):
    if not torch.all(targets > 6):
        raise ValueError("targets are above 6")
    return torch.mean((outputs - targets) ** 2)


def test_a_loss_that_takes_real_examples_alone_is_taken_after_a_call_on_them():
    loss_fn, params = torch_loss(column(), needs_rows)
    batch = (X, BINARY + 7)
    with pytest.raises(ValueError, match="targets are above 6") as raised:
        jax.eval_shape(loss_fn, params, batch)
    assert any("loss_fn(params, batch) once" in note for note in raised.value.__notes__)
    value = loss_fn(params, (X[:1], batch[1][:1]))
    assert jax.eval_shape(loss_fn, params, batch).shape == value.shape == ()


@pytest.mark.parametrize("form", ["mean", "each"])
def test_losses_in_double_precision_are_cast(form):
    def loss(outputs, targets):
        squares = (outputs.double() - targets.double()) ** 2
        return squares.mean() if form == "mean" else squares

    assert_as_torch(column(), (X, BINARY), loss=loss)
    loss_fn, params = torch_loss(column(), loss)
    product = jax.jvp(jax.grad(lambda at: jnp.sum(loss_fn(at, (X, BINARY)))), (params,), (params,))[
        1
    ]
    single, _ = torch_loss(column(), lambda outputs, targets: loss(outputs, targets).float())
    wanted = jax.jvp(jax.grad(lambda at: jnp.sum(single(at, (X, BINARY)))), (params,), (params,))[1]
    for name, one in wanted.items():
        np.testing.assert_allclose(product[name], one, rtol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_a_module_in_half_precision_takes_data_in_single(half, loss):
    """Inputs are rounded, as the module is; outputs, targets and the loss are in single."""
    module = column().to(half)
    loss_fn, params = torch_loss(module, loss)
    value, slopes = jax.jit(jax.value_and_grad(loss_fn))(params, (X, BINARY + 1e-3))
    outputs = module(torch.from_numpy(X).to(half)).float()
    wanted = loss(outputs, torch.from_numpy(BINARY + np.float32(1e-3)))
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-6)
    assert value.dtype == np.float32
    gradients = torch.autograd.grad(wanted, list(module.parameters()))
    for (name, _), one in zip(module.named_parameters(), gradients, strict=True):
        np.testing.assert_array_equal(np.asarray(slopes[name], np.float32), one.float())


def test_data_in_half_precision_reach_a_module_in_single():
    narrow = (X.astype(np.float16), BINARY.astype(np.float16))
    found = []
    for batch in (narrow, tuple(one.astype(np.float32) for one in narrow)):
        loss_fn, params = torch_loss(column(), F.mse_loss)
        found.append(jax.value_and_grad(loss_fn)(params, batch))
    for one, other in zip(*map(jax.tree_util.tree_leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_step_of_a_module_in_half_precision_is_told_to_cast():
    loss_fn, params = torch_loss(
        column().bfloat16(), batch_loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1])
    )
    with pytest.raises(RuntimeError, match="same dtype") as raised:
        loss_fn(params, (X, BINARY))
    assert any("torch.bfloat16" in note and ".to(" in note for note in raised.value.__notes__)
