"""The words in which people configure a run, and the rules that they obey."""

from fastvi.config.nested import FlowConfig
from fastvi.config.vi import VIConfig

__all__ = ["FlowConfig", "VIConfig"]
