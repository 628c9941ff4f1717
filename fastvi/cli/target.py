"""What a command estimates on: `module:function`, or a run folder that remembers one."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from fastvi._errors import ConfigError, DataError
from fastvi.config import VIConfig
from fastvi.config.sources import parse_yaml
from fastvi.integrations.checkpoints import load_checkpoint
from fastvi.results.files import first_line
from fastvi.results.runs import (
    CONFIG_FILE,
    RunRecord,
    check_target,
    read_record,
    read_settings,
)
from fastvi.target.preview import masks_by_name
from fastvi.target.restrict import restrict_to_each

# A setting of each option that takes some, as errors show it.
EXAMPLES = {"--set": "M=16", "--launch": "timeout_min=240"}


class ModelArguments(NamedTuple):
    """Arguments of `estimate_llc`."""

    loss_fn: Callable[..., Any]
    params: Any
    data: Any


class Resolved(NamedTuple):
    """A target, and where it came from a run folder what that remembers."""

    target: str
    before: RunRecord | None = None
    config: VIConfig | None = None


def resolve(target: str, *, trust: bool) -> Resolved:
    """Return `module:function`, and where the target is a run folder what it remembers.

    Args:
        target: What the person named.
        trust: Whether code that a run folder names, rather than the person, may run.

    Raises:
        ConfigError: If the target is neither, or a run folder's without trust.
        DataError: If the folder remembers no target, or is damaged.
    """
    if not target or not Path(target).is_dir():
        return Resolved(check_target(target))
    record = read_record(target)
    named = record.origin.target
    if named is None:
        raise DataError(
            f"{target} was written by a demo, which has no target to load. Run the demo again."
        )
    config = read_settings(Path(target))
    if not trust:
        raise ConfigError(
            f"the run folder {target} asks for {named!r}: {_whereabouts(named)} would be imported "
            f"and run. Pass --trust if you trust it, or name it yourself: fastvi llc {named} "
            f"--config {Path(target) / CONFIG_FILE}."
        )
    return Resolved(named, record, config)


def _whereabouts(target: str) -> str:
    """Say which file a target's package is in, without running any of it."""
    top = target.partition(":")[0].partition(".")[0]
    spec = PathFinder.find_spec(top, [*sys.path, os.getcwd()])
    if spec is None:
        return f"the module {top}" + (
            " of Python" if top in sys.stdlib_module_names else ", which is not found here,"
        )
    return spec.origin or ", ".join(spec.submodule_search_locations or ["a folder"])


def load(target: str, params: str | None = None) -> ModelArguments:
    """Import the module, from the current folder too, and call the function.

    The current folder comes last on the path: a file in it is no stand-in for a module of Python or
    of a package that fastvi itself imports later.

    Args:
        target: `module:function`.
        params: Checkpoint whose parameters take the place of the function's, `PATH` or `PATH:PART`.

    Raises:
        ConfigError: If there is no such module or function, or another module goes before the one
            in the folder.
        DataError: If the module or the function fails, or returns something else than a loss,
            parameters and data; or if the checkpoint cannot be read or is of another model.
    """
    module_name, _, name = target.partition(":")
    # Entries of sys.path may be relative, as "" is.
    if os.getcwd() not in map(os.path.abspath, sys.path):
        sys.path.append(os.getcwd())
    # The finders remember what a folder held, and the file may be newer.
    importlib.invalidate_caches()
    _check_not_hidden(target, module_name.partition(".")[0])
    # What runs here is the person's own code, which may raise anything, or leave by sys.exit. All
    # of it is told: the type, the words and the places, and the error itself is the cause of ours.
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name, None)
    except ModuleNotFoundError as error:
        # Only the target or a package that it is in is for the person to find.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed(target, error) from error
        raise ConfigError(
            f"TARGET {target!r}: {error}. Run fastvi where {module_name} can be imported."
        ) from error
    except (Exception, SystemExit) as error:
        raise _failed(target, error) from error
    if not callable(function):
        # A namespace package and a built-in module have no file.
        file = getattr(module, "__file__", None)
        place = f" in {file}" if file else ""
        raise ConfigError(f"TARGET {target!r}: {module_name} has no function {name!r}{place}.")
    try:
        found: Any = function()
    except (Exception, SystemExit) as error:
        raise _failed(target, error) from error
    arguments = _arguments(target, found)
    if params is None:
        return arguments
    return arguments._replace(params=read_params(params, arguments.params))


