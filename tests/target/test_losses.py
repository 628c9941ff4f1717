"""Losses per example, per token and weighted: the mean over all data whatever the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi._errors import DataError
from fastvi.sampling.gradients import split_data
from fastvi.target.data import hold
from fastvi.target.look import _weigher
from fastvi.target.losses import find_mean_weight, weigh_batch, weight_statistics
from fastvi.target.objective import make_flat_objective
from fastvi.target.ravel import ravel_loss

COUNT, TOKENS, DIM = 60, 5, 3
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(COUNT, TOKENS, DIM))
LENGTHS = np.sort(RNG.integers(1, TOKENS + 1, COUNT))  # sorted by length: batches weigh unlike
MASK = np.arange(TOKENS)[None] < LENGTHS[:, None]
TARGETS = INPUTS @ np.arange(1.0, DIM + 1) + np.where(MASK.sum(1) > 2, 1.0, 0.1)[
    :, None
] * RNG.normal(size=(COUNT, TOKENS))
DATA = (INPUTS, TARGETS, MASK)
ROWS = INPUTS[MASK]
CENTER = np.linalg.lstsq(ROWS, TARGETS[MASK], rcond=None)[0]


def squares(w, batch):
    return 0.5 * (batch[0] @ w - batch[1]) ** 2


def masked(w, batch):
    return squares(w, batch), batch[2]


def weighted(objective, w, data):
    mean, error, share = find_mean_weight(_weigher(objective), w, [hold(data)], "loss")
    assert error == 0.0
    of_example = np.asarray(data[2], float).reshape(len(data[2]), -1).sum(axis=1)
    assert share == pytest.approx(of_example.mean() ** 2 / np.mean(of_example**2), rel=1e-5)
    return weigh_batch(data, mean, w.dtype), mean


def dense_mean(w):
    """L_n and its gradient over the kept tokens."""
    residual = ROWS @ w - TARGETS[MASK]
    return 0.5 * np.mean(residual**2), ROWS.T @ residual / residual.size


@pytest.mark.usefixtures("x64")
def test_weighted_mean_is_that_over_all_kept_tokens():
    objective = make_flat_objective(masked)
    w, data = jnp.asarray(CENTER + 0.3), jax.tree_util.tree_map(jnp.asarray, DATA)
    data, mean = weighted(objective, w, data)
    assert mean == pytest.approx(MASK.sum() / COUNT, rel=1e-12)
    value, gradient = dense_mean(CENTER + 0.3)
    # slices of 7, 16 and 59 examples
    for most in (7, 16, 59):
        got = hold(data, most).mean(lambda batch: objective.value_and_grad(w, batch))
        np.testing.assert_allclose(got[0], value, rtol=1e-12)
        np.testing.assert_allclose(got[1], gradient, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_blocks_and_minibatches_are_unbiased():
    """The mean over equal parts is the mean over the data, though parts weigh unlike."""
    objective = make_flat_objective(masked)
    w, data = jnp.asarray(CENTER + 0.3), jax.tree_util.tree_map(jnp.asarray, DATA)
    data, _ = weighted(objective, w, data)
    losses = jax.jit(
        jax.vmap(
            lambda rows: objective.loss(w, jax.tree_util.tree_map(lambda leaf: leaf[rows], data))
        )
    )
    for blocks in (split_data(COUNT, 4).rows, np.arange(COUNT)[:, None]):
        found = losses(jnp.asarray(blocks))
        np.testing.assert_allclose(np.mean(found), dense_mean(CENTER + 0.3)[0], rtol=1e-12)
        assert np.std(found) > 0.1 * np.mean(found)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduce", [lambda losses: losses, lambda losses: losses.mean(1), jnp.mean])
def test_losses_per_token_per_example_and_their_mean_agree(reduce):
    objective = make_flat_objective(lambda w, batch: reduce(squares(w, batch)))
    w, data = jnp.asarray(CENTER), jax.tree_util.tree_map(jnp.asarray, DATA)
    value, gradient = jax.jit(objective.value_and_grad)(w, data)
    residual = INPUTS @ CENTER - TARGETS
    np.testing.assert_allclose(value, 0.5 * np.mean(residual**2), rtol=1e-12)
    np.testing.assert_allclose(
        gradient, np.einsum("ntd,nt->d", INPUTS, residual) / residual.size, rtol=1e-12
    )


def test_estimate_of_a_weighted_loss_meets_its_closed_form():
    """A quadratic in w.

    Llc = tr(nbeta H (nbeta H + gamma)^-1) / 2 with H over the kept tokens of all data.
    """
    nbeta, gamma = 40.0, 1.0
    hessian = ROWS.T @ ROWS / len(ROWS)
    eigenvalues = nbeta * np.linalg.eigvalsh(hessian)
    truth = 0.5 * np.sum(eigenvalues / (eigenvalues + gamma))
    settings = {"nbeta": nbeta, "localization": gamma, "progress": False}
    result = fastvi.estimate_llc(masked, jnp.asarray(CENTER, jnp.float32), DATA, **settings)
    assert abs(result.llc - truth) < 4 * result.llc_sem + 1e-3 * truth
    assert result.init_loss == pytest.approx(dense_mean(CENTER)[0], rel=1e-5)
    assert result.n_data == COUNT
    losses = fastvi.example_losses(result, DATA)
    excess = result.draws.excess_loss + result.init_loss
    np.testing.assert_allclose(
        losses.mean(axis=2), excess, rtol=1e-3
    )  # of the same draws, in float32
    again = fastvi.llc_on(result, DATA)
    assert again.init_loss == pytest.approx(result.init_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda w, b: -b[2].astype(float), "finite and at least 0"),
        (lambda w, b: 0 * b[1], "are all 0"),
        (lambda w, b: jnp.where(b[2], 1.0, jnp.nan), "finite"),
        (lambda w, b: b[2] * (1 + w[0] ** 2), "change with the parameters"),
    ],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(DataError, match=f"the weights of loss_fn.*{message}"):
        fastvi.estimate_llc(
            lambda w, b: (squares(w, b), weights(w, b)), jnp.asarray(CENTER), DATA, progress=False
        )


def test_weighted_stream_meets_the_data_in_memory():
    class Stream:
        def __iter__(self):
            for start in range(0, COUNT, 16):
                yield tuple(leaf[start : start + 16] for leaf in DATA)

    objective, w = ravel_loss(masked, jnp.asarray(CENTER, jnp.float32))
    settings = {
        "progress": False,
        "steps": 200,
        "num_chains": 2,
        "early_stop": False,
        "method": "variational",
        "M": 1,
        "r": 0,
    }
    streamed = fastvi.estimate_llc(masked, w, Stream(), **settings)
    held = fastvi.estimate_llc(masked, w, DATA, **settings)
    assert streamed.init_loss == pytest.approx(held.init_loss, rel=1e-5)
    assert (
        abs(streamed.llc - held.llc)
        < 4 * np.hypot(streamed.llc_sem, held.llc_sem) + 0.05 * held.llc
    )


@pytest.mark.parametrize("returned", ["losses", "pair"])
def test_an_objective_of_ones_own_returns_the_mean(returned):
    """A class with its own gradient is asked for a scalar by name, whatever it returns instead."""

    class Own:
        def loss(self, w, batch):
            losses = jnp.sum(w**2) * jnp.ones(batch.shape[0])
            return losses if returned == "losses" else (losses, jnp.ones_like(losses))

        def grad(self, w, batch):
            return 2 * w

    options = {"n_data": 50, "beta": 0.25, "gamma": 1.0, "vi_cfg": {"steps": 2}}
    with pytest.raises(fastvi.DataError, match="must return the mean loss as one scalar"):
        fastvi.fit(
            rng_key=0, objective=Own(), wstar_flat=jnp.zeros(3), data=jnp.ones((50, 1)), **options
        )


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_weights_of_any_size_are_weighed(scale):
    weights = np.float32([1.0, 2.0, 3.0, 4.0]) * np.float32(scale)

    def weigh(w, piece):
        return weight_statistics((None, piece.examples), jnp.float32)

    found = find_mean_weight(weigh, jnp.zeros(2), [hold(weights)], "loss")
    assert found.mean == pytest.approx(2.5 * scale)
    assert found.effective_share == 1.0  # of squares that leave the range nothing is known
