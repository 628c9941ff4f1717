"""Choice of an implementation.

By platform, or a named one, which is honoured or refused with the reason.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.extend

from fastvi._errors import ConfigError

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Implementation(NamedTuple):
    """Where an implementation lives and what it takes to run it.

    Attributes:
        module: The module, imported when it is first chosen.
        platforms: Where it runs.
        packages: What it imports beyond the core, or parts of jax that not every version has.
        extra: The extra that installs them, None for parts of jax.
    """

    module: str
    platforms: tuple[str, ...] = PLATFORMS
    packages: tuple[str, ...] = ()
    extra: str | None = None

    def load(self) -> ModuleType:
        """Import the module."""
        return importlib.import_module(self.module)

    def obstacle(self, platform: str) -> str | None:
        """Say what keeps it from running on this machine, None if nothing does."""
        # Packages are looked for without being imported: what nobody chose is not loaded.
        missing = [
            package for package in self.packages if importlib.util.find_spec(package) is None
        ]
        if missing:
            cure = (
                ", which this jax does not have"
                if self.extra is None
                else f": pip install 'fastvi[{self.extra}]'"
            )
            return f"it needs {' and '.join(missing)}{cure}"
        if platform not in self.platforms:
            return f"it runs on {' and '.join(self.platforms)}, and this machine has {platform}"
        return None


class Op(NamedTuple):
    """A kernel: its implementations, and the one that is chosen where no name is given.

    Attributes:
        name: Name of the folder.
        implementations: What exists, by name.
        defaults: Implementation by platform where it is not "xla".
    """

    name: str
    implementations: Mapping[str, Implementation]
    defaults: Mapping[str, str] = {}

    def default(self, platform: str) -> str:
        """Return the name of the implementation for a platform."""
        return self.defaults.get(platform, "xla")

    def call(self, function: str, implementation: str | None, *args: Any, **options: Any) -> Any:
        """Run a function of the named implementation.

        Without a name it is the default of the platform that the program runs on.
        """
        if implementation is not None:
            return getattr(self.select(implementation), function)(*args, **options)

        # `platform_dependent` passes arrays alone, so that options are bound before.
        def of(name: str) -> Callable[..., Any]:
            return functools.partial(
                getattr(self.implementations[name].load(), function), **options
            )

        branches = {platform: of(name) for platform, name in self.defaults.items()}
        if not branches:
            return of("xla")(*args)
        # The platform is that of the lowering, which need not be the default of this machine.
        return jax.lax.platform_dependent(*args, **branches, default=of("xla"))

    def select(self, implementation: str) -> ModuleType:
        """Return the module that implements the kernel.

        Raises:
            ConfigError: If it does not exist for this kernel, or cannot run on this machine.
        """
        if implementation not in self.implementations:
            raise ConfigError(
                f"implementation of kernel {self.name!r} must be one of "
                f"{sorted(self.implementations)} or None; got {implementation!r}."
            )
        chosen = self.implementations[implementation]
        obstacle = chosen.obstacle(current_platform())
        if obstacle is not None:
            raise ConfigError(
                f"implementation {implementation!r} of kernel {self.name!r} was asked for, but "
                f"{obstacle}."
            )
        return chosen.load()


def jax_implementations(op: str) -> dict[str, Implementation]:
    """Return the implementations that every kernel has."""
    return {name: Implementation(f"fastvi.kernels.{op}.{name}") for name in ("reference", "xla")}


def current_platform() -> str:
    """Return the platform that programs run on by default, "cuda" and "rocm" told apart."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.extend.backend.get_backend().platform_version.lower() else "cuda"
