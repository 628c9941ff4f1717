"""Every family of the registry, and a toy one, under the laws of `fastvi.families.base`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

from fastvi.families import FAMILIES
from fastvi.families.backends.base import Architecture
from fastvi.families.base import Geometry, TargetValues
from tests.support.toy_family import DiagonalNormal

pytestmark = pytest.mark.usefixtures("x64")
EVERY = {**FAMILIES, "toy": DiagonalNormal}
SETTINGS = {
    "mfa": {"M": 3, "r": 2, "means": "component", "entropy_bonus": 0.25},
    "flow": {
        "d_latent": 1,
        "entropy_bonus": 0.25,
        "flow": Architecture(depth=2, hidden=(4,), init_scale=1.0),
    },
    "toy": {"entropy_bonus": 0.25},
}
DIM, GROUPS, MANY = 2, 2, 40_000


def jittered(tree, scale):
    """Move parameters away from the start."""
    rng = np.random.default_rng(3)
    return jax.tree_util.tree_map(
        lambda leaf: jnp.asarray(np.asarray(leaf) + scale * rng.normal(size=leaf.shape)), tree
    )


@functools.cache
def member(name):
    """Return a family and parameters that are not its start's."""
    family_class = EVERY[name]

    @quick_jit
    def created():
        geometry = Geometry(
            scale=jnp.asarray([0.7, 1.3]),
            core=jnp.asarray([[1.0, -0.5]]),
            rank=jnp.asarray(1),
            unit=jnp.asarray(0.8),
            noise_size=2,
        )
        family = family_class.create(family_class.Settings(**SETTINGS[name]), geometry)
        return family, family.init(jax.random.key(0), geometry.core, jnp.zeros(DIM))

    family, start = created()
    return family, jittered(start, 0.15)


@functools.cache
def draws_of(name, num, *, antithetic):
    family, params = member(name)
    return quick_jit(lambda p, k: family.sample(p, k, num, antithetic=antithetic))(
        params, jax.random.key(1)
    )


@functools.cache
def log_prob_and_score(name):
    family, params = member(name)
    return quick_jit(jax.vmap(jax.value_and_grad(lambda v: family.log_prob(params, v))))


def log_density(v):
    return -0.5 * jnp.sum(v**2) - 0.1 * jnp.sum(v**4) + jnp.sin(v[0] * v[1])


def target_at(draws):
    value, gradient = jax.vmap(jax.value_and_grad(log_density))(draws.displacement)
    return TargetValues(value, gradient)


@functools.cache
def quadrature(name):
    """Return points, the density of q there, and the area of a cell."""
    family, params = member(name)
    axis = np.linspace(-12, 12, 361)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, DIM))
    log_q = quick_jit(jax.vmap(lambda v: family.log_prob(params, v)))(grid)
    return grid, np.exp(log_q), (axis[1] - axis[0]) ** 2


