"""Try every implementation of the kernels on a GPU, numbers and speed: python -m bench.gpu.

Prints a table and appends it to bench/results/gpu.csv; commit the rows. `ratio` is the time over
that of a copy of the bytes that the kernel must move, `error` the largest difference from float64
on the CPU in units of the largest entry. An implementation becomes the default of a platform
(`Op.defaults`) when a row here puts it before XLA.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from bench.bench_kernels import COMPONENTS, RANK, mixture
from bench.harness import against, as_text, record
from fastvi.kernels import OPS, mixture_grad, show, woodbury

SIZES = (100_000, 1_000_000, 10_000_000)
ROUNDS = 50
LARGEST_CHECKED = 1_000_000


def cases(dim):
    """Return functions of an implementation, arguments and bytes."""
    parameters, noise = mixture(dim)
    grams = jax.jit(woodbury.grams)(parameters)
    factor_bytes, vector = 4 * COMPONENTS * RANK * dim, 4 * dim
    update = (
        parameters.factors,
        jnp.asarray([3], jnp.int32),
        jnp.ones((1, 1, RANK)),
        noise.eps[None, None],
    )
    return {
        "woodbury": (woodbury.draw, (parameters, grams, noise), 2 * factor_bytes + 6 * vector),
        "mixture_grad": (
            mixture_grad.update_factors,
            update,
            2 * factor_bytes // COMPONENTS + vector,
        ),
    }


def exact(function, arguments):
    """Evaluate in float64 on the CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        wide = jax.tree_util.tree_map(
            lambda leaf: jnp.asarray(
                np.asarray(leaf, np.float64 if leaf.dtype.kind == "f" else leaf.dtype)
            ),
            arguments,
        )
        return jax.tree_util.tree_map(np.asarray, function(*wide, implementation="xla"))


def largest_error(actual, expected):
    """Return the largest difference in units of each leaf's largest entry."""
    errors = [
        np.max(np.abs(np.asarray(got) - want), initial=0.0)
        / max(np.max(np.abs(want), initial=0.0), 1e-30)
        for got, want in zip(*map(jax.tree_util.tree_leaves, (actual, expected)), strict=True)
    ]
    return float(max(errors))


def rows_of(kernel, function, arguments, least, dim):
    """Time all implementations that run here, with a copy between them."""
    buffer = jnp.ones(least // 8, jnp.float32)
    calls = {"copy": lambda copied=jax.jit(lambda array: array + 0): copied(buffer)}
    errors = {}
    for name, implementation in OPS[kernel].implementations.items():
        if name == "reference" or implementation.obstacle("cuda") is not None:
            continue
        compiled = jax.jit(lambda *args, name=name: function(*args, implementation=name))
        calls[name] = lambda compiled=compiled: compiled(*arguments)
        if dim <= LARGEST_CHECKED:
            errors[name] = largest_error(compiled(*arguments), exact(function, arguments))
    timings = against("copy", calls, ROUNDS)
    bandwidth = least / timings["copy"].seconds[1] / 1e9
    return [
        {
            "kernel": kernel,
            "implementation": name,
            "dim": dim,
            "ratio": timings[name].ratio[1],
            "ratio_p20": timings[name].ratio[0],
            "ratio_p80": timings[name].ratio[2],
            "gb_per_s": least / timings[name].seconds[1] / 1e9,
            "device_copy_gb_per_s": bandwidth,
            "error": errors.get(name, float("nan")),
        }
        for name in calls
        if name != "copy"
    ]


def main():
    """Run where there is a GPU; elsewhere say so."""
    show()
    if jax.default_backend() != "gpu":
        print(f"no GPU: jax sees {jax.devices()}. Nothing was measured and no row written.")
        return 1
    rows = []
    for dim in SIZES:
        for kernel, (function, arguments, least) in cases(dim).items():
            rows += rows_of(kernel, function, arguments, least, dim)
    print(as_text(rows))
    record("gpu", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
