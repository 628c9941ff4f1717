"""Draws of a fitted q and their density.

Against scipy's normals and the normalising constant of a quadratic.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import quick_jit

import fastvi
from fastvi import DataError, FittedQ, VIConfig
from fastvi.families import FAMILIES
from fastvi.families.base import Geometry

COUNT, NBETA, GAMMA = 300, 50.0, 2.0
CURVATURES = np.array([4.0, 2.0, 1.0, 0.5, 0.1])
LOSS = 0.3  # at w*
DATA = (jnp.ones((COUNT, 1)),)
CENTER = np.array([[1.0, -2.0], [0.5, 3.0]], np.float32), np.float16(0.25)
PARAMS = {"w": CENTER[0], "b": CENTER[1], "activation": math.tanh, "name": "net"}
OPTIONS = {
    "method": "variational",
    "control_variate": "none",
    "early_stop": False,
    "steps": 4,
    "eval_samples": 4,
    "progress": False,
}


def loss_fn(params, batch):
    away = jnp.append(
        jnp.ravel(params["w"] - CENTER[0]), params["b"].astype(jnp.float32) - CENTER[1]
    )
    order = jnp.roll(away, 1)  # the tree's order: b, then w
    return (LOSS + 0.5 * jnp.sum(jnp.asarray(CURVATURES, jnp.float32) * order**2)) * jnp.mean(
        batch[0]
    )


def estimate(**options):
    return fastvi.estimate_llc(
        loss_fn,
        PARAMS,
        DATA,
        nbeta=NBETA,
        localization=GAMMA,
        M=2,
        r=1,
        **{**OPTIONS, "num_chains": 2} | options,
    )


@pytest.fixture(scope="module")
def result():
    return estimate()


# The law of the draws.


def normals(*shifts):
    """A q of one component, its parameters at each shift, means, and covariance.

    The last two by docs/math.md "Family".
    """
    rng, dim = np.random.default_rng(1), 3
    scale, core = np.exp(0.3 * rng.normal(size=dim)), rng.normal(size=(1, dim))
    geometry = Geometry(
        *(jnp.asarray(x, jnp.float32) for x in (scale, core)), jnp.int32(1), jnp.float32(1.0), 1
    )
    family = FAMILIES["mfa"].create(VIConfig(M=1, r=1).family_settings, geometry)
    factors, log_scale = rng.normal(size=(1, 1, dim)), 0.3 * rng.normal(size=dim)
    start = quick_jit(lambda *given: family.init(*given))(
        jax.random.key(0), geometry.core, jnp.float32(log_scale)
    )
    start = start._replace(factors=jnp.asarray(factors, jnp.float32))
    params = [start._replace(offsets=jnp.full((1, dim), shift, jnp.float32)) for shift in shifts]
    inner = np.linalg.inv(np.eye(dim) + core.T @ core) + factors[0].T @ factors[0]
    deviation = scale * np.exp(log_scale)
    return (
        family,
        params,
        [5.0 + shift * scale for shift in shifts],
        deviation[:, None] * inner * deviation,
    )


def test_draws_have_the_moments_and_the_density_of_a_mixture_over_chains():
    family, (first, second), (mean, other_mean), covariance = normals(0.0, 4.0)
    params = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), first, second)
    q, num = FittedQ(family, params, jnp.full(3, 5.0)), 20_000
    w, log_q = q.sample_and_log_prob(0, (num,))

    def exact(points):
        parts = [
            scipy.stats.multivariate_normal(m, covariance).logpdf(points)
            for m in (mean, other_mean)
        ]
        return scipy.special.logsumexp(parts, axis=0) - math.log(2)

    np.testing.assert_allclose(log_q, exact(w), atol=2e-4)
    np.testing.assert_allclose(q.log_prob(w + 1.0), exact(np.asarray(w + 1.0)), atol=1e-3)
    middle, apart = 0.5 * (mean + other_mean), 0.5 * (mean - other_mean)
    total = covariance + np.outer(apart, apart)
    away = np.asarray(w, float) - middle
    assert np.all(np.abs(away.mean(0)) < 4 * np.sqrt(np.diag(total) / num))
    products = away[:, :, None] * away[:, None, :]
    assert np.all(np.abs(products.mean(0) - total) < 4 * products.std(0) / math.sqrt(num))
    alone, log_alone = q.chain(1).sample_and_log_prob(0, (2_000,))
    exact_alone = scipy.stats.multivariate_normal(other_mean, covariance).logpdf(alone)
    np.testing.assert_allclose(log_alone, exact_alone, atol=2e-4)
    assert np.all(np.abs(alone.mean(0) - other_mean) < 4 * np.sqrt(np.diag(covariance) / 2_000))


def laplace_flow():
    """A q by a flow off the identity on two of three directions, and the precision of its start."""
    scale, core = np.array([1.0, 0.5, 2.0]), np.array([[1.0, -2.0, 0.5]])
    # so near the identity that its tails reach as far as those of the posterior
    flow = {"depth": 2, "hidden": [4], "init_scale": 0.2}
    config = VIConfig.create({"family": "flow", "d_latent": 2, "flow": flow})
    geometry = Geometry(
        *(jnp.asarray(x, jnp.float32) for x in (scale, core)), jnp.int32(1), jnp.float32(1.0), 1
    )
    family = FAMILIES["flow"].create(config.family_settings, geometry)
    params = quick_jit(lambda *given: family.init(*given))(
        jax.random.key(0), geometry.core, jnp.zeros(3)
    )
    q = FittedQ(family, jax.tree_util.tree_map(lambda leaf: leaf[None], params), jnp.full(3, 5.0))
    return q, (np.eye(3) + core.T @ core) / np.outer(scale, scale), 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_the_draws_average_to_the_normalising_constant(family, result):
    """E_q[p / q] = Z, whatever q."""
    quadratic = result.q.flat, np.diag(NBETA * CURVATURES + GAMMA), -NBETA * LOSS
    q, precision, peak = quadratic if family == "mfa" else laplace_flow()
    w, log_q = q.sample_and_log_prob(1, (4_000,))
    away = np.asarray(w - q.center, float)
    log_p = peak - 0.5 * np.einsum("ni,ij,nj->n", away, precision, away)
    log_z = (
        peak + 0.5 * len(precision) * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    )
    ratio = np.exp(log_p - np.asarray(log_q, float) - log_z)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(ratio.size)
    assert ratio.std() < 1
    np.testing.assert_allclose(q.log_prob(w), log_q, atol=2e-3)


# What comes back.


@pytest.mark.parametrize("shape", [(), (3, 2), 6, (0,), (2, 0)])
def test_the_tree_is_the_flat_vector_bit_for_bit(result, shape):
    axes = (shape,) if isinstance(shape, int) else shape
    tree, log_q = result.q.sample_and_log_prob(7, shape)
    flat, log_q_flat = result.q.flat.sample_and_log_prob(7, shape)
    assert flat.shape == (*axes, 5)
    assert log_q.shape == axes
    assert (tree["activation"], tree["name"]) == (math.tanh, "net")
    assert (tree["b"].dtype, tree["w"].dtype) == (jnp.float16, jnp.float32)
    np.testing.assert_array_equal(log_q, log_q_flat)
    np.testing.assert_array_equal(tree["w"], flat[..., 1:].reshape(*axes, 2, 2))
    np.testing.assert_array_equal(tree["b"], flat[..., 0].astype(jnp.float16))
    assert result.q.log_prob(tree).shape == axes


def test_keys_decide_the_draws(result):
    flat = result.q.flat
    w, log_q = flat.sample_and_log_prob(3, (6,))
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        np.testing.assert_array_equal(flat.sample(key, (6,)), w)
    assert not np.any(flat.sample(4, (6,)) == w)
    assert len(np.unique(w)) == w.size
    np.testing.assert_allclose(flat.log_prob(w), log_q, atol=1e-3)


def test_parameters_held_fixed_stay_in_their_places():
    mask = {
        "w": np.array([[True, False], [False, True]]),
        "b": False,
        "activation": False,
        "name": False,
    }
    found = estimate(param_mask=mask, num_chains=1)
    tree, log_q = found.q.sample_and_log_prob(0, (6,))
    flat = found.q.flat.sample(0, (6,))
    (part,) = found.q.varying.sample(0, (6,))
    np.testing.assert_array_equal(part, flat)
    expected = np.broadcast_to(PARAMS["w"], (6, 2, 2)).copy()
    expected[:, 0, 0], expected[:, 1, 1] = flat.T
    np.testing.assert_array_equal(tree["w"], expected)
    np.testing.assert_array_equal(tree["b"], np.full(6, 0.25, np.float16))
    assert tree["b"].dtype == jnp.float16
    assert tree["name"] == "net"
    np.testing.assert_allclose(found.q.log_prob(tree), log_q, atol=1e-4)
    passed_as_restricted = dataclasses.replace(
        found, fitted=found.fitted._replace(is_masked=False)
    ).q
    np.testing.assert_array_equal(
        passed_as_restricted.sample(0, (6,))[0], flat
    )  # that was all that was passed
    np.testing.assert_array_equal(
        passed_as_restricted.whole.sample(0, (2, 3))["w"], tree["w"].reshape(2, 3, 2, 2)
    )


# Refusals.


def test_a_loaded_result_has_no_q(result, tmp_path):
    loaded = fastvi.LLCEstimate.load(result.save(tmp_path))
    with pytest.raises(DataError, match="holds no fit to draw from"):
        loaded.q  # noqa: B018


@pytest.mark.parametrize("shape", [-1, (2, -1), 1.5, "3", (2, 1.0), None, True])
def test_impossible_shapes_are_refused(result, shape):
    with pytest.raises(DataError, match="shape must be a tuple of sizes"):
        result.q.sample_and_log_prob(0, shape)


def test_points_of_another_shape_are_refused(result):
    q, draw = result.q, result.q.sample(0, (6,))
    with pytest.raises(DataError, match=r"must have shape \(\.\.\., 5\); got \(4,\)"):
        q.flat.log_prob(jnp.zeros(4))
    with pytest.raises(DataError, match="must have the structure"):
        q.log_prob({"w": draw["w"]})
    with pytest.raises(DataError, match=r"ends in \(2, 2\); got \(2, 3\)"):
        q.log_prob({**draw, "w": jnp.zeros((2, 3))})
    with pytest.raises(DataError, match="same leading axes"):
        q.log_prob({**draw, "w": draw["w"][0]})
    with pytest.raises(DataError, match="knows flat vectors alone"):
        dataclasses.replace(q, structure=None).whole  # noqa: B018
    with pytest.raises(DataError, match="one of 2 chains; got 2"):
        q.chain(2)
    with pytest.raises(DataError, match=r"jax\.vmap"):
        dataclasses.replace(q, center=jnp.zeros((2, 5))).sample(0)
