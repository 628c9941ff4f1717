"""Variational families: what q is, and nothing of how it is fitted."""

from fastvi.families.base import AbstractFamily, Draws, SecondMoment
from fastvi.families.mfa import MFA, MFAParams

FAMILIES = {"mfa": MFA}

__all__ = ["FAMILIES", "MFA", "AbstractFamily", "Draws", "MFAParams", "SecondMoment"]
