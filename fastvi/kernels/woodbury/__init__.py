"""Masked Woodbury.

Draw from a mixture of factor analyzers and evaluate its density and score in one pass.
"""

from fastvi.kernels.woodbury.api import (
    Draw,
    Grams,
    Mixture,
    Noise,
    draw,
    factor_grams,
    grams,
    log_prob,
    precision_root,
)

__all__ = [
    "Draw",
    "Grams",
    "Mixture",
    "Noise",
    "draw",
    "factor_grams",
    "grams",
    "log_prob",
    "precision_root",
]