def _arguments(target: str, found: Any) -> ModelArguments:
    """Read `(loss_fn, params, data)`, or `((loss_fn, params), data)` with what an adapter made."""
    if _is_sequence(found, 2) and _is_sequence(found[0], 2):
        found = (*found[0], found[1])
    if not _is_sequence(found, 3) or not callable(found[0]):
        raise DataError(
            f"TARGET {target!r} must return (loss_fn, params, data); got {type(found).__name__}. "
            "What an adapter returns may stand for the first two, as in equinox_loss(model, loss), "
            "data."
        )
    return ModelArguments(*found)


def _is_sequence(value: Any, length: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == length


def absolute(params: Any) -> Any:
    """Return PATH or PATH:PART with the whole path, for a run may be redone from another folder.

    What is neither is left as it is, for `Origin` to refuse.
    """
    return os.path.abspath(params) if isinstance(params, str) and params else params


def read_params(given: str, like: Any) -> Any:
    """Read a checkpoint, `PATH` or `PATH:PART`, into the structure of the target's parameters.

    Raises:
        DataError: If it cannot be read or is of another model.
    """
    path, _, part = given.rpartition(":")
    if Path(given).exists():
        return load_checkpoint(given, like=like)
    if not path or not Path(path).exists():
        raise DataError(
            f"there is no checkpoint {given}. Name one that is there: --params PATH or PATH:PART, "
            "or params in the file of a sweep."
        )
    return load_checkpoint(path, part=part, like=like)


def restrict_to_parts(
    arguments: ModelArguments, parts: Mapping[str, Sequence[str]]
) -> dict[str, ModelArguments]:
    """Return by name the arguments in which the parameters of one part vary, the others held.

    Raises:
        ConfigError: If a pattern matches nothing, or a slice does not fit.
    """
    masks = masks_by_name(arguments.params, parts)
    found = restrict_to_each(arguments.loss_fn, arguments.params, list(masks.values()))
    return {
        name: ModelArguments(loss, free, arguments.data)
        for name, (loss, free) in zip(masks, found, strict=True)
    }


def _check_not_hidden(target: str, top: str) -> None:
    """Refuse a module of the current folder that another of its name goes before.

    One that another folder's module of the same name was imported as, earlier in this process, is
    imported anew.
    """
    here = PathFinder.find_spec(top, [os.getcwd()])
    if here is None or here.origin is None:
        return
    first = PathFinder.find_spec(top, sys.path)
    if top in sys.builtin_module_names or first is None or first.origin != here.origin:
        before = (
            "one that is built into Python"
            if first is None or first.origin == here.origin
            else first.origin
        )
        raise ConfigError(
            f"TARGET {target!r}: {before} goes before {here.origin}. Rename yours, or put its "
            "folder on PYTHONPATH."
        )
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is not None and os.path.realpath(file) != os.path.realpath(here.origin):
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{top}.")]:
            del sys.modules[name]


def _failed(target: str, error: BaseException) -> DataError:
    """Tell an error of the person's code with the places it came through, innermost first."""
    words = (
        f"it called sys.exit({error.code!r})"
        if isinstance(error, SystemExit)
        else first_line(error)
    )
    places = " < ".join(
        f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        for frame in reversed(traceback.extract_tb(error.__traceback__))
        # The steps of an import are Python's, and say nothing of the person's code.
        if frame.filename != __file__ and "importlib" not in frame.filename
    )
    return DataError(
        f"TARGET {target!r} failed: {type(error).__name__}: {words}"
        + (f" ({places})" if places else "")
    )


def parse_settings(pairs: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """Read `NAME=VALUE` of an option with values as YAML writes them.

    Raises:
        ConfigError: If a pair is not one, or a name is given twice.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"{option} takes NAME=VALUE, for example {option} {EXAMPLES[option]}; got {pair!r}."
            )
        if name in settings:
            raise ConfigError(
                f"{option} gives {name} twice: {settings[name]!r} and {value!r}. Leave one out."
            )
        try:
            settings[name] = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(
                f"{option} takes values as YAML writes them; got {pair!r}: {error}."
            ) from error
    return settings
