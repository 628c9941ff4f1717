"""Models that compute in few bits: what they see of the parameters, and what the estimate says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.target.data import Problem, hold
from fastvi.target.fingerprint import fingerprint_loss
from fastvi.target.look import look_at_target
from fastvi.target.narrow import spacing_seen
from fastvi.target.objective import make_flat_objective
from fastvi.target.posterior import LocalPosterior
from fastvi.target.ravel import ravel_loss

COUNT = 500
RNG = np.random.default_rng(0)
X = RNG.normal(size=(COUNT, 4)).astype(np.float32)
CENTER = {"a": jnp.asarray([0.5, -1.0]), "b": jnp.asarray([0.75, 1.25])}  # exact in bfloat16
Y = X @ np.concatenate([*CENTER.values()])
SINGLE, HALF, HALF16 = 2.0**-23, 2.0**-7, 2.0**-10


def joined(params):
    return jnp.concatenate([params["a"], params["b"]])


def residuals(w, batch):
    return batch[0] @ w.astype(jnp.float32) - batch[1]


def cast(params, *names, dtype=jnp.bfloat16):
    return {name: leaf.astype(dtype) if name in names else leaf for name, leaf in params.items()}


def squares(prepare):
    return lambda params, batch: 0.5 * jnp.mean(residuals(joined(prepare(params)), batch) ** 2)


def in_layers(params, batch):
    """Cast inside of a scan, as layers that are stacked are."""

    def layer(total, row):
        return total + row.astype(jnp.bfloat16).astype(jnp.float32) ** 2, None

    return jax.lax.scan(layer, 0.0, joined_rows(params))[0] * jnp.mean(batch[1] ** 0)


def joined_rows(params):
    return params["a"]


SEEN = {
    "all digits": (squares(lambda p: p), [SINGLE] * 4),
    "cast inside": (squares(lambda p: cast(p, "a", "b")), [HALF] * 4),
    "one of two cast": (squares(lambda p: cast(p, "b")), [SINGLE] * 2 + [HALF] * 2),
    "float16": (squares(lambda p: cast(p, "a", dtype=jnp.float16)), [HALF16] * 2 + [SINGLE] * 2),
    "cast under jit": (squares(jax.jit(lambda p: cast(p, "a", "b"))), [HALF] * 4),
    "cast under checkpoint": (squares(jax.checkpoint(lambda p: cast(p, "a", "b"))), [HALF] * 4),
    "transposed before": (
        squares(lambda p: cast({"a": p["a"][None].T[:, 0], "b": p["b"]}, "a", "b")),
        [HALF] * 4,
    ),
    "a norm of what is cast": (
        lambda p, b: squares(lambda p: cast(p, "a", "b"))(p, b) + jnp.sum(p["a"] ** 2),
        [SINGLE] * 2 + [HALF] * 2,
    ),
    "in a scan, the rest not used": (in_layers, [HALF] * 2 + [SINGLE] * 2),
    "data alone": (
        lambda p, b: squares(lambda p: p)(p, (b[0].astype(jnp.bfloat16), b[1])),
        [SINGLE] * 4,
    ),
    "losses alone": (
        lambda p, b: (0.5 * residuals(joined(p), b) ** 2).astype(jnp.bfloat16),
        [SINGLE] * 4,
    ),
}


def problem_of(center, nbeta):
    return Problem(
        LocalPosterior(center, jnp.float32(nbeta), jnp.float32(1)),
        hold((jnp.asarray(X), jnp.asarray(Y))),
        8,
    )


@pytest.mark.parametrize(("loss", "expected"), SEEN.values(), ids=SEEN)
def test_the_spacing_in_which_a_loss_sees_its_parameters(loss, expected):
    objective, center = ravel_loss(loss, CENTER)
    uses = fingerprint_loss(objective, problem_of(center, 10)).uses
    np.testing.assert_array_equal(np.broadcast_to(spacing_seen(uses, center), 4), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_in_half_precision_are_seen_in_it(dtype):
    objective, center = ravel_loss(squares(lambda p: p), cast(CENTER, "a", dtype=dtype))
    assert center.dtype == jnp.float32
    uses = fingerprint_loss(objective, problem_of(center, 10)).uses
    narrow = float(jnp.finfo(dtype).eps)
    np.testing.assert_array_equal(spacing_seen(uses, center), [narrow] * 2 + [SINGLE] * 2)


def test_a_flat_loss_may_cast_parts_of_its_vector():
    def loss(w, batch):
        w = jnp.concatenate([w[:2], w[2:].astype(jnp.bfloat16)])
        return 0.5 * jnp.mean(residuals(w, batch) ** 2)

    center = jnp.concatenate([*CENTER.values()])
    uses = fingerprint_loss(make_flat_objective(loss), problem_of(center, 10)).uses
    np.testing.assert_array_equal(spacing_seen(uses, center), [SINGLE] * 2 + [HALF] * 2)


# What the look at a loss, and an estimate, make of it.

HESSIAN = X.T.astype(float) @ X / COUNT
UNITS = 2.0 ** np.floor(np.log2(np.abs([0.5, -1.0, 0.75, 1.25]))) * HALF  # in the last place


def look(loss, params, nbeta):
    objective, center = ravel_loss(loss, params)
    return look_at_target(
        objective, problem_of(center, nbeta), None, "loss_fn", budget_fge=np.inf, max_batch=COUNT
    )[1]


WAYS = {
    "cast inside": (squares(lambda p: cast(p, "a", "b")), CENTER),
    "given in bfloat16": (squares(lambda p: p), cast(CENTER, "a", "b")),
}


@pytest.mark.parametrize(("loss", "params"), WAYS.values(), ids=WAYS)
def test_rounding_is_that_of_the_digits_that_the_model_sees(loss, params):
    found = look(loss, params, 100.0).weight_rounding
    # signs are drawn once, and 64 rows of the examples used
    assert found == pytest.approx(100 / 2 * np.sum(np.diag(HESSIAN) * UNITS**2) / 12, rel=0.6)
    assert look(squares(lambda p: p), CENTER, 100.0).weight_rounding < 1e-4 * found


@pytest.mark.parametrize(("loss", "params"), WAYS.values(), ids=WAYS)
def test_a_posterior_narrower_than_the_spacing_is_no_wrong_gradient(loss, params):
    """A step of 1e-3 is less than half of 0.004 and 0.008: the loss does not change."""
    assert look(loss, params, 1e6).weight_rounding > 1


def estimate(loss, params, nbeta, **options):
    return fastvi.estimate_llc(
        loss,
        params,
        (X, Y),
        nbeta=nbeta,
        localization=1.0,
        budget=2e6,
        progress=False,
        throw=False,
        **options,
    )


def exact(nbeta):
    spectrum = np.linalg.eigvalsh(HESSIAN)
    return 0.5 * np.sum(nbeta * spectrum / (nbeta * spectrum + 1))


def names(result):
    return [finding.name for finding in result.health]


@pytest.mark.parametrize(("loss", "params"), WAYS.values(), ids=WAYS)
def test_a_wide_posterior_is_right_and_a_narrow_one_named(loss, params):
    result = estimate(loss, params, 50.0)
    assert abs(result.llc - exact(50.0)) < 4 * result.llc_sem
    assert result.llc_sem < 0.03 * exact(50.0)
    assert "coarse_numbers" not in names(result)
    assert result.correction.narrow_dtype == "bfloat16"
    # rounding adds a nat or more to the two that are right
    hidden = estimate(loss, params, 1e6)
    (finding,) = (one for one in hidden.health if one.name == "coarse_numbers")
    assert "rounding w to bfloat16 adds about" in finding.observed
    assert "float32" in finding.next_step
