import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import quick_jit
from jax.scipy.special import logsumexp

from fastvi.families.base import TargetValues, num_groups
from fastvi.families.mfa import FACTOR_INIT, LOG_SCALE_BOUND, MFA, MFAParams
from fastvi.fitting.optimizer import scale
from tests.support.mixtures import MEANS, assert_tree_close, dense, make

pytestmark = pytest.mark.usefixtures("x64")


dense_program = quick_jit(dense)


def dense_log_prob(family, params, point):
    parts = [
        np.log(weight) + scipy.stats.multivariate_normal(mean, covariance).logpdf(point)
        for weight, mean, covariance in zip(
            *map(np.asarray, dense_program(family, params)), strict=True
        )
    ]
    return scipy.special.logsumexp(parts), scipy.special.softmax(parts)


@quick_jit
def moments(family, params):
    """Mean and covariance of q."""
    weights, means, covariances = dense(family, params)
    mean = weights @ means
    second = jnp.einsum("m,mij->ij", weights, covariances) + jnp.einsum(
        "m,mi,mj->ij", weights, means, means
    )
    return mean, second - jnp.outer(mean, mean)


def z_scores(samples, expected):
    """Deviations of the mean of independent rows in units of its standard error.

    Constants must agree.
    """
    samples = np.asarray(samples).reshape(len(samples), -1)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    gap = samples.mean(axis=0) - np.ravel(expected)
    fixed = error <= 1e-12 * np.maximum(1.0, np.abs(np.ravel(expected)))
    assert np.all(np.abs(gap[fixed]) <= 1e-9), gap[fixed]
    return gap[~fixed] / error[~fixed]


# The density and the draws. One program for each family and number of draws, whatever the test.


@functools.partial(quick_jit, static_argnames=("num", "antithetic"))
def sample(family, params, key, num, *, antithetic):
    return family.sample(params, key, num, antithetic=antithetic)


@functools.partial(quick_jit, static_argnames=("num", "antithetic"))
def random_pull(family, params, num, baseline=0.0, *, antithetic):
    """Draws and the gradient of an arbitrary target at them."""
    draws = family.sample(params, jax.random.key(0), num, antithetic=antithetic)
    target = TargetValues(
        jnp.sin(1 + jnp.arange(num) * 1.0), jnp.cos(draws.displacement * 3), baseline
    )
    return draws, family.pullback(params, draws, target, groups=num_groups(num, antithetic))


@functools.partial(quick_jit, static_argnames="groups")
def pullback(family, params, draws, value, grad, *, groups):
    return family.pullback(params, draws, TargetValues(value, grad), groups=groups)


@quick_jit
def log_prob_and_grad(family, params, points):
    return jax.vmap(jax.value_and_grad(lambda v: family.log_prob(params, v)))(points)


@pytest.mark.parametrize("means", MEANS)
def test_log_prob_is_the_density_of_a_normal_mixture(means):
    family, params = make(means, core_mask=(1, 0, 1), temperature=1.7)
    points = np.random.default_rng(1).normal(size=(4, 5))
    actual, _ = log_prob_and_grad(family, params, points)
    expected = [dense_log_prob(family, params, point)[0] for point in points]
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


