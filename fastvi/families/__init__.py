"""Variational families: what q is, and nothing of how it is fitted."""

from fastvi.families.base import AbstractFamily, Draws, SecondMoment
from fastvi.families.flow import Flow, FlowParams
from fastvi.families.mfa import MFA, MFAParams

FAMILIES = {"mfa": MFA, "flow": Flow}

__all__ = ["FAMILIES", "MFA", "AbstractFamily", "Draws", "Flow", "FlowParams", "MFAParams", "SecondMoment"]
