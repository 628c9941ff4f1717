"""Fits of the flow family.

Backends, the keys that all families share, and posteriors that are known.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64, quick_jit

import fastvi
from fastvi._errors import ConfigError
from fastvi._optional import MissingExtraError
from fastvi.config import VIConfig
from fastvi.families import BACKENDS, FAMILIES, AbstractBackend, register_backend
from fastvi.families.backends.base import Architecture
from fastvi.families.backends.nux import NuxBackend
from fastvi.families.flow import MOMENT_DRAWS
from fastvi.flows.distributions import standard_log_prob
from fastvi.target.objective import make_flat_objective

COUNT, DIM, STEPS = 1000, 4, 40
NBETA, GAMMA = COUNT / math.log(COUNT), 1.0
CURVATURES = np.logspace(-1, 0.5, DIM)
BASIS = np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))[0]
LLC = 0.5 * np.sum(NBETA * CURVATURES / (NBETA * CURVATURES + GAMMA))
SMALL = {"depth": 2, "hidden": [8]}
TEMPLATES = ("realnvp", "maf", "spline_coupling", "nsf_ar")
# keys that lambda_hat's writers and analyses read
TRACES = {
    "elbo",
    "elbo_like",
    "logq",
    "radius2",
    "resp_entropy",
    "grad_norm",
    "cumulative_fge",
    "virial",
    "lr",
}
TRACES |= {
    "pi_min",
    "pi_max",
    "pi_entropy",
    "D_sqrt_min",
    "D_sqrt_max",
    "D_sqrt_med",
    "A_col_norm_max",
}
EXTRAS = {
    "Eq_Ln",
    "Ln_wstar",
    "Eq_Ln_mc",
    "Eq_Ln_cv",
    "llc_sem",
    "elbo",
    "pi",
    "D_sqrt",
    "result_code",
    "cv_info",
}


def loss(w, batch):
    return 0.5 * jnp.sum(jnp.asarray(CURVATURES, w.dtype) * (jnp.asarray(BASIS, w.dtype) @ w) ** 2)


OBJECTIVE = make_flat_objective(loss)


OWN = {"mfa": {}, "flow": {"flow": SMALL}}


def fit(family, key=0, **options):
    return fastvi.fit(
        rng_key=key,
        objective=OBJECTIVE,
        wstar_flat=jnp.zeros(DIM),
        data=jnp.zeros((COUNT, 1)),
        n_data=COUNT,
        beta=1 / math.log(COUNT),
        gamma=GAMMA,
        vi_cfg={"family": family, "steps": STEPS, "samples_per_step": 2, **OWN[family]} | options,
    )


@functools.cache
def plain(family):
    return fit(family)


# What every family returns.


@pytest.mark.parametrize("family", FAMILIES)
def test_families_return_the_same_keys(family):
    result, reference = plain(family), plain("mfa")
    assert result["traces"].keys() >= TRACES | reference["traces"].keys()
    own = {"factor_norm2"}  # of the mixture's factors
    assert result["extras"].keys() >= EXTRAS | reference["extras"].keys() - own
    assert result["work"].keys() == reference["work"].keys()
    assert result["timings"].keys() == reference["timings"].keys()
    assert result["work"]["sampler_flavour"] == family
    assert json.loads(json.dumps(result["work"]))["n_minibatch_grads"] == 2 * STEPS
    for name, trace in result["traces"].items():
        assert trace.shape == (STEPS,), name
        assert jnp.all(jnp.isfinite(trace)), name
    assert float(result["lambda_hat"]) == pytest.approx(LLC, rel=0.03)


@pytest.mark.as_users_compile
def test_a_flow_meets_the_closed_form():
    found = plain("flow")
    assert float(found["lambda_hat"]) == pytest.approx(
        LLC, abs=4 * float(found["extras"]["llc_sem"]) + 0.02 * LLC
    )


def test_flow_traces():
    traces = plain("flow")["traces"]
    assert traces.keys() >= {
        "sigma_perp",
        "latent_logdet_mean",
        "latent_scale_min",
        "latent_scale_max",
        "d_latent",
    }
    assert jnp.all(traces["d_latent"] == DIM)
    # q is nearly the posterior, whose standard deviations along the model's axes are those of its
    # covariance
    covariance = BASIS.T @ np.diag(1 / (NBETA * CURVATURES + GAMMA)) @ BASIS
    measured = plain("flow")["extras"]["latent_covariance"]
    np.testing.assert_allclose(measured, covariance, atol=0.15 * np.max(np.diagonal(covariance)))
    deviation = np.sqrt(np.diagonal(covariance))
    assert float(traces["latent_scale_min"][-1]) == pytest.approx(deviation.min(), rel=0.2)
    assert float(traces["latent_scale_max"][-1]) == pytest.approx(deviation.max(), rel=0.2)


# Backends.


def skip_without(name):
    if name == "nux":
        nux = pytest.importorskip("nux", reason="NuX is not installed; it is not on PyPI")
        if not hasattr(nux, "NonlinearCoupling"):
            pytest.skip("NuX is older than 2.0.0")
    if name == "flowjax":
        pytest.importorskip("flowjax", reason="flowjax is not installed")


BUILT_IN = [("native", template) for template in TEMPLATES] + [
    ("flowjax", template) for template in TEMPLATES
]
BUILT_IN += [("nux", "realnvp"), ("nux", "spline_coupling")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "template"), BUILT_IN)
def test_backend_laws(name, template):
    skip_without(name)
    with enable_x64(True):
        config = Architecture(template=template, depth=2, hidden=(8,), bins=4, init_scale=1.0)
        backend = BACKENDS[name](2, config)
        identity = BACKENDS[name](
            2, Architecture(template=template, depth=2, hidden=(8,), bins=4, init_scale=0.0)
        )
        noise = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))

        @jax.jit
        def everything(key, x):
            p = backend.init(key)
            z, log_prob = backend.sample_and_log_prob(p, x)
            jacobian = jax.vmap(
                jax.jacrev(lambda one: backend.sample_and_log_prob(p, one[None])[0][0])
            )(x)
            dense = standard_log_prob(x) - jnp.linalg.slogdet(jacobian)[1]
            return log_prob, backend.log_prob(p, z), dense, identity.log_prob(identity.init(key), x)

        log_prob, inverse, dense, at_identity = everything(jax.random.key(3), noise)
        np.testing.assert_allclose(log_prob, dense, rtol=1e-7)
        np.testing.assert_allclose(log_prob, inverse, rtol=1e-5)
        assert np.max(np.abs(log_prob - standard_log_prob(noise))) > 1e-3
        tolerance = 0.2 if name == "nux" else 1e-6  # NuX standardises its first draws
        np.testing.assert_allclose(at_identity, standard_log_prob(noise), atol=tolerance)


# Of the native backend: every other fit of a flow, and one under vmap in test_lambda_hat.py.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param("native", marks=pytest.mark.slow), "flowjax"])
def test_chains_under_vmap_compile_once(name):
    skip_without(name)
    run = quick_jit(jax.vmap(lambda key: fit("flow", key, backend=name, d_latent=2)["lambda_hat"]))
    values = run(jax.random.split(jax.random.key(0), 4))
    assert run._cache_size() == 1
    np.testing.assert_allclose(values, LLC, rtol=0.05)
    assert len(set(np.asarray(values).tolist())) == 4


class Stretched(AbstractBackend):
    """z = noise exp(log_scale): a backend of one's own."""

    def init(self, key):
        return {"log_scale": jnp.zeros(self.dim)}

    def sample_and_log_prob(self, params, noise):
        return noise * jnp.exp(params["log_scale"]), standard_log_prob(noise) - jnp.sum(
            params["log_scale"]
        )

    def log_prob(self, params, z):
        return standard_log_prob(z * jnp.exp(-params["log_scale"])) - jnp.sum(params["log_scale"])


