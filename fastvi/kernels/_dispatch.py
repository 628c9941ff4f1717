"""Choice of an implementation: a named one is honoured or refused with the reason."""

from collections.abc import Mapping
from types import ModuleType

from fastvi._errors import ConfigError


def select(op: str, implementations: Mapping[str, ModuleType], implementation: str | None) -> ModuleType:
    """Return the module that implements `op`.

    Args:
        op: Name of the kernel, for the message.
        implementations: What exists, by name.
        implementation: A name, or None for the default, "xla".

    Raises:
        ConfigError: If the named implementation does not exist for this kernel.
    """
    name = "xla" if implementation is None else implementation
    if name not in implementations:
        raise ConfigError(
            f"implementation of kernel {op!r} must be one of {sorted(implementations)} or None; got {name!r}."
        )
    return implementations[name]
