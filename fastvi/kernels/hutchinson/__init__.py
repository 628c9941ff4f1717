"""Hutchinson estimators of the diagonal and the trace of a symmetric operator."""

from fastvi.kernels.hutchinson.api import diagonal, rademacher, trace_samples

__all__ = ["diagonal", "rademacher", "trace_samples"]
