"""Compile the Triton kernels for sm_90 and lower draws for CUDA.

Print registers, stack and launches as JSON.

A program of its own: with the interpreter switched on, Triton has no compiler.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile

os.environ.update(TRITON_INTERPRET="0", TRITON_CACHE_DIR=tempfile.mkdtemp())

import jax
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvi.experimental import triton_calls, triton_kernels
from fastvi.experimental import triton_woodbury as density
from fastvi.kernels.woodbury import xla
from tests.support import woodbury_cases as cases

SIZES = {
    "dim": 1_000_000,
    "rank": 8,
    "num_core": 64,
    "num_rows": 64,
}
CONSTANTS = {**SIZES, "block": triton_calls.BLOCK, "tile": triton_calls.TILE}
KERNELS = (triton_kernels.project, triton_kernels.residual)


def usage(kernel):
    """Return registers and bytes of stack of a thread."""
    constants = {name: CONSTANTS[name] for name in kernel.arg_names if name in CONSTANTS}
    kinds = {"label": "*i32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    options = {"num_warps": triton_calls.WARPS, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    return [int(number) for number in found.groups()]


def launches():
    """Count the kernels in draws lowered for CUDA.

    None without jax-triton and a CUDA plugin of jax.
    """
    if (
        importlib.util.find_spec("jax_triton") is None
        or importlib.util.find_spec("jax_cuda12_plugin") is None
    ):
        return None
    triton_calls.call = functools.partial(triton_calls.call, compute_capability=90)
    mixture, stacked = cases.make(cases.CASES["shared"])

    def step(mixture, stacked):
        return jax.vmap(functools.partial(density.draw, mixture, xla.grams(mixture)))(stacked)

    text = jax.jit(step).trace(mixture, stacked).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("triton_kernel_call")


json.dump(
    {"usage": {kernel.__name__: usage(kernel) for kernel in KERNELS}, "launches": launches()},
    sys.stdout,
)
