"""Entry point of the mixture's pathwise gradient."""

from fastvi._errors import ConfigError
from fastvi._typing import Array, Float, Int
from fastvi.kernels._dispatch import Op, jax_implementations
from fastvi.kernels.mixture_grad.types import Gradient
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise

OP = Op("mixture_grad", jax_implementations("mixture_grad"))
METRICS = ("euclidean", "natural")


def pullback(
    mixture: Mixture,
    grams: Grams,
    noise: Noise,
    drawn: Draw,
    cotangent: Float[Array, " dim"],
    *,
    metric: str = "euclidean",
    implementation: str | None = None,
) -> Gradient:
    """Pull `cotangent` (with respect to the displacement) back along the sampling path.

    With `cotangent = d log p/du - score` this is the sticking-the-landing gradient of the ELBO. The
    gradient of `log_weights` is not pathwise and is not here. Rows of means that were not drawn are
    zero.

    Args:
        mixture: The mixture.
        grams: Its small matrices.
        noise: The noise of the draw.
        drawn: The draw.
        cotangent: Derivative of a function of the displacement, in whitened coordinates.
        metric: "euclidean" for the plain gradient. "natural" multiplies it by the leading part of
            the inverse Fisher matrix: P^{-1} D^{1/2} for offsets (which makes them steps in units
            of D^{1/2}), P^{-1} on the right for factors, P on the right for the core; that of
            log_scale is taken with `core D^{-1/2}` held fixed, so that a change of scale does not
            turn the steep directions. It costs no extra solve.
        implementation: A name in `OP.implementations`; None for the platform's own.

    Cost:
        O((core + rank) dim) and the write of the core's rank-1 terms, which fuse into an
        elementwise consumer.

    Raises:
        ConfigError: If the metric or the implementation is unknown.

    References:
        Roeder, Wu & Duvenaud, Sticking the Landing (2017).
    """
    if metric not in METRICS:
        raise ConfigError(f"metric must be one of {METRICS}; got {metric!r}.")
    return OP.call(
        "pullback", implementation, mixture, grams, noise, drawn, cotangent, metric=metric
    )


def update_factors(
    factors: Float[Array, "comp rank dim"],
    labels: Int[Array, " blocks"],
    left: Float[Array, "blocks terms rank"],
    right: Float[Array, "blocks terms dim"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "comp rank dim"], Float[Array, "blocks rank rank"]]:
    """Add `sum_t left[b, t] right[b, t]^T` to the factor of component `labels[b]`.

    It is in place where the array is free. A label may come twice. The second result is `A A^T` of
    the components that moved, as they are at the end.

    Cost:
        One read and one write of the factors that move.
    """
    return OP.call("update_factors", implementation, factors, labels, left, right)
