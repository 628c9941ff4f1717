"""Libraries of normalizing flows that the flow family can use."""

import difflib
from typing import Any

from fastvi._errors import ConfigError
from fastvi.families.backends.base import AbstractBackend
from fastvi.families.backends.flowjax import FlowJAXBackend
from fastvi.families.backends.native import NativeBackend
from fastvi.families.backends.nux import NuxBackend

BACKENDS: dict[str, type[AbstractBackend]] = {
    "native": NativeBackend,
    "flowjax": FlowJAXBackend,
    "nux": NuxBackend,
}

__all__ = [
    "BACKENDS",
    "AbstractBackend",
    "FlowJAXBackend",
    "NativeBackend",
    "NuxBackend",
    "register_backend",
]


def register_backend(name: str, backend: Any) -> None:
    """Make a library of flows available as `VIConfig(backend=name)`.

    Args:
        name: Its name; an earlier backend of this name is replaced.
        backend: A class derived from `AbstractBackend`.

    Raises:
        ConfigError: If it is not such a class.
    """
    if not (isinstance(backend, type) and issubclass(backend, AbstractBackend)):
        raise ConfigError(f"backend must be a class derived from AbstractBackend; got {backend!r}.")
    BACKENDS[name] = backend


def find_backend(name: str) -> type[AbstractBackend]:
    """Return the backend of a name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, 1, 0.5)
        fix = (
            f"did you mean {near[0]!r}?" if near else "or register one with fastvi.register_backend"
        )
        raise ConfigError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}: {fix}."
        )
    return BACKENDS[name]
