"""Entry points of the Woodbury kernel."""

from fastvi._typing import Array, Float, Scalar
from fastvi.kernels._dispatch import Implementation, Op, jax_implementations
from fastvi.kernels.woodbury import xla
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise

# Pallas is a part of jax, of which not every version has the lowering by way of Triton.
_PALLAS = Implementation(
    "fastvi.kernels.woodbury.pallas", ("cuda",), ("jax.experimental.pallas.triton",)
)
OP = Op("woodbury", jax_implementations("woodbury") | {"pallas": _PALLAS})


def factor_grams(
    factors: Float[Array, "comp rank dim"], *, implementation: str | None = None
) -> Float[Array, "comp rank rank"]:
    """Compute A_m A_m^T for every component."""
    return OP.call("factor_grams", implementation, factors)


def grams(
    mixture: Mixture,
    factor_products: Float[Array, "comp rank rank"] | None = None,
    *,
    implementation: str | None = None,
) -> Grams:
    """Compute the small matrices of a mixture and their Cholesky factors.

    Args:
        mixture: The mixture.
        factor_products: `factor_grams(mixture.factors)` if it is known already.
        implementation: A name in `OP.implementations`; None for the platform's own.

    Returns:
        The matrices that `draw` and `log_prob` need; a failed factorisation shows as NaN.

    Cost:
        One read of core and factors; O((core^2 + comp rank (rank + core)) dim) operations.
    """
    return OP.call("grams", implementation, mixture, factor_products)


def precision_root(
    core: Float[Array, "core dim"], eps: Float[Array, "rows dim"], zeta: Float[Array, "rows core"]
) -> Float[Array, "rows dim"]:
    """Turn standard normals into rows distributed as N(0, P^{-1}) with P = I + core^T core."""
    return xla.precision_root(core, eps, zeta)


def draw(
    mixture: Mixture, grams: Grams, noise: Noise, *, implementation: str | None = None
) -> Draw:
    """Transform noise to a draw and evaluate log density, responsibilities and score there.

    Args:
        mixture: The mixture.
        grams: `grams(mixture)`.
        noise: The variables to transform.
        implementation: A name in `OP.implementations`; None for the platform's own.

    Returns:
        The draw in whitened coordinates; `log_prob` is the normalised density of the mixture there.

    Cost:
        O((core + comp rank) dim).
    """
    return OP.call("draw", implementation, mixture, grams, noise)


def log_prob(
    mixture: Mixture,
    grams: Grams,
    displacement: Float[Array, " dim"],
    *,
    implementation: str | None = None,
) -> Scalar:
    """Evaluate the normalised log density of the mixture at any point of whitened coordinates.

    Cost:
        O((core + comp rank) dim).
    """
    return OP.call("log_prob", implementation, mixture, grams, displacement)
