"""Packages that an extra installs: imported when used, with the fix in the error when absent."""

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """Report a package that an extra of fastvi would have installed."""


def import_optional(module: str, *, extra: str, distribution: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Name of the module.
        extra: Extra of fastvi that installs it.
        distribution: Name of the package to a person.
        purpose: What needs it; begins the error.

    Raises:
        MissingExtraError: If the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(
            f'{purpose} needs {distribution}: pip install "fastvi[{extra}]"'
        ) from error
