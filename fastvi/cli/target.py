"""What a command estimates on: `module:function`, or a run folder that remembers one."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastvi._errors import ConfigError, DataError
from fastvi.config import VIConfig
from fastvi.runs import CONFIG_FILE, Origin, read_origin

FORM = "module:function, whose function returns (loss_fn, params, data), or a run folder"


class Problem(NamedTuple):
    """Arguments of `estimate_llc`."""

    loss_fn: Callable[..., Any]
    params: Any
    data: Any


def resolve(target: str) -> tuple[str, Origin | None, VIConfig | None]:
    """Return `module:function`, and where the target is a run folder what it remembers.

    Raises:
        ConfigError: If the target is neither.
        DataError: If the folder remembers no target.
    """
    if Path(target).is_dir():
        origin = read_origin(target)
        if origin.target is None:
            raise DataError(f"{target} was written by a demo, which has no target to load. Run the demo again.")
        return origin.target, origin, VIConfig.create(Path(target) / CONFIG_FILE)
    if target.count(":") != 1 or not all(part.strip() for part in target.split(":")):
        raise ConfigError(f"TARGET must be {FORM}; got {target!r}.")
    return target, None, None


def load(target: str) -> Problem:
    """Import the module, from the current folder too, and call the function.

    Raises:
        ConfigError: If there is no such module or function.
        DataError: If the function fails, or returns something else than a loss, parameters and data.
    """
    module_name, _, name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"TARGET {target!r}: {error}. Run fastvi where {module_name} can be imported.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"TARGET {target!r}: {module_name} has no function {name!r}.")
    try:
        found: Any = function()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise DataError(f"TARGET {target!r} failed: {type(error).__name__}: {reason}") from error
    if not isinstance(found, (tuple, list)) or len(found) != 3 or not callable(found[0]):
        raise DataError(f"TARGET {target!r} must return (loss_fn, params, data); got {type(found).__name__}.")
    return Problem(*found)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `NAME=VALUE` with values as YAML writes them.

    Raises:
        ConfigError: If a pair is not one.
    """
    import yaml

    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes NAME=VALUE, for example --set M=16; got {pair!r}.")
        settings[name] = yaml.safe_load(value)
    return settings


def settle_localization(given: float | None, config: VIConfig, default: float) -> float:
    """Return the localization: as given, else `gamma` of the configuration, else the default."""
    return given if given is not None else config.gamma if config.gamma is not None else default
