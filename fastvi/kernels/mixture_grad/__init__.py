"""Pull a cotangent at a draw back to the parameters of the mixture."""

from fastvi.kernels.mixture_grad.api import METRICS, directions, pullback, update_factors

__all__ = ["METRICS", "directions", "pullback", "update_factors"]
