"""The losses of the problems with known answers, and the draws that find some of these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from bench.truth import factorization, quadratic_units, superposition, trained
from bench.truth.gibbs import factorization_answer
from bench.truth.problems import PROBLEMS
from bench.truth.reference import load_reference
from bench.truth.regression import (
    class_logits,
    cross_entropy,
    derivatives,
    float64_loss,
    importance_answer,
)
from fastvi.target.ravel import ravel_loss

RNG = np.random.default_rng
# Of 100 panels: nodes of one rule of 4,000 are eigenvalues of a matrix of that size, 15 s.
PANELS = 100
NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)
NODES = ((NODES + 2 * np.arange(PANELS)[:, None] + 1) / PANELS - 1).ravel()
WEIGHTS = np.tile(WEIGHTS, PANELS) / PANELS

# Superposition.


def loss_by_quadrature(params):
    """Average over u by its definition."""
    total = 0.0
    for i in range(superposition.FEATURES):
        inputs = np.zeros((len(NODES), superposition.FEATURES))
        inputs[:, i] = 0.5 * (NODES + 1)
        hidden = inputs @ params["W"].T @ params["W"] + params["b"]
        missed = np.sum((inputs - np.maximum(hidden, 0)) ** 2, axis=1)
        total += 0.5 * WEIGHTS @ missed
    return total / superposition.FEATURES


@pytest.mark.parametrize("seed", range(4))
def test_superposition_meets_quadrature_over_the_inputs(seed):
    flat = RNG(seed).normal(size=18)
    params = superposition.unravel(flat)
    known = loss_by_quadrature(params)
    assert superposition.population_loss(params, np) == pytest.approx(known, rel=1e-6)
    assert float(superposition.population_loss(jax.tree.map(jnp.asarray, params))) == pytest.approx(
        known, rel=1e-5
    )


def test_gradients_of_superposition_agree():
    params = superposition.unravel(RNG(5).normal(size=18))
    own = superposition.population_gradient(params)
    by_jax = jax.jit(jax.grad(superposition.population_loss))(jax.tree.map(jnp.float32, params))
    for name in own:
        np.testing.assert_allclose(own[name], by_jax[name], atol=3e-6)


def test_no_direction_and_no_bias_leave_finite_gradients():
    params = {"W": jnp.zeros((2, 6)), "b": jnp.zeros(6)}
    grads = jax.jit(jax.grad(superposition.population_loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in grads.values())
    assert float(superposition.population_loss(params)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("vertices", [5, 6])
def test_polygons_are_minima_along_all_but_the_rotation(vertices):
    params = superposition.polygon(vertices)
    flat = np.concatenate([part.ravel() for part in params.values()])

    def gradient(flat):
        found = superposition.population_gradient(superposition.unravel(flat))
        return np.concatenate([part.ravel() for part in found.values()])

    assert np.abs(gradient(flat)).max() < 1e-9
    steps = 1e-5 * np.eye(len(flat))
    hessian = np.array([gradient(flat + step) - gradient(flat - step) for step in steps]) / 2e-5
    spectrum = np.linalg.eigvalsh(hessian)
    assert abs(spectrum[0]) < 1e-6
    assert spectrum[1] > 0.01
    lengths = np.linalg.norm(params["W"], axis=0)
    assert np.sum(lengths > 1) == vertices
    assert np.all(lengths[vertices:] < 1e-6)


# Quadratic units.


def test_population_loss_of_quadratic_units_is_the_mean_over_gaussian_inputs():
    half = RNG(0).normal(size=(6, 6))
    difference, inputs = half + half.T, RNG(1).normal(size=(400_000, 6))
    values = 0.5 * np.sum(inputs @ difference * inputs, axis=1) ** 2
    error = values.std() / np.sqrt(len(values))
    assert abs(float(quadratic_units.population_loss(difference)) - values.mean()) < 4 * error


def test_quadratic_units_count_what_the_loss_fixes():
    """The second derivative has the rank of what is fixed, and the rest has a fourth power."""
    params = quadratic_units.units_at_teacher().astype(float)
    assert np.linalg.matrix_rank(params, tol=1e-4) == quadratic_units.RANK
    jacobian = jax.jacobian(lambda w: w.T @ w)(jnp.asarray(params)).reshape(36, -1)
    assert np.linalg.matrix_rank(jacobian, tol=1e-4) == 3 + 8
    assert quadratic_units.learning_coefficient(4, 6, 2) == 11 / 2 + 2 * 4 / 4
    # one unit of one input at zero, w^4
    assert quadratic_units.learning_coefficient(1, 1, 0) == 0.25


def test_examples_of_quadratic_units_leave_the_teacher_the_minimum():
    problem = PROBLEMS["quadratic_units_data_g10"]()
    inputs, outputs = (part.astype(float) for part in problem.data)
    missed = np.sum((inputs @ problem.params.T) ** 2, axis=1) - outputs
    gradient = 2 * (inputs @ problem.params.T * missed[:, None]).T @ inputs / len(inputs)
    assert np.abs(gradient).max() < 1e-6
    assert missed.std() > 0.2


# Regressions.


def small_regression(columns, seed=0):
    rng = RNG(seed)
    inputs, labels = rng.normal(size=(200, 3)), rng.integers(max(columns, 2), size=200)
    return rng.normal(size=(3, columns)), inputs, labels


@pytest.mark.parametrize("columns", [1, 3])
def test_losses_and_derivatives_of_regressions_agree(columns):
    params, inputs, labels = small_regression(columns)
    loss = float64_loss(params[None], inputs, labels)[0]
    assert float(cross_entropy(params, (inputs, labels))) == pytest.approx(loss, rel=1e-5)
    logits = class_logits(params, inputs, np)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert -np.mean(np.log(chances[np.arange(200), labels])) == pytest.approx(loss, rel=1e-12)
    gradient, hessian = derivatives(params, inputs, labels)

    def loss_along(direction, step):
        return float64_loss(
            (params + step * direction.reshape(params.shape))[None], inputs, labels
        )[0]

    direction, step = RNG(1).normal(size=params.size), 1e-4
    up, down = loss_along(direction, step), loss_along(direction, -step)
    assert (up - down) / (2 * step) == pytest.approx(gradient @ direction, rel=1e-6)
    assert (up + down - 2 * loss) / step**2 == pytest.approx(
        direction @ hessian @ direction, rel=1e-4
    )


@pytest.mark.parametrize("name", ["logistic_10_g1", "softmax_30_g1"])
def test_regressions_are_at_the_maximum_of_the_likelihood(name):
    problem = PROBLEMS[name]()
    gradient, hessian = derivatives(problem.params.astype(float), *problem.data)
    assert problem.nbeta * np.abs(gradient).max() < 1e-3
    assert np.linalg.matrix_rank(hessian, tol=1e-6) == 2 * problem.theory


def test_importance_sampling_meets_quadrature():
    inputs, labels = RNG(3).normal(size=(40, 1)), RNG(4).integers(2, size=40)
    nbeta, gamma, center = 10.0, 1.0, np.array([[0.3]])
    grid = np.linspace(-6, 6, 4001)
    energy = float64_loss((center[0, 0] + grid)[:, None, None], inputs, labels)
    energy = nbeta * (energy - float64_loss(center[None], inputs, labels))
    density = np.exp(-energy - 0.5 * gamma * grid**2)
    known = np.sum(density * energy) / np.sum(density)
    value, error = importance_answer(center, inputs, labels, nbeta, gamma)
    assert abs(value - known) < 4 * error < 0.05


# Factorisation.


def test_factorisation_meets_quadrature():
    """A matrix of one entry: (u v - t)^2."""
    nbeta, gamma = 8.0, 1.5
    left, right = np.array([[1.2]]), np.array([[0.7]])
    grid = np.linspace(-5, 7, 1201)
    one, two = grid[:, None], grid[None]
    energy = 0.5 * nbeta * (one * two - left * right) ** 2
    density = np.exp(-energy - 0.5 * gamma * ((one - left) ** 2 + (two - right) ** 2))
    known = np.sum(density * energy) / np.sum(density)
    value, error = factorization_answer(left, right, np.ones((1, 1)), nbeta, gamma, sweeps=2000)
    assert abs(value - known) < 4 * error < 0.02


def test_entries_are_measured_with_noise_that_averages_to_zero():
    problem = PROBLEMS["factorization_8_7_g1"]()
    rows, columns, values = problem.data
    product = problem.params["U"] @ problem.params["V"].T
    missed = product[rows, columns] - values
    assert missed.std() > 0.3
    means = np.zeros_like(product)
    np.add.at(means, (rows, columns), missed)
    assert np.abs(means).max() < 1e-4
    assert np.linalg.matrix_rank(product, tol=1e-4) == factorization.TRUE_RANK
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == factorization.OBSERVED
    # the excess loss is that of the entries, which Gibbs sampling draws from
    moved = {
        key: part + 0.1 * RNG(1).normal(size=part.shape) for key, part in problem.params.items()
    }
    excess = problem.loss_fn(moved, problem.data) - problem.loss_fn(problem.params, problem.data)
    seen = (moved["U"] @ moved["V"].T - product)[rows, columns]
    assert float(excess) == pytest.approx(0.5 * np.mean(seen**2), rel=1e-4)


# What is drawn for the stored answers, by fewer draws.

SHORT = {
    "logistic_10_g1": {"pairs": 64},
    "softmax_30_g1": {"pairs": 64},
    "factorization_8_7_g1": {"sweeps": 200, "seed": 1},
}


@pytest.mark.parametrize("name", SHORT)
def test_stored_answer_meets_fewer_draws(name):
    value, error = PROBLEMS[name]().exact(**SHORT[name])
    row = load_reference(name)
    assert abs(value - row["value"]) < 4 * error
    assert row["sem"] < error
    assert row["sem"] < 0.005 * row["value"]


# Networks that were trained.


def test_convolution_is_a_sum_over_patches():
    params, images = trained.start_conv(RNG(0)), RNG(1).random((3, 64))
    pixels = images.reshape(3, 8, 8)
    features = np.zeros((3, 6, 6, trained.CHANNELS))
    for i in range(6):
        for j in range(6):
            patch = pixels[:, i : i + 3, j : j + 3].reshape(3, 9)
            features[:, i, j] = np.tanh(patch @ params["conv"]["w"].reshape(9, -1))
    pooled = features.reshape(3, 2, 3, 2, 3, trained.CHANNELS).mean(axis=(2, 4)).reshape(3, -1)
    params = jax.tree.map(jnp.float32, params)
    logits = trained.conv_logits(params, jnp.float32(images))
    np.testing.assert_allclose(logits, pooled @ params["out"]["w"], atol=1e-5)


def test_a_token_sees_the_two_before_it():
    params = jax.tree.map(jnp.float32, trained.start_tokens(RNG(0)))
    tokens = RNG(1).integers(trained.VOCABULARY, size=(2, 6))
    logits = trained.next_token_logits(params, tokens)
    for position in range(6):
        for other in range(6):
            changed = tokens.copy()
            changed[:, other] = (changed[:, other] + 1) % trained.VOCABULARY
            moved = np.abs(trained.next_token_logits(params, changed) - logits)[:, position].max()
            assert (moved > 1e-6) == (other in (position - 1, position - 2))


def test_loss_of_tokens_is_the_mean_over_all_that_count():
    problem = PROBLEMS["tokens_g1"]()
    tokens, targets, mask = problem.data
    lengths = mask.sum(axis=1)
    assert len(set(lengths.tolist())) == 5  # sequences count by their length
    logits = np.asarray(trained.next_token_logits(problem.params, tokens), float)
    logs = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    known = -np.sum(mask[..., None] * targets * logs) / mask.sum()
    batch = problem.batch()
    assert np.allclose(batch.inverse_mean_weight, len(tokens) / mask.sum())
    objective, center = ravel_loss(problem.loss_fn, problem.params)
    assert float(objective.loss(center, batch)) == pytest.approx(known, rel=1e-5)
    padded = np.where(mask, tokens, (tokens + 1) % trained.VOCABULARY)
    other = batch._replace(examples=(padded, targets, mask))
    assert float(objective.loss(center, other)) == pytest.approx(known, rel=1e-5)


def test_tokens_are_fitted_by_no_other_model_and_each_sequence_pulls():
    problem = PROBLEMS["tokens_g1"]()
    objective, center = ravel_loss(problem.loss_fn, problem.params)
    batch = problem.batch()
    tokens, targets, mask = problem.data
    np.testing.assert_allclose(targets.sum(axis=2), 1, atol=1e-5)
    assert problem.nbeta * np.linalg.norm(objective.grad(center, batch)) < 1e-3
    some = jax.tree.map(lambda leaf: leaf[:50], batch)
    assert np.linalg.norm(objective.grad(center, some)) > 0.05
    # after all pairs, what is left of the Jacobian without the origin of the softmax
    pairs = np.indices((trained.VOCABULARY,) * 3).reshape(3, -1).T[:: trained.VOCABULARY]
    flat, unravel = ravel_pytree(problem.params)
    slopes = jax.jit(jax.jacfwd(lambda flat: trained.next_token_logits(unravel(flat), pairs)))(flat)
    slopes = np.asarray(slopes - slopes.mean(axis=2, keepdims=True)).reshape(-1, len(flat))
    assert np.linalg.matrix_rank(slopes, tol=1e-5 * np.linalg.norm(slopes, 2)) == 2 * problem.theory


def test_convolution_is_at_the_end_of_its_training():
    problem = PROBLEMS["conv_digits_g100"]()
    objective, center = ravel_loss(problem.loss_fn, problem.params)
    grad = objective.grad(center, problem.data)
    assert problem.nbeta * np.linalg.norm(grad) < 0.02 * np.sqrt(problem.gamma)
