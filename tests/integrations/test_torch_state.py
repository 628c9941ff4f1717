"""What a module holds beside its parameters: buffers, activations, memory that outputs share."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi

torch = pytest.importorskip("torch", reason="torch is large; `make test-torch` installs it")

from fastvi.integrations.torch import torch_loss  # noqa: E402

F = torch.nn.functional
nn = torch.nn
rng = np.random.default_rng(6)
X = rng.normal(size=(12, 3)).astype(np.float32)
Y = rng.integers(0, 2, 12)


class Vector(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))


def test_losses_that_are_parameters_are_not_overwritten_by_other_threads():
    size, wrong = 50_000, []
    loss_fn, params = torch_loss(
        Vector(size), batch_loss=lambda model, batch: model.w[: len(batch)]
    )
    program, batch = jax.jit(loss_fn), np.zeros(size, np.float32)
    jax.block_until_ready(program(params, batch))

    def walk(value):
        point = {"w": jnp.full(size, float(value))}
        wrong.extend(value for _ in range(60) if np.any(np.asarray(program(point, batch)) != value))

    threads = [threading.Thread(target=walk, args=(value,)) for value in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def cross_entropy_in_jax(params, batch):
    every = jax.nn.log_softmax(batch[0] @ params["weight"].T + params["bias"])
    return -jnp.mean(jnp.take_along_axis(every, batch[1][:, None], axis=1))


def assert_same_gradients(ours, theirs, params, batch, tolerance=1e-6):
    found = [jax.jit(jax.value_and_grad(one))(params, batch) for one in (ours, theirs)]
    for got, wanted in zip(*map(jax.tree_util.tree_leaves, found), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_that_records_no_gradients_gets_them(mode):
    with mode():
        loss_fn, params = torch_loss(nn.Linear(3, 2), F.cross_entropy)
        assert_same_gradients(loss_fn, cross_entropy_in_jax, params, (X, Y))


class Counting(nn.Linear):
    """A bias that grows by one at each pass: in place, by another tensor, and with a gradient."""

    def __init__(self, how):
        super().__init__(3, 2)
        self.how = how
        self.register_buffer("count", torch.zeros(2))
        self.again = nn.Module()
        self.again.register_buffer("count", self.count)

    def forward(self, inputs):
        if self.how == "in place":
            self.count += 1
        elif self.how == "another":
            self.count = self.count + 1
        else:
            self.count += self.bias - self.bias + 1
        self.again.count.mul_(1.0)
        return super().forward(inputs) + self.count * torch.tensor([1.0, 0.0])


def counting_in_jax(params, batch):
    moved = {**params, "bias": params["bias"] + jnp.array([1.0, 0.0])}
    return cross_entropy_in_jax(moved, batch)


@pytest.mark.parametrize("how", ["in place", "another", "with a gradient"])
def test_buffers_that_a_pass_changes_are_as_given_at_the_next(how):
    loss_fn, params = torch_loss(Counting(how), F.cross_entropy)
    for _ in range(3):
        assert_same_gradients(loss_fn, counting_in_jax, params, (X, Y))


class Keeping(nn.Linear):
    """A module that keeps what it computed, also in a list."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        self.last, self.all = outputs, {3: [outputs], "same": (outputs,)}
        return self.last


def test_modules_that_keep_activations_are_copied():
    module = Keeping(3, 2)
    module(torch.from_numpy(X))
    loss_fn, params = torch_loss(module, F.cross_entropy)
    assert_same_gradients(loss_fn, cross_entropy_in_jax, params, (X, Y))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_weight_norm_by_hooks_is_copied():
    module = nn.utils.weight_norm(nn.Linear(3, 2))
    module(torch.from_numpy(X))

    def in_jax(params, batch):
        rows = params["weight_v"]
        weight = params["weight_g"] * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
        return cross_entropy_in_jax({"weight": weight, "bias": params["bias"]}, batch)

    loss_fn, params = torch_loss(module, F.cross_entropy)
    assert set(params) == {"weight_g", "weight_v", "bias"}
    assert_same_gradients(loss_fn, in_jax, params, (X, Y))


def test_modules_that_cannot_be_copied_are_refused():
    module = nn.Linear(3, 2)
    module.lock = threading.Lock()
    with pytest.raises(fastvi.DataError, match=r"cannot be copied.*lock.*deepcopy"):
        torch_loss(module, F.cross_entropy)


@pytest.mark.parametrize("is_training", [False, True])
def test_batch_norm_without_statistics_is_refused_in_both_modes(is_training):
    layer = nn.BatchNorm1d(2, track_running_stats=False)
    module = nn.Sequential(nn.Linear(3, 2), layer).train(is_training)
    with pytest.raises(fastvi.DataError, match="'1', BatchNorm1d, keeps no running statistics"):
        torch_loss(module, F.cross_entropy)
