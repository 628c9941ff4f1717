"""Small operators that every implementation must get right, shared by tests and benchmarks."""

import zlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float


class Case(NamedTuple):
    """A symmetric matrix.

    Its dimension, the number of probes, whether it is diagonal, and its scale.
    """

    dim: int
    num_probes: int
    diagonal: bool = False
    scale: float = 1.0


CASES = {
    "scalar": Case(1, 1),
    "one_probe": Case(5, 1),
    "ragged": Case(33, 7),
    "diagonal": Case(12, 3, diagonal=True),
    "steep": Case(17, 4, scale=1e7),
}


def make(
    case: Case, dtype=jnp.float32
) -> tuple[Float[Array, "dim dim"], Float[Array, "probes dim"]]:
    """Build the matrix and Rademacher probes; the same float32 numbers whatever the dtype."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    matrix = rng.normal(size=(case.dim, case.dim))
    matrix = case.scale * (np.diag(np.diag(matrix)) if case.diagonal else 0.5 * (matrix + matrix.T))
    probes = rng.choice([-1.0, 1.0], size=(case.num_probes, case.dim))
    return jnp.asarray(matrix.astype(np.float32), dtype), jnp.asarray(
        probes.astype(np.float32), dtype
    )