@pytest.mark.parametrize("means", MEANS)
def test_density_integrates_to_one(means):
    family, params = make(means, dim=2, ranks=(1, 2), num_core=1)
    mean, covariance = moments(family, params)
    half = 12 * np.sqrt(np.diag(covariance))
    axes = [np.linspace(m - h, m + h, 501) for m, h in zip(mean, half, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(quick_jit(jax.vmap(lambda v: family.log_prob(params, v)))(grid))
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    np.testing.assert_allclose(density.sum() * cell, 1.0, rtol=1e-8)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("means", MEANS)
def test_draws_know_their_density_and_its_gradient(means, antithetic):
    family, params = make(means, ranks=(2, 1, 0), core_mask=(1, 1, 0))
    draws = sample(family, params, jax.random.key(3), 4, antithetic=antithetic)
    value, score = log_prob_and_grad(family, params, draws.displacement)
    np.testing.assert_allclose(draws.log_prob, value, rtol=1e-11)
    # the score is with respect to u = v / scale
    np.testing.assert_allclose(
        draws.record.drawn.score, family.scale * score, rtol=1e-9, atol=1e-10
    )
    for point, share in zip(draws.displacement, draws.record.drawn.responsibilities, strict=True):
        np.testing.assert_allclose(
            share, dense_log_prob(family, params, np.asarray(point))[1], atol=1e-11
        )


@pytest.mark.parametrize(
    ("means", "num_draws"), [("shared", 4), ("center", 4), ("component", 4), ("component", 12)]
)
def test_antithetic_draws_mirror_about_their_mean(means, num_draws):
    family, params = make(means)
    draws = sample(family, params, jax.random.key(5), num_draws, antithetic=True)
    first, second = np.split(np.asarray(draws.displacement), 2)
    labels = np.asarray(draws.record.noise.label)
    np.testing.assert_array_equal(labels[: num_draws // 2], labels[num_draws // 2 :])
    _, centers, _ = dense_program(family, params)
    np.testing.assert_allclose(
        0.5 * (first + second), np.asarray(centers)[labels[: num_draws // 2]], atol=1e-12
    )
    assert np.min(np.abs(first - second)) > 1e-6


def test_an_odd_number_of_draws_is_not_paired():
    family, params = make("component")
    odd = sample(family, params, jax.random.key(5), 3, antithetic=True)
    plain = sample(family, params, jax.random.key(5), 3, antithetic=False)
    np.testing.assert_array_equal(odd.displacement, plain.displacement)


@pytest.mark.parametrize(
    ("means", "antithetic"),
    [("shared", False), ("center", False), ("component", False), ("component", True)],
)
def test_draws_have_the_mean_and_covariance_of_q(means, antithetic):
    family, params = make(means, dim=3, ranks=(2, 1), num_core=2)
    num = 20_000
    draws = sample(family, params, jax.random.key(0), num, antithetic=antithetic)
    mean, covariance = map(np.asarray, moments(family, params))
    centred = np.asarray(draws.displacement) - mean
    products = centred[:, :, None] * centred[:, None, :]
    if antithetic:
        centred, products = (
            0.5 * (half[: num // 2] + half[num // 2 :]) for half in (centred, products)
        )
    assert np.max(np.abs(z_scores(products, covariance)), initial=0) < 4.5
    assert np.max(np.abs(z_scores(centred, np.zeros(3))), initial=0) < 4.5
    weights, _, _ = dense_program(family, params)
    share = np.mean(np.asarray(draws.record.noise.label) == 0)
    assert abs(share - weights[0]) < 4.5 * np.sqrt(0.25 / (num / (1 + antithetic)))


# Moments and control variates.


@pytest.mark.parametrize("means", MEANS)
def test_second_moment_is_dense(means):
    family, params = make(means, core_mask=(1, 0, 1), temperature=0.6)
    moment = quick_jit(MFA.second_moment)(family, params)
    actual = np.diag(moment.diagonal) + moment.factors.T @ (
        moment.weights[:, None] * moment.factors
    )
    mean, covariance = moments(family, params)
    np.testing.assert_allclose(actual, covariance + np.outer(mean, mean), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("means", MEANS)
def test_control_variates_have_their_expectations(means):
    family, params = make(means, core_mask=(1, 0, 1), temperature=0.6)
    draws = sample(family, params, jax.random.key(0), 6, antithetic=True)
    values, expected = quick_jit(MFA.control_variates)(family, params, draws)
    mean, covariance = map(np.asarray, moments(family, params))
    whitener = np.diag(1 / (np.asarray(family.scale) * np.exp(params.log_scale)))
    rows = np.asarray(params.core) * np.asarray(family.core_mask)[:, None] @ whitener
    metrics = [whitener @ whitener, rows.T @ rows]
    about_center = 0.5 * np.trace(covariance + np.outer(mean, mean))
    traces = [0.5 * np.trace(metric @ covariance) for metric in metrics]
    np.testing.assert_allclose(expected, [*traces, about_center], rtol=1e-11)
    centred = np.asarray(draws.displacement) - mean
    forms = [0.5 * np.einsum("ni,ij,nj->n", centred, metric, centred) for metric in metrics]
    forms.append(0.5 * np.sum(np.asarray(draws.displacement) ** 2, -1))
    np.testing.assert_allclose(values, np.stack(forms, -1), rtol=1e-10)


# Masks, temperature, the start.


@pytest.mark.parametrize("means", MEANS)
def test_a_rank_mask_is_zero_columns(means):
    family, params = make(means, ranks=(1, 3, 0))
    wide = dataclasses.replace(family, ranks=(3, 3, 3))
    mask = np.arange(3) < np.array([1, 3, 0])[:, None]
    zeroed = params._replace(factors=params.factors * mask[..., None])
    points = np.linspace(-1.0, 1.0, 5)[None]
    narrow_value, wide_value = (
        log_prob_and_grad(*pair, points)[0] for pair in ((family, params), (wide, zeroed))
    )
    np.testing.assert_allclose(narrow_value, wide_value, rtol=1e-13)
    _, narrow_gradient = random_pull(family, params, 4, antithetic=False)
    _, wide_gradient = random_pull(wide, zeroed, 4, antithetic=False)
    masked = wide_gradient._replace(factors=wide_gradient.factors * mask[..., None])
    assert_tree_close(narrow_gradient, masked, 1e-12)
    assert np.any(wide_gradient.factors != masked.factors)


@pytest.mark.parametrize("means", MEANS)
def test_padding_the_core_changes_nothing(means):
    padded, params = make(means, num_core=4, core_mask=(1, 1, 0, 0))
    family = eqx.tree_at(lambda f: f.core_mask, padded, jnp.ones(2))
    short = params._replace(core=params.core[:2])
    actual, gradient = random_pull(padded, params, 4, antithetic=True)
    expected, wanted = random_pull(family, short, 4, antithetic=True)
    np.testing.assert_allclose(actual.displacement, expected.displacement, rtol=1e-12)
    np.testing.assert_allclose(actual.log_prob, expected.log_prob, rtol=1e-12)
    assert np.all(gradient.core[2:] == 0)
    assert_tree_close(gradient._replace(core=gradient.core[:2]), wanted, 1e-11)


def test_temperature_is_the_same_everywhere():
    options = {"dirichlet": 1.5, "entropy_bonus": 0.2}
    hot, params = make("component", temperature=2.5, **options)
    unit, _ = make("component", **options)
    cooled = params._replace(logits=params.logits / 2.5)
    draws, gradient = random_pull(hot, params, 6, 0.3, antithetic=True)
    expected, wanted = random_pull(unit, cooled, 6, 0.3, antithetic=True)
    assert_tree_close(draws, expected, 1e-13)
    assert_tree_close(gradient, wanted._replace(logits=wanted.logits / 2.5), 1e-12)
    statistics = quick_jit(MFA.step_statistics)
    assert_tree_close(statistics(hot, params, draws), statistics(unit, cooled, expected), 1e-12)
    np.testing.assert_allclose(
        hot.summary_arrays(params)["pi"], dense_program(hot, params)[0], rtol=1e-12
    )


def test_factors_start_shaped_like_the_core_s_covariance():
    dim, num = 4, 4000
    family, params = make(dim=dim, ranks=(num,), num_core=2)
    start = quick_jit(MFA.init)(family, jax.random.key(0), params.core, params.log_scale)
    assert np.all(start.logits == 0)
    assert np.all(start.offsets == 0)
    rows = np.asarray(start.factors[0]) * np.sqrt(dim) / FACTOR_INIT
    inner = np.linalg.inv(np.eye(dim) + params.core.T @ params.core)
    assert np.max(np.abs(z_scores(rows[:, :, None] * rows[:, None, :], inner))) < 4.5


# The gradient.


def target(v):
    """A smooth log density that is not quadratic."""
    return -jnp.sum(jnp.log(jnp.cosh(v - 0.3))) - 0.1 * jnp.sum(v) * v[0] ** 2 + 0.2 * v[0] * v[-1]


targets = quick_jit(jax.vmap(jax.value_and_grad(target)))


def reparametrised(family, params, noise):
    """The sampling map of docs/math.md by dense algebra, for one draw."""
    core = params.core * family.core_mask[:, None]
    columns = (np.arange(max(family.ranks)) < np.asarray(family.ranks)[:, None]).astype(float)
    factor = (params.factors * columns[..., None])[noise.label]
    y = noise.eps + core.T @ noise.zeta
    x = jnp.linalg.solve(jnp.eye(family.scale.size) + core.T @ core, y) + factor.T @ noise.z
    offset = {"center": 0.0, "shared": params.offsets.sum(0)}.get(family.means)
    offset = params.offsets[noise.label] if offset is None else offset
    return family.scale * (offset + jnp.exp(params.log_scale) * x)


def test_scale_gradient_stops_at_the_bound():
    family, params = make("component")
    log_scale = np.array(params.log_scale)
    log_scale[1] = LOG_SCALE_BOUND + 1
    params = params._replace(log_scale=jnp.asarray(log_scale))
    _, gradient = random_pull(family, params, 2, 0.0, antithetic=False)
    assert gradient.log_scale[1] == 0
    assert np.all(np.delete(gradient.log_scale, 1) != 0)


@pytest.mark.parametrize(
    ("means", "num_draws", "antithetic"),
    [
        ("shared", 1, True),
        ("shared", 4, True),
        ("center", 3, False),
        ("component", 3, False),
        ("component", 4, True),
    ],
)
def test_pullback_is_the_gradient_along_the_path(means, num_draws, antithetic):
    family, params = make(means, core_mask=(1, 0, 1), entropy_bonus=0.3)
    draws = sample(family, params, jax.random.key(2), num_draws, antithetic=antithetic)

    def objective(params, frozen):
        """Sticking the landing: the parameters inside log q are held."""

        def one(noise):
            v = reparametrised(family, params, noise)
            return target(v) - 1.3 * family.log_prob(frozen, v), v

        values, points = jax.vmap(one)(draws.record.noise)
        return jnp.mean(values), points

    expected, points = quick_jit(jax.grad(objective, has_aux=True))(params, params)
    np.testing.assert_allclose(draws.displacement, points, rtol=1e-11)
    groups = num_groups(num_draws, antithetic)
    actual = pullback(family, params, draws, *targets(draws.displacement), groups=groups)
    assert_tree_close(actual._replace(logits=expected.logits), expected, 1e-8)


def gaussian_elbo(family, params, hessian, pull, nats):
    """E_q[-v.Hv/2 + b.v] + nats times the entropy, for one component."""
    _, (mean,), (covariance,) = dense(family, params)
    like = -0.5 * (jnp.trace(hessian @ covariance) + mean @ hessian @ mean) + pull @ mean
    return like + nats * 0.5 * jnp.linalg.slogdet(covariance)[1]


@pytest.mark.parametrize("antithetic", [False, True])
def test_pullback_is_unbiased_on_a_quadratic(antithetic):
    family, params = make(dim=3, ranks=(2,), num_core=2, entropy_bonus=0.4)
    root = jnp.asarray(np.random.default_rng(4).normal(size=(3, 3)))
    hessian, pull = root @ root.T + jnp.eye(3), jnp.asarray([0.5, -1.0, 2.0])
    exact = quick_jit(jax.grad(lambda p: gaussian_elbo(family, p, hessian, pull, 1.4)))(params)

    def one(key):
        draws = family.sample(params, key, 2, antithetic=antithetic)
        points = draws.displacement
        value = -0.5 * jnp.sum(points * (points @ hessian), -1) + points @ pull
        target = TargetValues(value, pull - points @ hessian)
        return family.pullback(params, draws, target, groups=num_groups(2, antithetic))

    samples = quick_jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20_000))
    for name in ("offsets", "log_scale", "core", "factors"):
        got, want = np.asarray(getattr(samples, name)), np.asarray(getattr(exact, name))
        assert np.max(np.abs(z_scores(got, want)), initial=0) < 4.5, name
        error = got.reshape(len(got), -1).std(axis=0) / np.sqrt(len(got))
        assert np.max(np.abs(want.ravel()) / np.maximum(error, 1e-12)) > 20, (
            f"{name}: the test has no power"
        )


@functools.cache
def natural_updates(means):
    family, params = make(means, ranks=(2, 1, 2))

    @quick_jit
    def updates(family, params):
        draws = family.sample(params, jax.random.key(2), 4, antithetic=True)
        value, grad = jax.vmap(jax.value_and_grad(target))(draws.displacement)
        values = TargetValues(value, grad)
        return (
            family.pullback(params, draws, values, groups=2),
            family.ascent(params, draws, values, groups=2),
        )

    return family, params, *updates(family, params)


@quick_jit
def apply_updates(family, params, updates):
    return family.apply_updates(params, family.make_cache(params), updates)


@pytest.mark.parametrize("means", ["shared", "component"])
def test_ascent_is_a_metric_times_the_gradient(means):
    family, params, euclidean, updates = natural_updates(means)

    def moved(step):
        return family.apply_updates(params, family.make_cache(params), scale(updates, step))[0]

    assert_tree_close(quick_jit(moved)(0.0), params, 1e-15)
    direction = quick_jit(lambda step: jax.jvp(moved, (step,), (1.0,))[1])(0.0)
    euclidean = jax.tree_util.tree_map(np.asarray, euclidean)
    core, deviation = np.asarray(params.core), np.exp(params.log_scale)
    precision = np.eye(5) + core.T @ core
    log_scale = euclidean.log_scale + np.sum(core * euclidean.core, axis=0)
    expected = MFAParams(
        logits=euclidean.logits,
        # updates of offsets are in units of D^{1/2}: D^{1/2} P^{-1} D^{1/2} h
        offsets=(euclidean.offsets * deviation) @ np.linalg.inv(precision) * deviation,
        log_scale=log_scale,
        core=euclidean.core @ precision + core * log_scale,
        # averaged over the draws of each label, two of the four here
        factors=2 * euclidean.factors @ np.linalg.inv(precision),
    )
    assert_tree_close(direction, expected, 1e-10)
    slope = sum(np.vdot(g, d) for g, d in zip(euclidean, direction, strict=True))
    assert slope > 0


def test_a_change_of_scale_leaves_the_steep_directions():
    family, params, _, updates = natural_updates("shared")
    still = updates._replace(core=jnp.zeros_like(params.core))
    after, _ = apply_updates(family, params, still)
    assert np.min(np.abs(after.log_scale - params.log_scale)) > 1e-3
    steep, before = (np.asarray(p.core) * np.exp(-np.asarray(p.log_scale)) for p in (after, params))
    np.testing.assert_allclose(steep, before, rtol=1e-12)


@pytest.mark.parametrize("means", MEANS)
def test_the_cache_follows_the_parameters(means):
    family, params, _, updates = natural_updates(means)

    @quick_jit
    def both(family, params, updates):
        after, cache = family.apply_updates(params, family.make_cache(params), updates)
        noise = family.draw_noise(jax.random.key(0), 2)
        plain, cached = (
            family.transform(after, noise, mirror=True, cache=c) for c in (None, cache)
        )
        return (cache, cached), (family.make_cache(after), plain)

    (cache, cached), (fresh, plain) = both(family, params, updates)
    assert_tree_close(cache, fresh, 1e-12)
    assert_tree_close(cached, plain, 1e-11)


# The gradient of the weights.


@functools.cache
def logit_problem(means):
    """A family in one dimension and, by quadrature, d/d logits of E_q[target - 1.3 log q]."""
    family, params = make(
        means, dim=1, ranks=(1, 2, 0), num_core=1, temperature=1.6, entropy_bonus=0.3
    )
    params = params._replace(offsets=2 * params.offsets)
    _, centers, covariances = dense_program(family, params)

    @jax.grad
    def gradient(logits):
        grid = jnp.linspace(-1.0, 1.0, 20_001) * (
            10 * jnp.sqrt(jnp.max(covariances)) + jnp.max(jnp.abs(centers))
        )
        value = jax.vmap(lambda point: target(point[None]))(grid)
        residual = (grid[:, None] - centers[:, 0]) / jnp.sqrt(covariances[:, 0, 0])
        parts = (
            jax.nn.log_softmax(logits / 1.6)
            - 0.5 * residual**2
            - 0.5 * jnp.log(2 * jnp.pi * covariances[:, 0, 0])
        )
        log_q = logsumexp(parts, axis=1)
        return jnp.sum(jnp.exp(log_q) * (value - 1.3 * log_q)) * (grid[1] - grid[0])

    return family, params, np.asarray(quick_jit(gradient)(params.logits))


@pytest.mark.parametrize(
    ("means", "num_draws", "antithetic"),
    [
        ("shared", 1, False),
        ("shared", 4, True),
        ("component", 1, False),
        ("component", 2, False),
        ("component", 2, True),
        ("component", 4, False),
        ("component", 4, True),
    ],
)
def test_logit_gradient_is_unbiased(means, num_draws, antithetic):
    family, params, exact = logit_problem(means)

    def one(key):
        draws = family.sample(params, key, num_draws, antithetic=antithetic)
        value, grad = jax.vmap(jax.value_and_grad(target))(draws.displacement)
        values, groups = TargetValues(value, grad, -0.7), num_groups(num_draws, antithetic)
        return family.pullback(params, draws, values, groups=groups).logits

    samples = np.asarray(quick_jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20_000)))
    assert np.max(np.abs(z_scores(samples, exact))) < 4
    assert np.max(np.abs(exact) / samples.std(axis=0)) * np.sqrt(len(samples)) > 20


def test_independent_draws_replace_the_baseline():
    """With two groups or more the value that is passed in has no influence.

    With one it is subtracted.
    """
    family, params = make("component")

    def logits(num_draws, antithetic, baseline):
        return np.asarray(
            random_pull(family, params, num_draws, baseline, antithetic=antithetic)[1].logits
        )

    np.testing.assert_array_equal(logits(4, True, 0.0), logits(4, True, 9.0))
    np.testing.assert_array_equal(logits(2, False, 0.0), logits(2, False, 9.0))
    share = random_pull(family, params, 2, 0.0, antithetic=True)[0].record.drawn.responsibilities
    expected = -9.0 * np.mean(
        np.asarray(share) - np.asarray(dense_program(family, params)[0]), axis=0
    )
    np.testing.assert_allclose(logits(2, True, 9.0) - logits(2, True, 0.0), expected, atol=1e-12)


def test_dirichlet_prior_is_its_log_density_s_gradient():
    family, params = make(temperature=1.6, dirichlet=2.5, entropy_bonus=0.3)
    draws = sample(family, params, jax.random.key(0), 3, antithetic=False)
    # values that are all equal leave the prior alone
    value = 1.3 * draws.log_prob + 5.0
    actual = pullback(family, params, draws, value, draws.displacement, groups=3).logits
    expected = quick_jit(jax.grad(lambda logits: 1.5 * jnp.sum(jax.nn.log_softmax(logits / 1.6))))(
        params.logits
    )
    np.testing.assert_allclose(actual, expected, atol=1e-12)
