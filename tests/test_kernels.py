import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvi._errors import ConfigError
from fastvi.kernels import hutchinson, mixture_grad, noise, woodbury
from fastvi.kernels.hutchinson import api as hutchinson_api
from fastvi.kernels.hutchinson import cases as hutchinson_cases
from fastvi.kernels.mixture_grad import api as mixture_grad_api
from fastvi.kernels.woodbury import api as woodbury_api
from fastvi.kernels.woodbury import cases, reference

OPS = {"woodbury": woodbury_api, "mixture_grad": mixture_grad_api, "hutchinson": hutchinson_api}
WOODBURY = [name for name in woodbury_api.IMPLEMENTATIONS if name != "reference"]
GRADIENT = [name for name in mixture_grad_api.IMPLEMENTATIONS if name != "reference"]
HUTCHINSON = [name for name in hutchinson_api.IMPLEMENTATIONS if name != "reference"]


def assert_close(actual, expected, tolerance, message=""):
    """Compare leaf by leaf in units of each leaf's largest entry."""
    assert jax.tree_util.tree_structure(actual) == jax.tree_util.tree_structure(expected)
    paths = jax.tree_util.tree_flatten_with_path(actual)[0]
    for (path, got), want in zip(paths, jax.tree_util.tree_leaves(expected), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape
        error = np.max(np.abs(got - want), initial=0.0)
        scale = np.max(np.abs(want), initial=0.0)
        name = jax.tree_util.keystr(path)
        assert error <= tolerance * max(scale, 1e-300) or error == 0, f"{message}{name}: {error / scale:.2e}"


@functools.partial(jax.jit, static_argnames="implementation")
def everything(mixture, stacked, cotangent, implementation):
    """All that an implementation computes: small matrices, draws and gradients (stacked), one more density."""
    small = woodbury.grams(mixture, implementation=implementation)

    def one(noise):
        drawn = woodbury.draw(mixture, small, noise, implementation=implementation)
        gradients = {
            metric: mixture_grad.pullback(
                mixture, small, noise, drawn, cotangent, metric=metric, implementation=implementation
            )
            for metric in mixture_grad.METRICS
        }
        return {"draw": drawn, "gradient": gradients}

    elsewhere = woodbury.log_prob(mixture, small, stacked.eps[0] + 0.3, implementation=implementation)
    return {"grams": small, **jax.vmap(one)(stacked), "log_prob": elsewhere}


def arguments(name, dtype):
    mixture, stacked = cases.make(cases.CASES[name], jnp.dtype(dtype))
    cotangent = np.float32(np.cos(1.0 + np.arange(mixture.log_scale.size)))
    return mixture, stacked, jnp.asarray(cotangent, dtype)


@functools.cache
def evaluated(name, implementation, dtype="float64"):
    with enable_x64(dtype == "float64"):
        results = everything(*arguments(name, dtype), implementation=implementation)
        return jax.tree_util.tree_map(np.asarray, results)


@functools.cache
def sensitivity(name):
    """How far the results move when the inputs move in their 24th bit: what no float32 code can beat."""
    largest = jax.tree_util.tree_map(np.zeros_like, evaluated(name, "reference"))
    with enable_x64(True):
        inputs = arguments(name, "float64")
        for seed in range(6):
            rng = np.random.default_rng(seed)

            def nudge(leaf, rng=rng):
                return leaf * (1 + rng.choice([-1, 1], leaf.shape) * 2.0**-24) if leaf.dtype.kind == "f" else leaf

            moved = everything(*jax.tree_util.tree_map(nudge, inputs), implementation="reference")
            largest = jax.tree_util.tree_map(
                lambda most, new, old: np.maximum(most, np.max(np.abs(new - old), initial=0.0)),
                largest, moved, evaluated(name, "reference"),
            )
    return largest
