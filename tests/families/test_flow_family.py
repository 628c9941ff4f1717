"""The flow family's laws.

Against autodiff of its sampling map, dense linear algebra, quadrature and many draws.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64, quick_jit
from jax.scipy.stats import norm

from fastvi.config import FlowConfig, VIConfig
from fastvi.families import Flow, FlowParams
from fastvi.families.base import Geometry, TargetValues
from fastvi.families.flow import MOMENT_DRAWS
from fastvi.families.lift import LiftParams, core_root, make_frame

pytestmark = pytest.mark.usefixtures("x64")
MOMENT_ERROR = 4 * np.sqrt(
    2 / MOMENT_DRAWS
)  # four standard errors of a variance from the family's own draws
SMALL = FlowConfig(depth=2, hidden=(4,), init_scale=1.0)
# dimension, rows of core, options: the flow on some directions, on all, on a subspace with
# isotropic noise
CASES = {
    "core": (5, 3, {"d_latent": 2, "sigma_perp": 0.7}),
    "whole": (3, 2, {}),
    "injective": (5, 3, {"d_latent": 2, "lift": "injective", "sigma_perp": 0.3}),
    "random": (
        5,
        1,
        {"d_latent": 2, "latent_basis": "random", "means": "center", "learn_sigma_perp": False},
    ),
}


def make(case, seed=0):
    """A family with a nontrivial scale and parameters of order one."""
    dim, rank, options = CASES[case]
    rng = np.random.default_rng(seed)
    config = VIConfig.create({"family": "flow", "flow": SMALL, "entropy_bonus": 0.25} | options)
    core = rng.normal(size=(rank, dim))
    scale = np.exp(0.5 * rng.normal(size=dim))
    family, start = create(config, scale, core, unit=0.8, seed=seed)
    frame = family.lift.frame.shape[0]
    lift = LiftParams(
        jnp.asarray(0.5 * rng.normal(size=start.lift.offsets.shape)),
        start.lift.log_sigma,
        jnp.asarray(start.lift.root + 0.2 * np.tril(rng.normal(size=(frame, frame)), -1)),
    )
    return family, FlowParams(lift, start.flow)


def create(config, scale, core, unit=1.0, seed=0):
    """A family and its start, by one program."""
    rank, dim = core.shape

    @quick_jit
    def created(scale, core, unit):
        geometry = Geometry(scale, core, jnp.asarray(rank), unit, rank)
        family = Flow.create(config.family_settings, geometry)
        return family, family.init(jax.random.key(seed), core, jnp.zeros(dim))

    return created(scale, core, jnp.asarray(unit))


def displacement_of(family, params, noise):
    return family.transform(params, noise[None], mirror=False).displacement[0]


def dense_log_prob(family, params, noise):
    jacobian = jax.jacrev(lambda x: displacement_of(family, params, x))(noise)
    return jnp.sum(norm.logpdf(noise)) - jnp.linalg.slogdet(jacobian)[1]


@pytest.mark.parametrize("case", ["core", "whole"])
def test_draws_know_their_density_and_its_gradient(case):
    family, params = make(case)
    noise = np.random.default_rng(1).normal(size=(3, family.scale.size))
    draws = quick_jit(lambda n: family.transform(params, n, mirror=True))(noise)
    every = np.concatenate([noise, -noise])
    dense = quick_jit(jax.vmap(lambda x: dense_log_prob(family, params, x)))(every)
    np.testing.assert_allclose(draws.log_prob, dense, rtol=1e-8)
    value, score = quick_jit(jax.vmap(jax.value_and_grad(lambda v: family.log_prob(params, v))))(
        draws.displacement
    )
    np.testing.assert_allclose(draws.log_prob, value, rtol=1e-7)
    np.testing.assert_allclose(draws.score, score, rtol=1e-5, atol=1e-6)


def test_density_integrates_to_one():
    config = VIConfig(family="flow", d_latent=1, flow=SMALL, sigma_perp=0.5)
    family, params = create(config, np.array([0.7, 1.3]), np.array([[1.0, 2.0]]))
    axis = np.linspace(-9, 9, 901)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2))
    density = np.exp(quick_jit(jax.vmap(lambda v: family.log_prob(params, v)))(grid))
    np.testing.assert_allclose(density.sum() * (axis[1] - axis[0]) ** 2, 1.0, rtol=1e-6)


def log_density(v):
    return -0.5 * jnp.sum(v**2) - 0.1 * jnp.sum(v**4) + jnp.sin(v[0] * v[1])


def pulled(family, params, noise, method):
    draws = family.transform(params, noise, mirror=True)
    value, grad = jax.vmap(jax.value_and_grad(log_density))(draws.displacement)
    return getattr(family, method)(params, draws, TargetValues(value, grad), groups=len(noise))


@pytest.mark.parametrize("case", ["core", "injective"])
def test_pullback_is_the_gradient_with_the_density_held_fixed(case):
    family, params = make(case)
    noise = jnp.asarray(np.random.default_rng(2).normal(size=(2, family.scale.size)))

    def objective(moving):
        draws = family.transform(moving, noise, mirror=True).displacement
        log_q = jax.vmap(lambda v: family.log_prob(params, v))(draws)
        return jnp.mean(jax.vmap(log_density)(draws) - 1.25 * log_q)

    expected = quick_jit(jax.grad(objective))(params)
    actual = quick_jit(lambda p: pulled(family, p, noise, "pullback"))(params)
    for got, want in zip(
        jax.tree_util.tree_leaves(actual), jax.tree_util.tree_leaves(expected), strict=True
    ):
        want = np.tril(want) if want.shape == params.lift.root.shape else want
        np.testing.assert_allclose(
            got, want, rtol=1e-5, atol=1e-6 * np.max(np.abs(want), initial=1.0)
        )


@pytest.mark.parametrize("case", ["core", "whole", "random"])
def test_ascent_climbs_with_every_parameter(case):
    family, params = make(case)
    noise = jnp.asarray(np.random.default_rng(3).normal(size=(2, family.scale.size)))

    @quick_jit
    def slopes(params):
        gradient, direction = (
            pulled(family, params, noise, name) for name in ("pullback", "ascent")
        )

        def slope(shares):
            parts = zip(shares, direction.lift, strict=True)
            only = LiftParams(*(share * part for share, part in parts))
            still = jax.tree_util.tree_map(jnp.zeros_like, direction.flow)
            updates = direction._replace(lift=only, flow=still)
            moved = jax.jvp(lambda t: _step(family, params, updates, t), (0.0,), (1.0,))[1]
            return sum(jax.tree_util.tree_leaves(jax.tree_util.tree_map(jnp.vdot, gradient, moved)))

        return jax.vmap(slope)(jnp.eye(len(LiftParams._fields)))

    for name, slope in zip(LiftParams._fields, slopes(params), strict=True):
        held = (
            name == "offsets"
            and not family.free_mean
            or name == "log_sigma"
            and not _sigma_moves(family)
        )
        assert slope == 0 if held else slope > 0, name


def _step(family, params, updates, length):
    return family.apply_updates(
        params, (), jax.tree_util.tree_map(lambda leaf: length * leaf, updates)
    )[0]


def _sigma_moves(family):
    return family.learn_sigma and family.lift.complement_dim > 0


@pytest.fixture(scope="module")
def many():
    """Draws of the family on some directions."""
    with enable_x64(True):
        family, params = make("core")
        params = params._replace(
            flow=jax.tree_util.tree_map(lambda leaf: 0.3 * np.asarray(leaf), params.flow)
        )  # light tails
        draws = quick_jit(lambda k: family.sample(params, k, 200_000, antithetic=False))(
            jax.random.key(7)
        )
        return family, params, draws


def dense(moment):
    inner = jnp.diag(moment.weights) + moment.coefficients.T @ moment.coefficients / len(
        moment.coefficients
    )
    return jnp.diag(moment.diagonal) + moment.factors.T @ inner @ moment.factors


def test_second_moment(many):
    family, params, draws = many
    moment = quick_jit(lambda p: family.second_moment(p))(params)
    assert moment.factors.shape[0] == family.num_moment_terms
    points = np.asarray(draws.displacement)
    sample = points.T @ points / len(points)
    found = np.asarray(quick_jit(dense)(moment))
    np.testing.assert_allclose(found, sample, atol=MOMENT_ERROR * np.max(np.diagonal(sample)))
    np.testing.assert_allclose(moment.marginal(), np.diagonal(found), rtol=1e-10)


def test_linear_map_has_mean_and_covariance(many):
    family, params, draws = many

    @quick_jit
    def mapped(params):
        linear = family.linear_map(params)
        columns = jax.vmap(linear.displacement)(jnp.eye(5)) - linear.displacement(jnp.zeros(5))
        center, moment = linear.center, dense(family.second_moment(params))
        return center, columns, moment - jnp.outer(center, center)

    center, columns, covariance = map(np.asarray, mapped(params))
    np.testing.assert_allclose(columns.T @ columns, covariance, atol=1e-9)
    deviation = np.sqrt(np.max(np.diagonal(covariance)))
    np.testing.assert_allclose(center, draws.displacement.mean(0), atol=MOMENT_ERROR * deviation)


def test_control_variates_have_mean_zero(many):
    family, params, draws = many
    values, expected = map(
        np.asarray, quick_jit(lambda p: family.control_variates(p, draws))(params)
    )
    error = values.std(0) / np.sqrt(len(values))
    assert np.all(np.abs(values.mean(0) - expected) < 4 * error)
    assert np.all(error > 0)


@pytest.mark.parametrize("case", ["core", "whole"])
def test_identity_flow_is_the_laplace_approximation(case):
    dim, rank, options = CASES[case]
    rng = np.random.default_rng(4)
    config = VIConfig.create(
        {"family": "flow", "flow": FlowConfig(depth=2, hidden=(4,), init_scale=0.0)}
        | options
        | {"sigma_perp": None}
    )
    scale, core = np.exp(rng.normal(size=dim)), 2 * rng.normal(size=(rank, dim))
    family, params = create(config, scale, core)
    precision = (np.eye(dim) + core.T @ core) / np.outer(scale, scale)
    points = rng.normal(size=(3, dim))

    @quick_jit
    def everything(params):
        draws = family.sample(params, jax.random.key(1), 6, antithetic=True)
        log_prob = jax.vmap(lambda v: family.log_prob(params, v))(jnp.asarray(points))
        columns, expected = family.control_variates(params, draws)
        return log_prob, draws.displacement, draws.score, columns, expected

    log_prob, displacement, score, columns, expected = map(np.asarray, everything(params))
    log_det = np.linalg.slogdet(precision / (2 * np.pi))[1]
    squares = np.einsum("ni,ij,nj->n", points, precision, points)
    np.testing.assert_allclose(log_prob, 0.5 * (log_det - squares), rtol=1e-9)
    np.testing.assert_allclose(score, -displacement @ precision, rtol=1e-7, atol=1e-7)
    x2 = np.sum((displacement @ precision) * displacement, axis=1)
    np.testing.assert_allclose(columns[:, 0], 0.5 * (x2 - dim), atol=1e-7)
    trace = np.trace(np.linalg.inv(precision))
    np.testing.assert_allclose(columns[:, 2], 0.5 * (np.sum(displacement**2, 1) - trace), atol=1e-7)
    np.testing.assert_array_equal(expected, 0.0)


def test_widened_scales_draws_about_the_start():
    family, params = make("core")
    params = params._replace(lift=params.lift._replace(offsets=jnp.zeros_like(params.lift.offsets)))
    noise = jnp.asarray(np.random.default_rng(5).normal(size=5))

    @quick_jit
    def displacements(params):
        wide = family.widened(params, jnp.log(3.0))
        return displacement_of(family, wide, noise), displacement_of(family, params, noise)

    wide, plain = displacements(params)
    np.testing.assert_allclose(wide, 3 * plain, rtol=1e-10)


def test_frame_holds_directions_and_core():
    rng = np.random.default_rng(6)
    leading, core = rng.normal(size=(2, 9)), rng.normal(size=(3, 9))

    @quick_jit
    def framed(leading, core):
        frame = make_frame(leading, core.at[2].set(0.0), 5, jax.random.key(0))
        return frame, core_root(frame, core[:2])

    frame, root = map(np.asarray, framed(leading, core))
    np.testing.assert_allclose(frame @ frame.T, np.eye(5), atol=1e-12)
    for rows, within in ((leading, frame[:2]), (core[:2], frame)):
        np.testing.assert_allclose(rows @ within.T @ within, rows, atol=1e-12)
    inverse = np.linalg.inv(np.eye(9) + core[:2].T @ core[:2])
    np.testing.assert_allclose(root @ root.T, frame @ inverse @ frame.T, atol=1e-12)


def test_memory_is_linear_in_the_dimension(fully_optimised):
    dim, latent = 1_000_000, 8
    config = VIConfig(family="flow", d_latent=latent, curvature_rank=latent, flow=SMALL)
    core = jax.ShapeDtypeStruct((latent, dim), jnp.float32)
    vector, number = (
        jax.ShapeDtypeStruct((dim,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )

    def step(scale, core, unit, key):
        family = Flow.create(
            config.family_settings, Geometry(scale, core, jnp.asarray(latent), unit, latent)
        )
        params = family.init(key, core, jnp.zeros_like(scale))
        draws = family.sample(params, key, 2, antithetic=True)
        target = TargetValues(draws.log_prob, draws.displacement)
        return family.ascent(params, draws, target, groups=1)

    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = jax.jit(step).lower(vector, core, number, key).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * dim * 16 * latent


def test_learned_sigma_starts_where_it_is_told():
    family, _ = make("core")

    @quick_jit
    def begun():
        params = family.init(jax.random.key(0), jnp.zeros((3, 5)), jnp.zeros(5))
        draws = family.sample(params, jax.random.key(0), 2, antithetic=True)
        held = dataclasses.replace(family, learn_sigma=False)
        ascents = [pulled(one, params, jnp.ones((1, 5)), "ascent") for one in (held, family)]
        sigma = family.step_statistics(params, draws)["sigma_perp"]
        return sigma, *(ascent.lift.log_sigma for ascent in ascents)

    sigma, held, learned = begun()
    np.testing.assert_allclose(sigma, 0.7, rtol=1e-12)
    assert held == 0
    assert learned != 0
