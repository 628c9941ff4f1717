"""The call sequence of lambda_hat, which need not be installed.

Its registry and its sampler are imitated.
"""

import json
import math
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64, quick_jit
from omegaconf import OmegaConf

from fastvi import UnavailableError
from fastvi._optional import MissingExtraError
from fastvi.families import FAMILIES
from fastvi.integrations import lambda_hat
from fastvi.target.objective import make_flat_objective

COUNT, DIM, STEPS, CHAINS = 100, 5, 300, 3
BETA, GAMMA = 1 / math.log(COUNT), 1.0

rng = np.random.default_rng(5)
X = rng.normal(size=(COUNT, DIM)).astype(np.float32)
Y = X @ rng.normal(size=(DIM, 1)) + 0.1 * rng.normal(size=(COUNT, 1))  # float64
CENTER = jnp.asarray(np.linalg.lstsq(X, Y, rcond=None)[0][:, 0], jnp.float32)
PRECISION = 2 * COUNT * BETA * X.T @ X / COUNT
LLC = 0.5 * np.trace(PRECISION @ np.linalg.inv(PRECISION + GAMMA * np.eye(DIM)))


class Whitener(NamedTuple):
    to_tilde: object
    from_tilde: object
    A_sqrt: object
    A_inv_sqrt: object


def make_whitener(diagonal):
    if diagonal is None:
        one = jnp.array(1.0, dtype=jnp.float32)
        return Whitener(lambda v: v, lambda v: v, one, one)
    root = jnp.sqrt(diagonal)
    return Whitener(lambda v: root * v, lambda v: v / root, root, 1 / root)


def loss(w, batch):
    return jnp.mean((batch[0] @ w - batch[1][:, 0]) ** 2)


def loss_full(w):
    return loss(w, (jnp.asarray(X), jnp.asarray(Y)))


@pytest.fixture
def registry(monkeypatch):
    """lambda_hat's modules as far as `install` sees them."""
    modules = {
        name: types.ModuleType(name)
        for name in ("lambda_hat", "lambda_hat.vi", "lambda_hat.vi.flow")
    }
    fake = types.ModuleType("lambda_hat.vi.registry")
    fake._REGISTRY = {"mfa": lambda: "its own mfa"}
    fake.register = fake._REGISTRY.__setitem__
    modules["lambda_hat.vi"].registry = fake
    for name, module in {**modules, "lambda_hat.vi.registry": fake}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lambda_hat, "_replaced", {})
    return fake


def config(**entries):
    given = {
        "algo": "mfa",
        "M": 2,
        "r": 1,
        "steps": STEPS,
        "batch_size": 256,
        "lr": 0.01,
        "eval_samples": 64,
    }
    unknown = {"whitening_steps": 50, "num_chains": 4}
    return OmegaConf.create(given | unknown | entries)


def run(algorithm, vi_cfg, whitener, key):
    return algorithm.run(
        rng_key=key,
        objective=make_flat_objective(loss, jax.grad(loss)),
        loss_full_flat=loss_full,
        wstar_flat=CENTER,
        data=(X, Y),
        n_data=COUNT,
        beta=jnp.asarray(BETA),
        gamma=GAMMA,
        vi_cfg=vi_cfg,
        whitener=whitener,
    )


def run_chains(*arguments, transform):
    """The two calls of lambda_hat's `run_vi`: plainly, then under vmap."""

    def arrays(key):
        result = run(*arguments, key)
        return result["lambda_hat"], result["traces"], result["extras"]

    keys = jax.random.split(jax.random.key(0), CHAINS)
    return run(*arguments, keys[0]), transform(jax.vmap(arrays))(keys)


