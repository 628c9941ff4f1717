"""The words in which people configure a run, and the rules that they obey."""

from fastvi.config.vi import FlowConfig, VIConfig

__all__ = ["FlowConfig", "VIConfig"]
