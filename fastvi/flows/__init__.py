"""Normalizing flows with explicit parameters."""

from fastvi.flows.assemble import (
    analyze_mask_coverage,
    assemble_bijection,
    assemble_flow,
    create_feature_extractor,
    make_alternating_mask,
)
from fastvi.flows.builders import (
    BuilderOptions,
    build_maf,
    build_realnvp,
    build_spline_maf,
    build_spline_realnvp,
)
from fastvi.flows.distributions import AbstractBase, DiagNormal, StandardNormal, draw_noise
from fastvi.flows.elementwise import AbstractElementwise, BoundedAffine, RationalQuadratic
from fastvi.flows.flow import Bijection, Flow
from fastvi.flows.networks import ResNet
from fastvi.flows.transforms import (
    AbstractTransform,
    CompositeTransform,
    Coupling,
    LinearTransform,
    LoftTransform,
    MaskedAutoregressive,
    Permutation,
)

__all__ = [
    "AbstractBase",
    "AbstractElementwise",
    "AbstractTransform",
    "Bijection",
    "BoundedAffine",
    "BuilderOptions",
    "CompositeTransform",
    "Coupling",
    "DiagNormal",
    "Flow",
    "LinearTransform",
    "LoftTransform",
    "MaskedAutoregressive",
    "Permutation",
    "RationalQuadratic",
    "ResNet",
    "StandardNormal",
    "analyze_mask_coverage",
    "assemble_bijection",
    "assemble_flow",
    "build_maf",
    "build_realnvp",
    "build_spline_maf",
    "build_spline_realnvp",
    "create_feature_extractor",
    "draw_noise",
    "make_alternating_mask",
]
