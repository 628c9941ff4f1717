"""Invertible transforms, one in each file, and their composition."""

from fastvi.flows.transforms.base import AbstractTransform
from fastvi.flows.transforms.composite import CompositeTransform
from fastvi.flows.transforms.coupling import Coupling
from fastvi.flows.transforms.linear import LinearTransform
from fastvi.flows.transforms.loft import LoftTransform
from fastvi.flows.transforms.masked_autoregressive import MaskedAutoregressive
from fastvi.flows.transforms.permutation import Permutation

__all__ = [
    "AbstractTransform",
    "CompositeTransform",
    "Coupling",
    "LinearTransform",
    "LoftTransform",
    "MaskedAutoregressive",
    "Permutation",
]
