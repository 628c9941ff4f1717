"""Where the entries of a configuration come from.

Mappings, dataclasses, namespaces, OmegaConf, YAML.
"""

import os
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastvi._errors import ConfigError
from fastvi._optional import import_optional
from fastvi.config import rules as checks
from fastvi.families.basis import Basis


def written(value: Any) -> Any:
    """Return a value as YAML writes it."""
    if isinstance(value, Basis):
        return value.tolist()
    return [*value] if type(value) is tuple else value


def entries(name: str, value: Any, fix: str) -> dict[Any, Any]:
    """Return the names and values of a mapping, a dataclass or a namespace."""
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
        path, source = Path(source), _load_yaml(Path(source))
        if source is not None and not isinstance(source, Mapping):
            raise ConfigError(
                f"source must be a YAML file of names; {str(path)!r} holds {source!r:.60}: give "
                "names with values"
            )
    found = {} if source is None else entries("source", source, "give names with values, or a path")
    block = next((name for name in ("vi", "overrides") if name in found), None)
    if block is None:
        return found
    inner = found.pop(block)
    if found not in ({}, {"name": "vi"}):
        raise checks.refusal(
            "source",
            f"alone in {block}, or beside name: vi",
            found,
            f"give the {block} entry by itself",
        )
    return {} if inner is None else entries(block, inner, "give names with values")


def _load_yaml(path: Path) -> Any:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"source must be the path of a YAML file; got {str(path)!r}: check the path and the "
            f"file ({_said(error)})"
        ) from error


def parse_yaml(text: str) -> Any:
    """Read a YAML document in which no mapping gives a name twice.

    Raises:
        ValueError: If it is none.
    """
    yaml = _import_yaml()
    try:
        return yaml.load(text, Loader=_strict_loader(yaml))
    except yaml.YAMLError as error:
        raise ValueError(_said(error)) from error
    except (RecursionError, AttributeError) as error:  # the latter of PyYAML, for `!!timestamp 3`
        raise ValueError(f"it cannot be read: {_said(error)}") from error


def format_yaml(values: Mapping[str, Any]) -> str:
    """Write a YAML document that `parse_yaml` reads back."""
    return _import_yaml().safe_dump(values, sort_keys=False)


def _import_yaml() -> Any:
    return import_optional("yaml", extra="cli", distribution="PyYAML", purpose="a YAML file")


def _said(error: Exception) -> str:
    """Say on one line what is wrong, and where: PyYAML puts the place on lines of its own."""
    return "; ".join(line.strip() for line in str(error).splitlines()[:2])


@cache
def _strict_loader(yaml: Any) -> Any:
    """Make PyYAML's safe loader refuse a name that a mapping gives twice.

    Of two values one would be ignored.
    """

    class StrictLoader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            # Here `<<` has not yet put other mappings' names beside the node's own.
            node = super().compose_mapping_node(anchor)
            scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            keys = [
                key.value if key.tag.endswith(":merge") else self.construct_object(key)
                for key in scalars
            ]
            twice = [key for place, key in enumerate(keys) if key in keys[:place]]
            if twice:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{twice[0]!r} is given twice", node.start_mark
                )
            return node

    return StrictLoader