def test_registered_backend():
    register_backend("stretched", Stretched)
    try:
        result = fit("flow", backend="stretched", d_latent=2)
    finally:
        del BACKENDS["stretched"]
    assert float(result["lambda_hat"]) == pytest.approx(LLC, rel=0.03)
    with pytest.raises(ConfigError, match="derived from AbstractBackend"):
        register_backend("function", fit)
    with pytest.raises(ConfigError, match="register_backend"):
        VIConfig(backend="stretched")


def test_nux_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nux", None)
    with pytest.raises(MissingExtraError, match=r"github\.com/Information-Fusion-Lab-Umass/NuX"):
        NuxBackend(2, Architecture()).init(jax.random.key(0))
    with pytest.raises(ConfigError, match="template"):
        NuxBackend(2, Architecture(template="maf"))


# Posteriors that are known.


def estimate(loss_fn, dim, **options):
    options = {
        "family": "flow",
        "method": "variational",
        "progress": False,
        "num_chains": 2,
    } | options
    return fastvi.estimate_llc(loss_fn, jnp.zeros(dim), jnp.zeros((10_000, 1)), **options)


def test_hessian_control_variate_estimates_its_trace():
    # the loss is its own Hessian form, so that draws of the latent distribution are all that is
    # left to chance
    result = fit("flow", control_variate="hvp")
    trace, error = (
        float(result["extras"]["cv_info"]["trace_term"]),
        float(result["extras"]["llc_sem"]),
    )
    # tr(H Sigma) / 2 from MOMENT_DRAWS / 2 mirrored pairs, and the mean over the evaluation's 32,
    # by inverse variance
    coefficient = 1 / (1 + 2 * 32 / MOMENT_DRAWS)
    shares = NBETA * CURVATURES / (NBETA * CURVATURES + GAMMA)
    assert error == pytest.approx(np.sqrt(coefficient * np.sum(shares**2) / MOMENT_DRAWS), rel=0.15)
    assert trace / coefficient == pytest.approx(LLC, abs=4 * error)
    assert float(result["lambda_hat"]) == pytest.approx(LLC, abs=4 * error)


def test_crossing_beats_any_gaussian():
    # exact 0.38246 by quadrature; the best Gaussian gives about 0.49
    result = estimate(
        lambda w, batch: 0.5 * (w[0] * w[1]) ** 2,
        2,
        flow={"hidden": [32]},
        samples_per_step=64,
        steps=1500,
        num_chains=1,
    )
    assert result.llc == pytest.approx(0.38246, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "flowjax"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_rotated_quadratic_of_every_backend_and_template(backend, template):
    dim, curvatures = 50, np.logspace(-2, 0, 50)
    basis = jnp.asarray(
        np.linalg.qr(np.random.default_rng(1).normal(size=(dim, dim)))[0], jnp.float32
    )
    nbeta = 10_000 / math.log(10_000)
    result = estimate(
        lambda w, batch: 0.5 * jnp.sum(jnp.asarray(curvatures, w.dtype) * (basis @ w) ** 2),
        dim,
        backend=backend,
        flow={"template": template},
        d_latent=8,
    )
    assert result.llc == pytest.approx(
        0.5 * np.sum(nbeta * curvatures / (nbeta * curvatures + 1)), rel=0.03
    )
