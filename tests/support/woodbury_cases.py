"""Small inputs that every implementation must get right, shared by tests and benchmarks."""

import zlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi.kernels.woodbury.types import Mixture, Noise


class Case(NamedTuple):
    """One shape and one difficulty.

    Attributes:
        num_components: Components M.
        rank: Columns of each factor.
        num_core: Rows of the core.
        dim: Dimension.
        num_offsets: 0, 1 or M means.
        ranks: Columns in use for each component; the others are zero rows. Empty: all are in use.
        core_ranks: Rows of the core in use.
        steepness: Largest |b|^2 of a core row; the others are spread geometrically between 1 and
            it.
        matched: Whether factors are shaped like P^{-1/2}, as in a fit: they leave steep directions
            alone.
    """

    num_components: int = 1
    rank: int = 2
    num_core: int = 0
    dim: int = 7
    num_offsets: int = 1
    ranks: tuple[int, ...] = ()
    core_ranks: int | None = None
    steepness: float = 4.0
    matched: bool = False


# Cases of one shape share a compiled program.
CASES = {
    "diagonal": Case(rank=0, dim=1, num_offsets=0),
    "one_dimension": Case(2, 1, 1, dim=1, num_offsets=2),
    "core_only": Case(rank=0, num_core=4),
    "core_only_steep": Case(rank=0, num_core=4, steepness=1e7),
    "means_only": Case(3, 0, 0, dim=5, num_offsets=3),
    "seeds": Case(4, 2, 0, dim=33, num_offsets=0),
    "wide_rank": Case(2, 5, 1, dim=130, num_offsets=2),
    "rank_above_dim": Case(1, 5, 4, dim=3),
    "shared": Case(3, 3, 4, dim=33),
    "shared_masked": Case(3, 3, 4, dim=33, ranks=(0, 1, 3), core_ranks=2),
    "shared_unused": Case(3, 3, 4, dim=33, ranks=(0, 0, 0), core_ranks=0),
    "shared_steep": Case(3, 3, 4, dim=33, steepness=1e7, matched=True),
    # generic factors widen steep directions a million times: C_m is as ill-conditioned as it gets
    "shared_steep_crossed": Case(3, 3, 4, dim=33, steepness=1e7),
    "component": Case(3, 3, 4, dim=33, num_offsets=3),
    "component_masked": Case(3, 3, 4, dim=33, num_offsets=3, ranks=(2, 0, 3), core_ranks=3),
    "component_steep": Case(3, 3, 4, dim=33, num_offsets=3, steepness=1e7, matched=True),
}


def make(case: Case, dtype=jnp.float32, num_draws: int = 2) -> tuple[Mixture, Noise]:
    """Build a mixture and stacked noise; the same float32 numbers whatever the dtype."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    comp, rank, num_core, dim = case.num_components, case.rank, case.num_core, case.dim
    core = rng.normal(size=(num_core, dim))
    if num_core:
        in_use = np.arange(num_core) < (num_core if case.core_ranks is None else case.core_ranks)
        lengths = np.sqrt(np.geomspace(case.steepness, 1.0, num_core)) * in_use
        core *= (lengths / np.linalg.norm(core, axis=1))[:, None]
    factors = 0.7 * rng.normal(size=(comp, rank, dim)) / np.sqrt(max(1.0, dim / 8))
    if case.matched:
        values, vectors = np.linalg.eigh(np.eye(dim) + core.T @ core)
        factors = factors @ (vectors / np.sqrt(values)) @ vectors.T
    if case.ranks:
        factors *= (np.arange(rank) < np.asarray(case.ranks)[:, None])[..., None]
    logits = rng.normal(size=comp)
    mixture = Mixture(
        log_weights=logits - np.log(np.sum(np.exp(logits))),
        offsets=0.5 * rng.normal(size=(case.num_offsets, dim)),
        log_scale=0.4 * rng.normal(size=dim),
        core=core,
        factors=factors,
    )
    noise = Noise(
        label=np.arange(num_draws) % comp,
        eps=rng.normal(size=(num_draws, dim)),
        zeta=rng.normal(size=(num_draws, num_core)),
        z=rng.normal(size=(num_draws, rank)),
    )

    def cast(array):
        return (
            jnp.asarray(array)
            if array.dtype.kind == "i"
            else jnp.asarray(array.astype(np.float32), dtype)
        )

    return Mixture(*map(cast, mixture)), Noise(*map(cast, noise))
