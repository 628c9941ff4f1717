"""Triton kernels without a GPU.

Numbers by the interpreter, lowering for CUDA, machine code for sm_90.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64, quick_jit

from fastvi import experimental
from fastvi._errors import ConfigError
from fastvi.kernels._dispatch import current_platform
from fastvi.kernels.woodbury import reference, xla
from tests.support import woodbury_cases as cases
from tests.support.density_draws import assert_close, assert_nan_gives_nan, draws

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: pip install triton", allow_module_level=True)
if current_platform() == "cuda":  # the interpreter is Triton's for the whole process
    pytest.skip("bench.gpu runs the compiled kernels here", allow_module_level=True)
# before the kernels, which Triton reads when they are imported
from tests.support import triton_interpreter

# isort: split
from fastvi.experimental import triton_calls
from fastvi.experimental import triton_woodbury as density

SHARED = [name for name, case in cases.CASES.items() if case.num_offsets < 2]
FLOAT32 = [name for name in SHARED if "steep" not in name]
RAGGED = cases.Case(3, 3, 2, dim=700)  # three programs of 256, the last one ragged


@pytest.fixture
def x64():
    """For all threads: XLA calls the interpreter from its own."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(triton_calls, "call", triton_interpreter.call)


@pytest.mark.parametrize("name", [*SHARED, "ragged"])
def test_draws_agree_with_dense_algebra(name, interpreted, x64):
    mixture, stacked = cases.make(cases.CASES.get(name, RAGGED), jnp.float64)
    # condition 1e7, as in tests/test_kernels.py
    assert_close(
        draws(density, mixture, stacked),
        draws(reference, mixture, stacked),
        3e-8 if "steep" in name else 1e-12,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FLOAT32, "ragged"])
def test_draws_in_float32_agree_with_float64(name, interpreted):
    case = cases.CASES.get(name, RAGGED)
    with enable_x64(True):
        expected = draws(xla, *cases.make(case, jnp.float64))
    assert_close(draws(density, *cases.make(case)), expected, 4e-6)


def test_chains_are_one_launch(interpreted, monkeypatch, x64):
    launches = []

    def counted(*args, **options):
        launches.append(options["grid"])
        return triton_interpreter.call(*args, **options)

    monkeypatch.setattr(triton_calls, "call", counted)
    chains = [cases.make(cases.CASES[name], jnp.float64) for name in ("shared", "shared_masked")]
    mixtures, noises = jax.tree_util.tree_map(lambda *leaves: np.stack(leaves), *chains)
    together = jax.device_get(jax.vmap(functools.partial(draws, density))(mixtures, noises))
    assert (1, 4) in launches  # two chains of two draws
    assert all(programs == 1 for programs, _ in launches)
    for index, (mixture, stacked) in enumerate(chains):
        alone = jax.tree_util.tree_map(lambda leaf, i=index: leaf[i], together)
        assert_close(alone, draws(reference, mixture, stacked), 1e-12)


def test_nan_in_nan_out(interpreted, x64):
    assert_nan_gives_nan(density, *cases.make(cases.CASES["shared"], jnp.float64))


def test_log_prob_can_be_differentiated(interpreted, x64):
    mixture, stacked = cases.make(cases.CASES["shared_masked"], jnp.float64)
    point = stacked.eps[0] + 0.3

    def gradient_of(implementation):
        slope = jax.grad(lambda m, p: implementation.log_prob(m, xla.grams(m), p), argnums=(0, 1))
        return quick_jit(slope)(mixture, point)

    assert_close(gradient_of(density), gradient_of(reference), 1e-11)


def test_what_is_missing_is_refused():
    mixture, stacked = cases.make(cases.CASES["component"])
    with pytest.raises(ConfigError, match="no means by component"):
        draws(density, mixture, stacked)
    if jax.default_backend() == "cpu":
        with pytest.raises(ConfigError, match="'triton'.*woodbury.*(runs on cuda|pip install)"):
            experimental.OPS["woodbury"].call("grams", "triton", mixture, None)


# The real compiler.


@functools.cache
def compiled():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).parents[1] / "support" / "triton_compile.py"
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", ["project", "residual"])
def test_sm_90_code_spills_nothing(kernel):
    registers, stack = compiled()["usage"][kernel]
    assert stack == 0
    assert registers <= 128  # at least four programs share a multiprocessor


def test_lowering_for_cuda_holds_the_kernels():
    if compiled()["launches"] is None:
        pytest.skip("needs jax-triton and a CUDA plugin of jax")
    assert compiled()["launches"] == 2


def test_every_experimental_kernel_is_tested():
    found = {
        implementation.module
        for op in experimental.OPS.values()
        for implementation in op.implementations.values()
    }
    assert found == {density.__name__}
