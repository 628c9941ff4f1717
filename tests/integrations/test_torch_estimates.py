"""Whole estimates of a torch module, beside those of the same network in jax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi

torch = pytest.importorskip("torch", reason="torch is large; `make test-torch` installs it")

from sklearn.datasets import load_digits  # noqa: E402

from fastvi.integrations.torch import torch_loss  # noqa: E402
from tests.support.markdown import python_blocks  # noqa: E402
from tests.test_docs import DOCS  # noqa: E402

F = torch.nn.functional
COUNT, WIDTH = 256, 6
KEPT = [20, 28, 36, 44, 43, 21]  # pixels of the middle, which keeps the network small
OPTIONS = {"localization": 20.0, "budget": 12_000.0, "progress": False, "key": 5}


@functools.cache
def digits():
    inputs, targets = load_digits(return_X_y=True)
    return (inputs[:COUNT, KEPT] / 16).astype(np.float32), targets[:COUNT] % 3


@functools.cache
def trained():
    """A tanh network at a minimum of its loss with a weak decay."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(len(KEPT), WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 3)
    )
    inputs, targets = map(torch.from_numpy, digits())
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        decay = sum(one.square().sum() for one in module.parameters())
        loss = F.cross_entropy(module(inputs), targets) + 1e-3 * decay
        loss.backward()
        return loss

    optimizer.step(closure)
    return module.eval()


def each(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def in_jax(params, batch):
    hidden = jnp.tanh(batch[0] @ params["0.weight"].T + params["0.bias"])
    every = jax.nn.log_softmax(hidden @ params["2.weight"].T + params["2.bias"])
    return -jnp.take_along_axis(every, batch[1][:, None], axis=1)[:, 0]


@functools.cache
def estimate(which):
    loss_fn, params = torch_loss(trained(), each)
    return fastvi.estimate_llc(loss_fn if which == "torch" else in_jax, params, digits(), **OPTIONS)


def test_llc_is_that_of_jax():
    ours, theirs = estimate("torch"), estimate("jax")
    assert abs(ours.llc - theirs.llc) < 4 * np.hypot(ours.llc_sem, theirs.llc_sem)
    assert ours.init_loss == pytest.approx(theirs.init_loss, rel=1e-5)
    assert ours.work.total_fge == pytest.approx(theirs.work.total_fge, rel=0.1)


SHORT = {"steps": 20, "M": 1, "r": 0, "method": "variational", "num_chains": 1, "eval_samples": 16}


def test_a_fit_is_read_on_other_data_and_by_example():
    """The draws of a fit are the same to rounding, so that losses at them are alike."""
    loss_fn, params = torch_loss(trained(), each)
    data = digits()
    half = tuple(one[: COUNT // 2] for one in data)
    found = []
    for loss in (loss_fn, in_jax):
        result = fastvi.estimate_llc(loss, params, data, key=1, progress=False, **SHORT)
        other = fastvi.llc_on(result, half)
        found.append((result, other, np.asarray(fastvi.example_losses(result, half))))
    (ours, our_half, our_losses), (theirs, their_half, losses) = found
    assert our_losses.shape == losses.shape == (1, 16, COUNT // 2)
    for one, other in ((ours, theirs), (our_half, their_half)):
        assert abs(one.llc - other.llc) < 4 * np.hypot(one.llc_sem, other.llc_sem)
    spread = losses.mean(axis=(0, 2)).std() / np.sqrt(16)
    assert abs(our_losses.mean() - losses.mean()) < 4 * np.sqrt(2) * spread
    np.testing.assert_allclose(our_half.init_loss, losses_at(half).mean(), rtol=1e-5)


def losses_at(data):
    with torch.no_grad():
        return each(trained()(torch.from_numpy(data[0])), torch.from_numpy(data[1])).numpy()


def test_random_layers_of_no_known_type_are_found_out():
    class Noisy(torch.nn.Linear):
        def forward(self, inputs):
            return super().forward(F.dropout(inputs, 0.5))

    loss_fn, params = torch_loss(Noisy(len(KEPT), 3), each)
    with pytest.raises(fastvi.DataError, match="evaluation mode"):
        fastvi.estimate_llc(loss_fn, params, digits(), **OPTIONS)


def test_losses_of_one_architecture_are_told_apart():
    """Programs are shared by what a loss computes: another module, or loss, is another one."""
    from fastvi.target.data import Problem, hold
    from fastvi.target.fingerprint import fingerprint_loss
    from fastvi.target.posterior import LocalPosterior
    from fastvi.target.ravel import ravel_loss

    data = tuple(map(jnp.asarray, digits()))

    def fingerprint(loss_fn, params):
        objective, center = ravel_loss(loss_fn, params)
        one = jnp.ones(())
        return fingerprint_loss(objective, Problem(LocalPosterior(center, one, one), hold(data), 8))

    losses = [torch_loss(trained(), each) for _ in range(2)]
    first, second = (fingerprint(*one) for one in losses)
    assert first == fingerprint(*losses[0])
    assert first != second


def test_examples_of_the_page_run(capsys):
    pytest.importorskip("transformers", reason="`make test-torch` installs it")
    page, namespace = DOCS / "torch.md", {}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), namespace)
    printed = capsys.readouterr().out
    assert "llc" in printed
    assert "head 1.1: 536 of" in printed
    assert namespace["result"].dim == 8 * 16 + 16 + 16 * 3 + 3


def test_example_for_users_of_devinterp_runs(capsys):
    namespace = {}
    (block,) = python_blocks(DOCS / "coming-from-devinterp.md")
    exec(compile(block, "coming-from-devinterp.md", "exec"), namespace)
    assert capsys.readouterr().out.startswith("llc ")
    assert namespace["result"].dim == 4 * 3 + 3
