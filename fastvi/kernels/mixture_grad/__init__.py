"""Pull a cotangent at a draw back to the parameters of the mixture."""

from fastvi.kernels.mixture_grad.api import METRICS, pullback, update_factors
from fastvi.kernels.mixture_grad.types import Gradient

__all__ = ["METRICS", "Gradient", "pullback", "update_factors"]
