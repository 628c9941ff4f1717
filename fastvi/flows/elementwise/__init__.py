"""Bijections of single numbers, whose parameters a network gives.

What coupling and autoregressive layers apply.
"""

from fastvi.flows.elementwise.affine import BoundedAffine
from fastvi.flows.elementwise.base import AbstractElementwise
from fastvi.flows.elementwise.spline import RationalQuadratic

__all__ = ["AbstractElementwise", "BoundedAffine", "RationalQuadratic"]
