"""Coordinates and a start for the fit, read off gradients and Hessian-vector products."""

from fastvi.geometry.curvature import Spectrum, block_krylov
from fastvi.geometry.start import Start, make_start
from fastvi.geometry.whitening import whitening_scale

__all__ = ["Spectrum", "Start", "block_krylov", "make_start", "whitening_scale"]
