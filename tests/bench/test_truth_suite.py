"""The problems with known answers, and the means by which their answers are found."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from bench.truth.aoyagi import deep_linear_learning_coefficient
from bench.truth.convergence import effective_sample_size, split_r_hat
from bench.truth.gibbs import GIBBS
from bench.truth.hmc import Recipe, sample
from bench.truth.linear_nets import degenerate_layers, layer_product, regular_layers
from bench.truth.problems import PROBLEMS, select
from bench.truth.quadratics import quadratic_answer
from bench.truth.quadrature import even_loss_answer, sphere_answer
from bench.truth.reference import load_reference, load_references
from bench.truth.regression import SAMPLING
from fastvi.target.ravel import ravel_loss

FAST = {problem.name: problem for problem in select("fast")}
# draws take longer, and differ by processor: fewer are compared, here and in test_truth_losses.py
SAMPLED = (SAMPLING, GIBBS)
EXACT = [name for name, one in FAST.items() if one.exact and one.exact_method not in SAMPLED]

# The learning coefficient of deep linear networks.


def reduced_rank_coefficient(outputs, inputs, hidden, rank):
    """Aoyagi & Watanabe, Neural Networks 18 (2005) 924: two layers, case by case."""
    if outputs + inputs < hidden + rank:
        return outputs * inputs / 2
    if inputs + hidden < outputs + rank:
        return (hidden * inputs - hidden * rank + outputs * rank) / 2
    if outputs + hidden < inputs + rank:
        return (hidden * outputs - hidden * rank + inputs * rank) / 2
    top = hidden + rank
    square = (
        -(top**2) - outputs**2 - inputs**2 + 2 * (top * outputs + top * inputs + outputs * inputs)
    )
    return (square + (outputs + inputs + top) % 2) / 8


def test_two_linear_layers_agree_with_the_formula_by_cases():
    for outputs, inputs, hidden in itertools.product(range(1, 8), repeat=3):
        for rank in range(min(outputs, inputs, hidden) + 1):
            known = reduced_rank_coefficient(outputs, inputs, hidden, rank)
            assert deep_linear_learning_coefficient(
                (inputs, hidden, outputs), rank
            ) == pytest.approx(known)


def enumerated_coefficient(widths, rank):
    """Spread the spare dimensions of one width over the other layers in all ways.

    The cheapest counts.

    The formula is its minimum: 1/4 min { sum_j (2 M_j y_j + y_j^2) - M_0^2 : sum_j y_j = M_0 } for
    the least M_0.
    """
    least, *others = sorted(width - rank for width in widths)
    ways = (
        way for way in itertools.product(range(least + 1), repeat=len(others)) if sum(way) == least
    )
    cheapest = min(sum(2 * m * y + y * y for m, y in zip(others, way, strict=True)) for way in ways)
    return rank * (widths[0] + widths[-1] - rank) / 2 + (cheapest - least**2) / 4


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_deep_linear_layers_agree_with_enumeration(layers):
    for widths in itertools.product(range(1, 5), repeat=layers + 1):
        for rank in range(min(widths) + 1):
            known = enumerated_coefficient(widths, rank)
            assert deep_linear_learning_coefficient(widths, rank) == pytest.approx(known), (
                widths,
                rank,
            )


def test_impossible_rank_is_refused():
    with pytest.raises(ValueError, match="rank 4"):
        deep_linear_learning_coefficient((5, 3, 5), 4)


def test_degenerate_layers_have_the_rank_of_the_product():
    layers = degenerate_layers((6, 4, 7, 5), 2)
    assert [
        np.linalg.matrix_rank(layer, tol=1e-4)
        for layer in (*layers.values(), layer_product(layers))
    ] == [2] * 4


def test_theory_at_regular_points_is_half_the_hessians_rank():
    layers = {name: jnp.asarray(layer) for name, layer in regular_layers((5, 5, 5, 5), 2).items()}
    jacobian = jax.jacobian(layer_product)(layers)
    rank = np.linalg.matrix_rank(
        np.concatenate([part.reshape(25, -1) for part in jacobian.values()], axis=1), tol=1e-4
    )
    assert np.linalg.matrix_rank(layer_product(layers), tol=1e-4) == 2
    assert rank == 25 == 2 * PROBLEMS["smooth_linear_2x5_g10"]().theory


# Every problem.


@pytest.mark.parametrize("name", FAST)
def test_problem_is_at_a_minimum(name):
    problem = FAST[name]
    assert name in PROBLEMS
    assert problem.name == name
    assert len(jax.tree_util.tree_leaves(problem.data)[0]) == problem.n_data
    objective, center = ravel_loss(problem.loss_fn, problem.params)
    directions = np.random.default_rng(0).normal(size=(20, center.size)) / math.sqrt(center.size)
    around = np.concatenate([np.zeros((1, center.size)), 0.01 * directions, 0.3 * directions])
    value_and_grad = jax.jit(jax.vmap(objective.value_and_grad, in_axes=(0, None)))
    losses, grads = value_and_grad(np.asarray(center + around, np.float32), problem.batch())
    assert problem.nbeta * np.linalg.norm(grads[0]) < 0.02 * math.sqrt(problem.gamma)
    assert np.all(problem.nbeta * (losses - losses[0]) > -1e-3)


def test_names_of_all_problems():
    for name in ("deep_linear_3x18_g10", "digits_16_g1"):
        assert PROBLEMS[name]().name == name


# Quadrature.


@pytest.mark.parametrize("curvatures", [(3.0,), (3.0, 0.1), (3.0, 0.1, 50.0)])
def test_quadrature_meets_the_closed_form(curvatures):
    value, error = even_loss_answer(
        lambda point: sum(0.5 * h * w**2 for h, w in zip(curvatures, point, strict=True)),
        len(curvatures),
        145.0,
        2.0,
    )
    assert value == pytest.approx(quadratic_answer(curvatures, 145.0, 2.0), rel=1e-7)
    assert error < 1e-6


def test_quadrature_meets_a_single_integral():
    """(w1 w2)^2 with w2 integrated by hand."""
    nbeta, gamma = 144.76, 0.7

    def weight(w):
        return np.exp(-0.5 * gamma * w**2) / np.sqrt(gamma + 2 * nbeta * w**2)

    def moment(w):
        return weight(w) * nbeta * w**2 / (gamma + 2 * nbeta * w**2)

    known = (
        scipy.integrate.quad(moment, 0, 20, limit=200)[0]
        / scipy.integrate.quad(weight, 0, 20, limit=200)[0]
    )
    value, _ = even_loss_answer(lambda point: (point[0] * point[1]) ** 2, 2, nbeta, gamma)
    assert value == pytest.approx(known, rel=1e-6)


def test_sphere_meets_a_single_integral():
    """In three dimensions the angle integrates to sinh(gamma r) / (gamma r)."""
    nbeta, gamma = 100.0, 3.0

    def weight(r):
        return (
            r**2
            * np.exp(-nbeta * (r**2 - 1) ** 2 - 0.5 * gamma * (r**2 + 1))
            * np.sinh(gamma * r)
            / (gamma * r)
        )

    def moment(r):
        return weight(r) * nbeta * (r**2 - 1) ** 2

    known = (
        scipy.integrate.quad(moment, 0, 3, points=[1.0])[0]
        / scipy.integrate.quad(weight, 0, 3, points=[1.0])[0]
    )
    assert sphere_answer(3, nbeta, gamma)[0] == pytest.approx(known, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("crossing_2", 0.361),
        ("crossing_2_n1e4", 0.391),
        ("half_crossing_2", 0.347),
        ("half_crossing_2_n1e4", 0.382),
    ],
)
def test_known_values(name, known):
    assert FAST[name].exact()[0] == pytest.approx(known, abs=6e-4)


# Sampling.


def test_effective_size_of_an_autoregression():
    rng, persistence, length = np.random.default_rng(0), 0.8, 4000
    draws = np.zeros((length, 8))
    for i in range(1, length):
        draws[i] = persistence * draws[i - 1] + rng.normal(size=8)
    expected = draws.size * (1 - persistence) / (1 + persistence)
    assert effective_sample_size(draws) == pytest.approx(expected, rel=0.15)
    assert split_r_hat(draws) < 1.01


def test_r_hat_sees_chains_that_disagree_and_chains_that_drift():
    draws = np.random.default_rng(1).normal(size=(400, 8))
    assert split_r_hat(draws) < 1.01
    assert split_r_hat(draws + np.arange(8)) > 1.5
    assert split_r_hat(draws + np.linspace(0, 3, 400)[:, None]) > 1.2


def test_hmc_meets_the_closed_form():
    problem = FAST["quadratic_d10_c100"]
    result = sample(problem, Recipe(seconds=60.0))
    assert result["converged"]
    assert abs(result["value"] - problem.exact()[0]) < 4 * result["sem"] < 0.2
    assert abs(result["virial"] - 1) < 0.05


# The stored answers.


@pytest.mark.parametrize("name", EXACT)
def test_stored_answer_is_the_exact_one(name):
    row = load_reference(name)
    assert row["value"] == pytest.approx(FAST[name].exact()[0], rel=1e-6)
    assert row["method"] == FAST[name].exact_method


@pytest.mark.parametrize(
    "name", ["reduced_rank_6_3_5", "deep_linear_4x5_g10", "smooth_linear_2x5_g10"]
)
def test_stored_gibbs_answer_is_that_of_fewer_draws(name):
    problem, row = FAST[name], load_reference(name)
    value, error = problem.exact(sweeps=150)
    assert abs(value - row["value"]) < 4 * np.hypot(error, row["sem"])
    assert error < 0.01 * value
    # another program, on the same posterior
    if "hmc_check" in row:
        check = row["hmc_check"]
        assert abs(value - check["value"]) < 4 * np.hypot(error, check["sem"])


def test_stored_answers_are_of_these_problems():
    for name, row in load_references().items():
        problem = PROBLEMS[name]()
        for field in ("dim", "n_data", "gamma", "nbeta", "theory"):
            assert row[field] == pytest.approx(getattr(problem, field)), name


def test_stored_samples_say_how_good_they_are():
    rows = load_references()
    sampled = {name: row for name, row in rows.items() if row["method"] == "hmc"}
    assert sampled
    for name, row in sampled.items():
        if row["converged"]:
            assert row["r_hat"] < 1.01, name
            assert row["sem"] < 0.01 * row["value"], name
    for name, row in rows.items():
        if "hmc_check" in row:
            check = row["hmc_check"]
            assert abs(check["value"] - row["value"]) < 4 * check["sem"], name


def test_missing_answer_is_told():
    with pytest.raises(KeyError, match="bench.truth.reference nothing"):
        load_reference("nothing")


@pytest.mark.parametrize("passes", [3, 20, 60])
def test_a_budget_that_pays_for_no_fit_has_an_error_that_covers(passes):
    """Walkers from the localizer begin far too wide for a network, and cannot come in so soon."""
    problem = PROBLEMS["digits_16_g1"]()
    result = problem.estimate(0, budget=passes * problem.n_data)
    assert not result.has_fit
    assert result.work.total_fge <= passes
    assert any(finding.name == "stiff" for finding in result.health)
    assert abs(result.llc - load_reference("digits_16_g1")["value"]) < 4 * result.llc_sem
