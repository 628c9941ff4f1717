"""Entry points of the Hutchinson kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Key
from fastvi.kernels._dispatch import Op, jax_implementations

OP = Op("hutchinson", jax_implementations("hutchinson"))

Operator = Callable[[Float[Array, " dim"]], Float[Array, " dim"]]


def rademacher(
    key: Key, num_probes: int, dim: int, dtype=jnp.float32
) -> Float[Array, "probes dim"]:
    """Draw probes with independent entries of plus or minus one."""
    return jax.random.rademacher(key, (num_probes, dim), dtype)


def diagonal(
    operator: Operator, probes: Float[Array, "probes dim"], *, implementation: str | None = None
) -> Float[Array, " dim"]:
    """Estimate the diagonal as the mean of `z * (H z)`; exact for a diagonal operator.

    Cost:
        One application of the operator for each probe ("reference" builds the matrix).

    References:
        Bekas, Kokiopoulou & Saad (2007).
    """
    return OP.call("diagonal", implementation, probes, operator=operator)


def trace_samples(
    operator: Operator, probes: Float[Array, "probes dim"], *, implementation: str | None = None
) -> Float[Array, " probes"]:
    """Evaluate `z . H z` for each probe: independent unbiased estimates of the trace."""
    return OP.call("trace_samples", implementation, probes, operator=operator)
