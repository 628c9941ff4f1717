"""Libraries of normalizing flows that the flow family can use."""

from fastvi.families.backends.base import AbstractBackend
from fastvi.families.backends.native import NativeBackend

BACKENDS: dict[str, type[AbstractBackend]] = {"native": NativeBackend}

__all__ = ["BACKENDS", "AbstractBackend", "NativeBackend"]
