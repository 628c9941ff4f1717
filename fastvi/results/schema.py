"""Hold values read from JSON to the annotations of the class that they are to become."""

import dataclasses
import math
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np

PLAIN = {bool: bool, str: str, type(None): type(None), dict: dict, list: list}


class Rule(NamedTuple):
    """What a value must be beyond its type."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("a finite number > 0", lambda value: is_number(value) and 0 < value < math.inf)
NONNEGATIVE = Rule("a finite number >= 0", lambda value: is_number(value) and 0 <= value < math.inf)
COUNT = Rule("an integer >= 1", lambda value: value >= 1)


def is_number(value: Any) -> bool:
    """Say whether a value is an int or a float, NaN included."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def fits(value: Any, hint: Any) -> bool:
    """Say whether a value of JSON is what an annotation promises.

    Arrays are lists of numbers there.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is float:
        return is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in PLAIN:
        return isinstance(value, PLAIN[hint])
    if hint is np.ndarray:
        return isinstance(value, list) and all(map(is_number, value))
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values())
    return (
        dataclasses.is_dataclass(hint)
        and isinstance(value, dict)
        and wrong_field(hint, value) is None
    )


def wrong_field(
    cls: Any,
    values: Mapping[str, Any],
    rules: Mapping[str, Rule] | None = None,
    elsewhere: Collection[str] = (),
) -> str | None:
    """Say what keeps values from being the fields of a dataclass; None where nothing does.

    Args:
        cls: The dataclass.
        values: Its fields, as JSON has them.
        rules: What some fields must be beyond their types.
        elsewhere: Fields that are not among the values, or that somebody else checks.
    """
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.name not in elsewhere]
    missing = [name for name in names if name not in values]
    unknown = [name for name in values if name not in names and name not in elsewhere]
    if missing or unknown:
        return (
            f"lacks {missing[0]!r}" if missing else f"holds {unknown[0]!r}, which is no field of it"
        )
    for name in names:
        if not fits(values[name], hints[name]):
            return f"has {name} = {_shown(values[name])}, which is of the wrong type"
        rule = (rules or {}).get(name)
        if rule is not None and not rule.holds(values[name]):
            return f"has {name} = {_shown(values[name])}, which is not {rule.words}"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
