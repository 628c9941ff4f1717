"""Pull a cotangent at a draw back to the parameters of the mixture."""

from fastvi.kernels.mixture_grad.api import METRICS, pullback

__all__ = ["METRICS", "pullback"]