@pytest.mark.parametrize("algo", [name for name in lambda_hat.ALGORITHMS if name in FAMILIES])
def test_run_vi(registry, algo):
    assert algo in lambda_hat.install()
    entries = {
        "r_per_component": [1, 0],
        "lr_schedule": None,
        "whitening_mode": "none",
        "tensorboard": False,
    }
    if algo == "flow":
        entries = {
            "d_latent": 2,
            "sigma_perp": 1e-3,
            "flow_depth": 2,
            "flow_hidden": [8],
            "flow_type": "realnvp",
        }
    algorithm = registry._REGISTRY[algo]()
    assert algorithm.name == algo
    # lambda_hat's vmap is outside of jit: so is the one of mfa here, at twice the time to compile
    transform = quick_jit if algo == "flow" else lambda mapped: mapped
    arguments = algorithm, config(algo=algo, **entries), make_whitener(None)
    first, (llc, traces, extras) = run_chains(*arguments, transform=transform)
    for leaf in jax.tree_util.tree_leaves((first["lambda_hat"], first["traces"], first["extras"])):
        assert isinstance(leaf, (jax.Array, int, float, bool))
    np.testing.assert_allclose(llc, LLC, rtol=0.1)
    # two programs: their sampled numbers agree within their errors, and no closer
    joint = math.hypot(float(extras["llc_sem"][0]), float(first["extras"]["llc_sem"]))
    assert abs(float(llc[0]) - float(first["lambda_hat"])) < 4 * joint
    np.testing.assert_allclose(
        traces["elbo"][0, 0], first["traces"]["elbo"][0], rtol=1e-4
    )  # before anything moves
    np.testing.assert_allclose(
        COUNT * BETA * (extras["Eq_Ln"] - extras["Ln_wstar"]), llc, atol=1e-3
    )
    np.testing.assert_allclose(extras["Ln_wstar"], float(loss_full(CENTER)), rtol=1e-5)
    assert extras["cv_info"].keys() >= {"Eq_Ln_mc", "Eq_Ln_cv", "variance_reduction"}
    for name in (
        "elbo",
        "grad_norm",
        "elbo_like",
        "logq",
        "radius2",
        "resp_entropy",
        "cumulative_fge",
    ):
        assert traces[name].shape == (CHAINS, STEPS), name
    np.testing.assert_allclose(
        traces["cumulative_fge"][:, -1], STEPS, rtol=1e-5
    )  # the batch is cut to the data
    work = json.loads(json.dumps(first["work"]))
    assert (work["n_full_loss"], work["n_minibatch_grads"], work["sampler_flavour"]) == (
        64,
        STEPS,
        algo,
    )
    assert first["timings"].keys() >= {"adaptation", "sampling"}


def test_float32_where_float64_is_enabled(registry):
    """lambda_hat runs float32 VI in processes that enable float64 for their samplers."""
    lambda_hat.install()
    diagonal = jnp.asarray(np.diag(PRECISION), jnp.float32)
    with enable_x64(True):
        vi_cfg = config(whitening_mode="adam", whitening_decay=0.9, M=1, r=0)
        first = run(registry._REGISTRY["mfa"](), vi_cfg, make_whitener(diagonal), jax.random.key(0))
    assert {str(trace.dtype) for trace in first["traces"].values()} == {"float32"}
    assert float(first["lambda_hat"]) == pytest.approx(LLC, rel=0.1)


def test_uninstall_restores(registry):
    own = registry._REGISTRY["mfa"]
    names = lambda_hat.install()
    lambda_hat.install()  # twice is once
    assert registry._REGISTRY["mfa"] is not own
    assert set(names) <= set(registry._REGISTRY)
    lambda_hat.uninstall()
    assert registry._REGISTRY == {"mfa": own}
    with pytest.raises(UnavailableError, match="nothing to put back"):
        lambda_hat.uninstall()


def test_absent_package_is_named():
    with pytest.raises(MissingExtraError, match="danmackinlay/lambda_hat@variational"):
        lambda_hat.install()


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, {"M": 8, "lr_schedule": "cosine", "batch_size": None}),
        ({"batch_size": 256, "lr_schedule": None}, {"batch_size": 100, "lr_schedule": "none"}),
        ({"eval_samples": 3}, {"eval_samples": 4}),
        (
            {"eval_samples": 7, "dtype": "float64", "gamma": 3.0, "tensorboard": True},
            {"eval_samples": 8},
        ),
        (
            {"whitening_mode": "rmsprop", "flow_hidden": [8]},
            {"whitening": "none", "dtype": "float32"},
        ),
    ],
)
@pytest.mark.parametrize(
    "make", [dict, OmegaConf.create, lambda entries: types.SimpleNamespace(**entries)]
)
def test_translation(make, entries, expected):
    translated = lambda_hat.translate(make(entries), "mfa", COUNT, jnp.float32)
    assert {name: getattr(translated, name) for name in expected} == expected
