"""Pallas kernels without a GPU: numbers by Pallas's interpreter, lowering for CUDA."""

import contextlib
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64, quick_jit
from jax.experimental import pallas as pl

import fastvi
from fastvi._errors import ConfigError
from fastvi.kernels import OPS, woodbury
from fastvi.kernels._dispatch import Implementation
from fastvi.kernels.woodbury import reference, xla
from tests.support import woodbury_cases as cases
from tests.support.density_draws import assert_close, assert_nan_gives_nan, draws

if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
    pytest.skip("needs a jax whose Pallas has a Triton backend", allow_module_level=True)

from fastvi.kernels.woodbury import pallas as density

# jax 0.11 announces the end of that backend
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton:DeprecationWarning")
SHARED = {name: case for name, case in cases.CASES.items() if case.num_offsets < 2}
LARGE = cases.Case(3, 3, 2, dim=2500)  # three programs of 1024, the last one ragged


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(density, "BLOCK", 16)  # several programs for 33 entries


@pytest.mark.parametrize("name", SHARED)
def test_draws_agree_with_dense_algebra(name, interpreted, x64):
    mixture, stacked = cases.make(SHARED[name], jnp.float64)
    # condition 1e7, as in tests/test_kernels.py
    expected, tolerance = draws(reference, mixture, stacked), 3e-8 if "steep" in name else 1e-12
    assert_close(draws(density, mixture, stacked), expected, tolerance)


def test_the_passes_in_float32_agree_with_float64(interpreted, monkeypatch):
    monkeypatch.setattr(density, "BLOCK", 1024)

    @quick_jit
    def passes(mixture, noise):
        projected = density._project(noise.eps, mixture, noise.zeta, noise.z, noise.label)
        weights = mixture.core, mixture.factors, noise.zeta, projected[2]
        return projected, density._residual(projected[1], *weights)

    results = []
    for dtype in ("float32", "float64"):
        with enable_x64(dtype == "float64"):
            mixture, stacked = cases.make(LARGE, jnp.dtype(dtype))
            results.append(passes(mixture, jax.tree_util.tree_map(lambda leaf: leaf[1], stacked)))
    assert_close(*results, 1e-6)


def test_vmap_over_chains_equals_a_loop(interpreted, x64):
    chains = [cases.make(SHARED[name], jnp.float64) for name in ("shared", "shared_masked")]
    mixtures, noises = jax.tree_util.tree_map(lambda *leaves: np.stack(leaves), *chains)
    together = jax.device_get(jax.vmap(functools.partial(draws, density))(mixtures, noises))
    for index, (mixture, stacked) in enumerate(chains):
        alone = jax.tree_util.tree_map(lambda leaf, i=index: leaf[i], together)
        assert_close(alone, draws(reference, mixture, stacked), 1e-12)


def test_nan_in_nan_out(interpreted, x64):
    assert_nan_gives_nan(density, *cases.make(SHARED["shared"], jnp.float64))


def test_log_prob_can_be_differentiated(interpreted, x64):
    mixture, stacked = cases.make(SHARED["shared_masked"], jnp.float64)

    def gradient_of(implementation):
        def log_prob(mixture, point):
            return implementation.log_prob(mixture, xla.grams(mixture), point)

        return quick_jit(jax.grad(log_prob, argnums=(0, 1)))(mixture, stacked.eps[0] + 0.3)

    assert_close(gradient_of(density), gradient_of(reference), 1e-11)


def test_what_is_missing_is_refused():
    with pytest.raises(ConfigError, match="'pallas'.*no means by component"):
        draws(density, *cases.make(cases.CASES["component"]))
    if jax.default_backend() == "cpu":
        with pytest.raises(ConfigError, match="'pallas'.*woodbury.*runs on cuda"):
            woodbury.grams(cases.make(SHARED["shared"])[0], implementation="pallas")


def estimate(**options):
    """Estimate by q alone, a quadratic in four dimensions."""
    return fastvi.estimate_llc(
        lambda w, batch: 0.5 * jnp.mean((batch @ w) ** 2),
        jnp.zeros(4),
        np.random.default_rng(0).normal(size=(100, 4)),
        method="variational",
        early_stop=False,
        steps=4,
        M=2,
        curvature_rank=0,
        samples_per_step=2,
        eval_samples=8,
        dtype="float64",
        progress=False,
        **options,
    )


def test_the_configuration_switches_it_on(interpreted, monkeypatch, x64):
    monkeypatch.setattr(Implementation, "obstacle", lambda self, platform: None)
    launches, launch = [], pl.pallas_call

    def counted(*args, **options):
        launches.append(options["grid"])
        return launch(*args, **options)

    monkeypatch.setattr(pl, "pallas_call", counted)
    expected = estimate()
    assert not launches
    assert estimate(implementation="pallas").llc == pytest.approx(expected.llc, rel=1e-9)
    assert launches


def test_the_configuration_refuses_what_cannot_run(x64):
    with pytest.raises(ConfigError, match=r"'pallas'.*runs on cuda, and this machine has"):
        estimate(implementation="pallas")
    with pytest.raises(ConfigError, match=r"implementation must be 'xla' beside means='component'"):
        fastvi.VIConfig(implementation="pallas", means="component")


def for_a_gpu():
    """Name the device that programs are traced for; before jax 0.10 nothing asks."""
    if jax.__version_info__ < (0, 10):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lowering_for_cuda_holds_the_kernels(dtype):
    # a function of its own: what was traced for the interpreter is of no use here
    compiled = jax.jit(functools.partial(draws.__wrapped__, density))
    with enable_x64(dtype == "float64"):
        shapes = jax.tree_util.tree_map(jax.typeof, cases.make(LARGE, jnp.dtype(dtype)))
        with for_a_gpu():
            text = compiled.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    # project and residual of the draws, project of the density elsewhere
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3


def test_every_pallas_module_is_tested():
    assert {
        op.implementations["pallas"].module for op in OPS.values() if "pallas" in op.implementations
    } == {density.__name__}
