"""Variational families: what q is, and nothing of how it is fitted."""

from fastvi.families.backends import BACKENDS, AbstractBackend, register_backend
from fastvi.families.base import AbstractFamily, Draws, SecondMoment
from fastvi.families.flow import Flow, FlowParams
from fastvi.families.mfa import MFA, MFAParams

FAMILIES = {"mfa": MFA, "flow": Flow}

__all__ = [
    "BACKENDS",
    "FAMILIES",
    "MFA",
    "AbstractBackend",
    "AbstractFamily",
    "Draws",
    "Flow",
    "FlowParams",
    "MFAParams",
    "SecondMoment",
    "register_backend",
]