def moment_error(name):
    """Four standard errors of a second moment, of families that know theirs by draws alone."""
    return 4 * np.sqrt(2 / 4096) if name == "flow" else 1e-6


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("antithetic", [False, True])
def test_draws_know_their_density_and_its_gradient(name, antithetic):
    draws = draws_of(name, 4, antithetic=antithetic)
    value, score = log_prob_and_score(name)(draws.displacement)
    np.testing.assert_allclose(draws.log_prob, value, rtol=1e-8)
    np.testing.assert_allclose(draws.score, score, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_density_integrates_to_one(name):
    _, density, cell = quadrature(name)
    np.testing.assert_allclose(density.sum() * cell, 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_draws_and_moments_are_those_of_the_density(name):
    family, params = member(name)
    grid, density, cell = quadrature(name)
    grid = np.asarray(grid)
    mean = cell * density @ grid
    second = cell * np.einsum("n,ni,nj->ij", density, grid, grid)
    points = np.asarray(draws_of(name, MANY, antithetic=False).displacement)
    for drawn, exact in ((points, mean), (points[:, :, None] * points[:, None, :], second)):
        error = drawn.std(axis=0) / np.sqrt(MANY)
        np.testing.assert_array_less(np.abs(drawn.mean(axis=0) - exact), 4.5 * error)
    moment = quick_jit(lambda p: family.second_moment(p))(params)
    assert moment.factors.shape[0] == family.num_moment_terms
    count = max(len(moment.coefficients), 1)
    inner = np.diag(moment.weights) + moment.coefficients.T @ moment.coefficients / count
    found = np.diag(moment.diagonal) + moment.factors.T @ inner @ moment.factors
    bound = moment_error(name) * np.max(np.abs(second))
    np.testing.assert_allclose(found, second, atol=bound)
    np.testing.assert_allclose(moment.marginal(), np.diagonal(found), rtol=1e-10)
    linear = quick_jit(lambda p: family.linear_map(p))(params)
    np.testing.assert_allclose(linear.center, mean, atol=bound)


@pytest.mark.parametrize("name", EVERY)
def test_linear_map_is_invertible_and_pulls_gradients_back(name):
    family, params = member(name)
    x, gradient = jnp.asarray([0.4, -1.1]), jnp.asarray([2.0, 0.3])

    @quick_jit
    def there_and_back(params):
        linear = family.linear_map(params)
        v, pull = jax.vjp(linear.displacement, x)
        return linear.round(v), linear.pull_back(gradient), pull(gradient)[0]

    back, pulled, expected = there_and_back(params)
    np.testing.assert_allclose(back, x, rtol=1e-9)
    np.testing.assert_allclose(pulled, expected, rtol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_control_variates_have_their_expectations(name):
    family, params = member(name)
    draws = draws_of(name, MANY, antithetic=False)
    values, expected = quick_jit(lambda *given: family.control_variates(*given))(params, draws)
    error = np.std(values, axis=0) / np.sqrt(MANY)
    assert np.all(error > 0)
    np.testing.assert_array_less(np.abs(np.mean(values, axis=0) - expected), 4.5 * error)


@pytest.mark.parametrize("name", EVERY)
def test_pullback_is_an_unbiased_gradient_of_the_objective(name):
    """E_q[ell - (1 + bonus) log q] rises along its gradient as quadrature says."""
    family, params = member(name)
    grid, _, cell = quadrature(name)

    @quick_jit
    @jax.grad
    def exact_gradient(params):
        log_q = jax.vmap(lambda v: family.log_prob(params, v))(grid)
        value = jax.vmap(log_density)(grid) - family.entropy_weight * log_q
        return cell * jnp.sum(jnp.exp(log_q) * value)

    direction = exact_gradient(params)
    exact = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree_util.tree_leaves(direction))

    @quick_jit
    def estimates(keys):
        def one(key):
            draws = family.sample(params, key, 2 * GROUPS, antithetic=True)
            gradient = family.pullback(params, draws, target_at(draws), groups=GROUPS)
            products = jax.tree_util.tree_map(jnp.vdot, gradient, direction)
            return sum(jax.tree_util.tree_leaves(products))

        return jax.lax.map(one, keys, batch_size=500)

    found = np.asarray(estimates(jax.random.split(jax.random.key(2), 10_000)))
    error = found.std() / np.sqrt(len(found))
    assert abs(found.mean() - exact) < 4.5 * error
    assert abs(exact) > 10 * error, "the test has no power"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_rules_and_updates_fit_the_parameters(name, groups):
    """A small step along the ascent climbs; none changes nothing; the cache is that of the sum."""
    from fastvi.fitting.optimizer import scale

    family, params = member(name)
    rules = family.update_rules(params, groups)
    structure = jax.tree_util.tree_structure(params)
    for rule in rules:
        assert jax.tree_util.tree_structure(rule) == structure

    @quick_jit
    def moved(step):
        draws = family.sample(params, jax.random.key(4), 2 * groups, antithetic=True)
        ascent = family.ascent(params, draws, target_at(draws), groups=groups)
        after, cache = family.apply_updates(params, family.make_cache(params), scale(ascent, step))
        noise = family.draw_noise(jax.random.key(5), 3)
        kept, fresh = (
            family.transform(after, noise, mirror=False, cache=c).log_prob for c in (cache, None)
        )
        gradient = family.pullback(params, draws, target_at(draws), groups=groups)
        return after, kept, fresh, gradient

    still, *_ = moved(0.0)
    for got, want in zip(*map(jax.tree_util.tree_leaves, (still, params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    _, kept, fresh, gradient = moved(0.1)
    np.testing.assert_allclose(kept, fresh, rtol=1e-10)
    assert jax.tree_util.tree_structure(gradient) == structure


@pytest.mark.parametrize("name", EVERY)
def test_widening_scales_the_start_about_the_center(name):
    family, _ = member(name)

    @quick_jit
    def displacements():
        start = family.init(jax.random.key(0), jnp.asarray([[1.0, -0.5]]), jnp.zeros(DIM))
        noise = family.draw_noise(jax.random.key(6), 3)
        return [
            family.transform(params, noise, mirror=False).displacement
            for params in (start, family.widened(start, jnp.log(3.0)))
        ]

    before, after = displacements()
    np.testing.assert_allclose(after, 3 * before, rtol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_what_a_loop_asks_of_a_family(name):
    """Annealing sets the bonus, the component that pruning leaves has all weight, traces agree."""
    family, params = member(name)
    draws = draws_of(name, 4, antithetic=True)

    @quick_jit
    def asked(params, draws):
        weights = family.log_weights(params)
        keep = jnp.arange(len(weights)) == 0
        traced = {**family.step_statistics(params, draws), **family.slow_statistics(params)}
        return (
            family.annealed(jnp.asarray(1.5), jnp.asarray(0.75)).entropy_weight,
            jnp.exp(weights),
            keep,
            jnp.exp(family.log_weights(family.pruned(params, keep))),
            family.resp_entropy(draws),
            traced,
            family.summary_arrays(params)["pi"],
        )

    entropy_weight, weights, keep, left, entropy, traced, summary = asked(params, draws)
    np.testing.assert_allclose(entropy_weight, 1.75)
    np.testing.assert_allclose(np.sum(weights), 1.0, rtol=1e-12)
    np.testing.assert_allclose(left, np.asarray(keep, float), atol=1e-12)
    assert draws.log_prob.shape == entropy.shape
    assert {"resp_entropy", "pi_min", "pi_max", "pi_entropy", "D_sqrt_med"} <= traced.keys()
    assert all(np.shape(value) == () and np.isfinite(value) for value in traced.values())
    np.testing.assert_allclose(traced["pi_max"], np.max(weights), rtol=1e-12)
    np.testing.assert_allclose(summary, weights, rtol=1e-12)
