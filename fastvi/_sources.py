"""Where the entries of a configuration come from: mappings, dataclasses, namespaces, OmegaConf, YAML."""

import os
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fastvi import _checks as checks
from fastvi.basis import Basis


def written(value: Any) -> Any:
    if isinstance(value, Basis):
        return value.tolist()
    return [*value] if type(value) is tuple else value


def entries(name: str, value: Any, fix: str) -> dict[Any, Any]:
    value = checks.plain(value)
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, types.SimpleNamespace):
        return vars(value).copy()
    raise checks.refusal(name, "a mapping, a dataclass instance or a namespace", value, fix)


def read(source: Any) -> dict[Any, Any]:
    """Read any source of `VIConfig.create`, unwrapping a `vi` or an `overrides` entry."""
    source = checks.plain(source)
    if isinstance(source, (str, os.PathLike)):
        source = _load_yaml(Path(source))
    found = {} if source is None else entries("source", source, "give names with values, or a path")
    block = next((name for name in ("vi", "overrides") if name in found), None)
    if block is None:
        return found
    inner = found.pop(block)
    if found not in ({}, {"name": "vi"}):
        raise checks.refusal(
            "source", f"alone in {block}, or beside name: vi", found, f"give the {block} entry by itself"
        )
    return {} if inner is None else entries(block, inner, "give names with values")


def _load_yaml(path: Path) -> Any:
    yaml = import_yaml()
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        fix = f"check the path and the file ({str(error).splitlines()[0]})"
        raise checks.refusal("source", "the path of a YAML file", str(path), fix) from error


def import_yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('YAML configs need PyYAML: pip install "fastvi[cli]"') from error
    return yaml
