"""Entry point of the mixture's pathwise gradient."""

from fastvi._errors import ConfigError
from fastvi._typing import Array, Float
from fastvi.kernels import _dispatch
from fastvi.kernels.mixture_grad import reference, xla
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise

__all__ = ["IMPLEMENTATIONS", "METRICS", "pullback"]

IMPLEMENTATIONS = {"reference": reference, "xla": xla}
METRICS = ("euclidean", "natural")


def pullback(
    mixture: Mixture,
    small: Grams,
    noise: Noise,
    drawn: Draw,
    cotangent: Float[Array, " dim"],
    *,
    metric: str = "euclidean",
    implementation: str | None = None,
) -> Mixture:
    """Pull `cotangent` (with respect to the displacement) back along the sampling path.

    With `cotangent = d log p/du - score` this is the sticking-the-landing gradient of the ELBO. The gradient of
    `log_weights` is not pathwise and comes back as zero; rows of components that were not drawn are zero.

    Args:
        mixture: The mixture.
        small: Its small matrices.
        noise: The noise of the draw.
        drawn: The draw.
        cotangent: Derivative of a function of the displacement, in whitened coordinates.
        metric: "euclidean" for the plain gradient. "natural" multiplies it by the leading part of the inverse
            Fisher matrix: P^{-1} D^{1/2} for offsets (which makes them steps in units of D^{1/2}), P^{-1} on the
            right for factors, P on the right for the core; that of log_scale is taken with `core D^{-1/2}` held
            fixed, so that a change of scale does not turn the steep directions. It costs no extra solve.
        implementation: "xla" (default) or "reference".

    Returns:
        The gradient in the shape of the mixture.

    Cost:
        O((core + rank) dim) and the write of the rank-1 terms, which fuse into an elementwise consumer.

    References:
        Roeder, Wu & Duvenaud, Sticking the Landing (2017).
    """
    if metric not in METRICS:
        raise ConfigError(f"metric must be one of {METRICS}; got {metric!r}.")
    chosen = _dispatch.select("mixture_grad", IMPLEMENTATIONS, implementation)
    return chosen.pullback(mixture, small, noise, drawn, cotangent, metric)
