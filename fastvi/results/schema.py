"""Hold values read from JSON to the annotations of the class that they are to become."""

import dataclasses
import math
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np

SHOWN = 60  # letters of a value that an error quotes


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


# How a value of JSON shows that it is of a type that has no types within.
PLAIN: dict[Any, Callable[[Any], bool]] = {
    Any: lambda value: True,
    float: is_number,
    # A bool is an int to Python.
    int: lambda value: isinstance(value, int) and not isinstance(value, bool),
    np.ndarray: lambda value: isinstance(value, list) and all(map(is_number, value)),
}


def fits(value: Any, hint: Any) -> bool:
    """Say whether a value of JSON is what an annotation promises.

    Arrays are lists of numbers there, dataclasses and named tuples are objects.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        return PLAIN[hint](value)
    if hint in (bool, str, types.NoneType, dict, list):
        return isinstance(value, hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values())
    return _is_record(hint) and isinstance(value, dict) and wrong_field(hint, value) is None


def build(value: Any, hint: Any) -> Any:
    """Turn a value of JSON that fits an annotation into what the annotation names."""
    origin, arguments = get_origin(hint), get_args(hint)
    # The first type that fits: a value was checked before, so that one does.
    if origin in (Union, types.UnionType):
        return build(value, next(argument for argument in arguments if fits(value, argument)))
    if origin is tuple:
        return tuple(build(item, arguments[0]) for item in value)
    if _is_record(hint):
        hints = get_type_hints(hint)
        return hint(**{name: build(item, hints[name]) for name, item in value.items()})
    return np.asarray(value, float) if hint is np.ndarray else value


def wrong_field(
    cls: Any,
    values: Mapping[str, Any],
    rules: Mapping[str, Rule] | None = None,
    elsewhere: Collection[str] = (),
    prefix: str = "",
) -> str | None:
    """Say what keeps values from being the fields of a class; None where nothing does.

    Args:
        cls: A dataclass or a named tuple.
        values: Its fields, as JSON has them.
        rules: What some fields must be beyond their types.
        elsewhere: Fields that are not among the values, or that somebody else checks.
        prefix: Names of the fields that the values lie in, each with a point.
    """
    hints = {name: hint for name, hint in get_type_hints(cls).items() if name not in elsewhere}
    for name in (*hints, *values):
        if name not in values:
            return f"lacks {prefix + name!r}"
        if name not in hints and name not in elsewhere:
            return f"holds {prefix + name!r}, which is no field of it"
    return next(
        (
            wrong
            for name, hint in hints.items()
            if (wrong := _wrong_value(prefix + name, values[name], hint, (rules or {}).get(name)))
        ),
        None,
    )


def _wrong_value(name: str, value: Any, hint: Any, rule: Rule | None) -> str | None:
    """Say what is wrong with one field: its type, its rule, or a field within it."""
    record = next((one for one in (hint, *get_args(hint)) if _is_record(one)), None)
    # A field within a record is named by its whole path, which says more than the record's type.
    is_inner = record is not None and isinstance(value, dict)
    text = repr(value)
    said = f"has {name} = {text if len(text) <= SHOWN else text[: SHOWN - 3] + '...'}, which is "
    if not is_inner and not fits(value, hint):
        return f"{said}of the wrong type"
    if rule is not None and not rule.holds(value):
        return f"{said}not {rule.words}"
    return wrong_field(record, value, prefix=f"{name}.") if is_inner else None


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"))
