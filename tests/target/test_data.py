"""The verbs of data: exact means whatever the slices, and uniform minibatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

from fastvi import LocalPosterior, make_flat_objective
from fastvi.kernels.noise import streams
from fastvi.target.data import (
    MOST_EXAMPLES,
    PASS_BYTES,
    Problem,
    Window,
    default_max_batch,
    evaluate_target,
    hold,
    slice_size,
)
from fastvi.target.hessian import data_hvp

COUNT, DIM = 60, 3
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(COUNT, DIM)), RNG.normal(size=COUNT)
W, TANGENT = RNG.normal(size=(2, DIM))


def loss(w, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ w) - batch["y"]) ** 2)


OBJECTIVE = make_flat_objective(loss)


def examples(count=COUNT):
    return {"x": jnp.asarray(X[:count]), "y": jnp.asarray(Y[:count])}


def dense(w, rows=slice(None)):
    """The mean loss of some examples and its gradient, by numpy."""
    value = np.tanh(X[rows] @ w)
    residual = value - Y[rows]
    return np.mean(residual**2), np.mean(2 * (residual * (1 - value**2))[:, None] * X[rows], axis=0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [1, 7, 12, 59, 60, 100])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_mean_is_exact_whatever_the_slices(most, copies):
    found = hold(examples(), most).mean(lambda b: OBJECTIVE.value_and_grad(W, b), copies=copies)
    for one, exact in zip(found, dense(W), strict=True):
        np.testing.assert_allclose(one, exact, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [2, 5, 100])
def test_a_mean_over_rows_under_vmap_and_jit(most):
    rows = RNG.integers(COUNT, size=(4, 13))
    points = W + RNG.normal(size=(4, DIM))

    @jax.jit
    @jax.vmap
    def mean(point, rows):
        data = hold(examples(), most)
        return data.mean(lambda b: OBJECTIVE.value_and_grad(point, b), rows, copies=4)

    values, gradients = mean(points, jnp.asarray(rows))
    for point, mine, value, gradient in zip(points, rows, values, gradients, strict=True):
        np.testing.assert_allclose(value, dense(point, mine)[0], rtol=1e-12)
        np.testing.assert_allclose(gradient, dense(point, mine)[1], rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [7, 12, 100])
def test_a_mean_can_be_differentiated_and_its_hessian_applied(most):
    data = hold(examples(), most)
    gradient = quick_jit(jax.grad(lambda w: data.mean(lambda batch: loss(w, batch))))(W)
    np.testing.assert_allclose(gradient, dense(W)[1], rtol=1e-12)
    hessian = np.asarray(quick_jit(jax.hessian(loss))(W, examples()))
    product = quick_jit(jax.vmap(data_hvp(OBJECTIVE, jnp.asarray(W), data, copies=2)))(
        np.stack([TANGENT, 2 * TANGENT])
    )
    np.testing.assert_allclose(product, [hessian @ TANGENT, 2 * hessian @ TANGENT], rtol=1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [7, 12, 100])
def test_each_example_has_its_value(most):
    found = hold(examples(), most).each(lambda b: (b["x"] @ W - b["y"]) ** 2)
    np.testing.assert_allclose(found, (X @ W - Y) ** 2, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [4, 16, 100])
def test_a_minibatch_beyond_a_pass_gives_the_same_gradient(most):
    """Accumulating over slices is the mean over the batch, for every draw."""
    posterior = LocalPosterior(jnp.asarray(W), jnp.asarray(30.0), jnp.asarray(2.0))
    problem = Problem(posterior, hold(examples(), most), 24)
    batch = problem.next_batch(jax.random.key(0))
    draws = RNG.normal(size=(2, DIM))
    value, grad = quick_jit(lambda v, batch: evaluate_target(OBJECTIVE, problem, v, batch))(
        draws, batch
    )
    value_and_grad = quick_jit(jax.value_and_grad(loss))
    for v, mine, slope in zip(draws, value, grad, strict=True):
        exact = jax.device_get(value_and_grad(W + v, batch))
        np.testing.assert_allclose(mine, -30 * exact[0] - v @ v, rtol=1e-12)
        np.testing.assert_allclose(slope, -30 * exact[1] - 2 * v, rtol=1e-12)


@pytest.mark.parametrize(("count", "traces"), [(60, 1), (59, 2), (6, 1)])
def test_the_model_is_traced_once_where_slices_are_even(count, traces):
    calls = []

    def counted(batch):
        calls.append(batch["y"].shape)
        return loss(jnp.asarray(W), batch)

    jax.jit(lambda: hold(examples(count), 12).mean(counted))()
    assert len(calls) == traces


def test_slices_are_even_where_they_can_be():
    assert slice_size(60_000, 512) == 500
    assert slice_size(512, 512) == 512
    assert slice_size(1024, 512) == 512
    assert slice_size(59, 12) == 12  # a prime: a rest is left
    assert slice_size(2 * 59, 16) == 16  # the divisor 2 is too small to be fast
    assert slice_size(7, 1) == 1


def test_minibatches_are_uniform_draws_with_replacement():
    data = hold(jnp.arange(10))
    drawn = np.concatenate(
        [np.asarray(data.minibatch(jax.random.key(0), 9, block)) for block in range(400)]
    )
    counts = np.bincount(drawn, minlength=10)
    expected = drawn.size / 10
    assert np.sum((counts - expected) ** 2 / expected) < 27.9  # chi squared, 9 degrees, 0.1 %
    np.testing.assert_array_equal(data.minibatch(jax.random.key(0), 10), np.arange(10))


def test_a_window_is_used_up_before_it_repeats():
    window = Window(jnp.arange(12), 100, population=1000)
    key = jax.random.key(3)
    blocks = [streams.step_batch(step) for step in range(3)]
    drawn = np.concatenate([np.asarray(window.minibatch(key, 4, block)) for block in blocks])
    assert sorted(drawn.tolist()) == list(range(12))


def test_a_subset_has_no_example_twice():
    chosen = hold(jnp.arange(100)).subset(jax.random.key(0), 30)
    assert len(set(np.asarray(chosen.examples).tolist())) == chosen.num_examples == 30
    assert hold(jnp.arange(5)).subset(jax.random.key(0), 30).num_examples == 5


def test_the_default_of_max_batch_follows_the_size_of_an_example():
    def of(*shapes):
        arrays = [np.broadcast_to(np.float32(0), (9, *shape)) for shape in shapes]
        return default_max_batch(arrays)

    assert of((1024,)) == PASS_BYTES // 4096
    assert of((1024, 1024), ()) == 3
    assert of((10_000, 10_000)) == 1
    assert of(()) == MOST_EXAMPLES
