"""Array kernels of the hot paths.

One folder an operation, each with a dense reference that defines it.
"""

from fastvi.kernels.registry import OPS, show

__all__ = ["OPS", "show"]
