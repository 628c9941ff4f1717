"""The numbers of every kernel on this device, against float64 on the CPU."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi import experimental
from fastvi.kernels import OPS, mixture_grad, noise, woodbury
from fastvi.kernels._dispatch import Op, current_platform
from fastvi.kernels.order import upper_median
from fastvi.kernels.triangular import inverse_root

# Largest error in units of the largest entry. Single precision leaves 3e-6 of a small log density,
# products of 11 bits leave 1e-3.
ALLOWED = 1e-5
DENSE = 301  # entries up to which the reference, which is dense, takes seconds
COMPONENTS, RANK, CORE, PROBES = 3, 4, 5, 4


class Check(NamedTuple):
    """A kernel by one implementation, what it must give, and by how much it may miss that."""

    kernel: str
    implementation: str
    dim: int
    reference: str
    actual: Callable[[], Any]
    expected: Callable[[], Any]
    allowed: float = ALLOWED


def implementations(kernel: str) -> dict[str, Op]:
    """Return what runs here by name, the experimental ones too, the reference left out."""
    return {
        name: ops[kernel]
        for ops in (OPS, experimental.OPS)
        if kernel in ops
        for name, one in ops[kernel].implementations.items()
        if name != "reference" and one.obstacle(current_platform()) is None
    }


def of_woodbury(op: Op, name: str) -> Callable[..., Any]:
    """Return the small matrices, a draw, and the density at another point."""

    def call(mixture, given):
        small = op.call("grams", name, mixture, None)
        drawn = op.call("draw", name, mixture, small, given)
        return small, drawn, op.call("log_prob", name, mixture, small, given.eps)

    return call


def of_mixture_grad(op: Op, name: str) -> Callable[..., Any]:
    """Return the gradients in both metrics, and factors of one component moved twice."""

    def call(mixture, given):
        small, drawn, _ = of_woodbury(OPS["woodbury"], "xla")(mixture, given)
        slopes = [
            op.call("pullback", name, mixture, small, given, drawn, drawn.score, metric=metric)
            for metric in mixture_grad.METRICS
        ]
        moves = jnp.stack([given.z, -2 * given.z])[:, None], jnp.stack([given.eps] * 2)[:, None]
        labels = jnp.asarray([1, 1], jnp.int32)
        return slopes, op.call("update_factors", name, mixture.factors, labels, *moves)

    return call


def of_hutchinson(op: Op, name: str) -> Callable[..., Any]:
    """Return the diagonal and the trace of a diagonal operator plus a product of two vectors."""

    def call(mixture, given):
        turned = jnp.stack([jnp.roll(given.eps, place) for place in range(PROBES)])
        probes = jnp.where(turned > 0, 1, -1).astype(turned.dtype)

        def operator(v):
            return mixture.log_scale * v + given.eps * (given.eps @ v) / v.size

        return [
            op.call(function, name, probes, operator=operator)
            for function in ("diagonal", "trace_samples")
        ]

    return call


KERNELS = {
    "woodbury": of_woodbury,
    "mixture_grad": of_mixture_grad,
    "hutchinson": of_hutchinson,
}


def inputs(dim: int) -> tuple[Any, Any]:
    """Return a mixture with a core and unequal weights, and the noise of one draw."""
    rng = np.random.default_rng(0)
    root = np.sqrt(dim)
    mixture = woodbury.Mixture(
        log_weights=np.log([0.5, 0.3, 0.2]),
        offsets=rng.normal(size=(1, dim)),
        log_scale=0.3 * rng.normal(size=dim),
        core=rng.normal(size=(CORE, dim)) / root,
        factors=rng.normal(size=(COMPONENTS, RANK, dim)) / root,
    )
    given = woodbury.Noise(
        label=np.int32(1),
        eps=rng.normal(size=dim),
        zeta=rng.normal(size=CORE),
        z=rng.normal(size=RANK),
    )
    return jax.tree_util.tree_map(
        lambda leaf: jnp.asarray(leaf, jnp.float32 if leaf.dtype.kind == "f" else leaf.dtype),
        (mixture, given),
    )


def exact(function: Callable[..., Any], arguments: Any) -> Any:
    """Evaluate in float64 on the CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        wide = jax.tree_util.tree_map(
            lambda leaf: jax.device_put(
                np.asarray(leaf, np.float64 if leaf.dtype.kind == "f" else leaf.dtype), cpu
            ),
            arguments,
        )
        return jax.tree_util.tree_map(np.asarray, jax.jit(function)(*wide))


def largest_error(actual: Any, expected: Any) -> float:
    """Return the largest difference in units of each leaf's largest entry; NaN beats all."""
    errors = [
        np.max(np.abs(np.asarray(got, np.float64) - want), initial=0.0)
        / max(np.max(np.abs(want), initial=0.0), 1e-30)
        for got, want in zip(*map(jax.tree_util.tree_leaves, (actual, expected)), strict=True)
    ]
    return float(np.max(errors))


def checks(dim: int) -> Iterator[Check]:
    """Return a check for every kernel and implementation that runs here."""
    reference = "reference" if dim <= DENSE else "xla"
    arguments = inputs(dim)
    for kernel, build in KERNELS.items():
        for name, op in implementations(kernel).items():
            expected = functools.partial(exact, build(OPS[kernel], reference), arguments)
            actual = functools.partial(jax.jit(build(op, name)), *arguments)
            yield Check(kernel, name, dim, f"{reference}, float64", actual, expected)
    yield from _of_one_implementation(dim)


def _of_one_implementation(dim: int) -> Iterator[Check]:
    """Return checks of the kernels that are chosen by no name."""
    key, cpu = jax.random.key(0), jax.devices("cpu")[0]

    def on_cpu(function: Callable[[Any], Any]) -> Callable[[], Any]:
        def call():
            with jax.default_device(cpu):
                return np.asarray(function(jax.random.key(0)))

        return call

    yield Check(
        "noise.words",
        "xla",
        dim,
        "jax.random.bits",
        lambda: jax.jit(lambda key: noise.words(key, dim))(key),
        on_cpu(lambda key: jax.random.bits(key, (dim,), jnp.uint32)),
        allowed=0.0,
    )
    yield Check(
        "noise.normal",
        "xla",
        dim,
        "jax.random.normal",
        lambda: jax.jit(lambda key: noise.normal(key, (dim,)))(key),
        on_cpu(lambda key: jax.random.normal(key, (dim,))),
    )
    values = np.abs(np.random.default_rng(1).normal(size=dim)).astype(np.float32)
    yield Check(
        "order.upper_median",
        "xla",
        dim,
        "numpy.sort",
        lambda: jax.jit(upper_median)(values),
        lambda: np.sort(values)[dim // 2],
        allowed=0.0,
    )
    rows = np.random.default_rng(2).normal(size=(2, 9, 9)).astype(np.float32)
    grams = rows @ np.swapaxes(rows, 1, 2) / 9
    yield Check(
        "triangular.inverse_root",
        "xla",
        9,
        "float64",
        lambda: jax.jit(jax.vmap(inverse_root))(grams).root,
        lambda: np.linalg.inv(np.linalg.cholesky(np.eye(9) + grams)),
    )


def row(check: Check) -> dict[str, Any]:
    """Carry a check out; return a row of gpu_numbers.csv."""
    error = largest_error(check.actual(), check.expected())
    return {
        "kernel": check.kernel,
        "implementation": check.implementation,
        "dim": check.dim,
        "reference": check.reference,
        "error": error,
        "allowed": check.allowed,
        "is_right": error <= check.allowed,
    }
