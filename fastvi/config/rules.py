"""Rules of single fields of a configuration.

Each returns the value in its plain form or refuses it.
"""

import difflib
import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastvi._errors import ConfigError
from fastvi.families import FAMILIES
from fastvi.families.backends import find_backend
from fastvi.families.basis import Basis


def refusal(name: str, rule: str, value: Any, fix: str) -> ConfigError:
    """Word every error of a field: the field, its rule, what came, the likely fix."""
    return ConfigError(
        f"{name} must be {rule}; got {reprlib.repr(value)} ({type(value).__name__}): {fix}"
    )


def plain(value: Any) -> Any:
    """Turn arrays, NumPy scalars and OmegaConf containers into Python values.

    Anything else is left as it is.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if all(kind.__module__.split(".")[0] != "omegaconf" for kind in type(value).__mro__):
        return value
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        rule = "a config in which every value is given and every interpolation resolves"
        raise refusal("source", rule, value, str(error).splitlines()[0]) from error


def _spelled(value: Any) -> float:
    """The number that `value` is or spells; NaN where there is none."""
    # Python counts a bool among the integers.
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, str)):
        return math.nan
    try:
        return float(value)
    # An int may be too large for a float.
    except (ValueError, OverflowError):
        return math.nan


def integer(name: str, value: Any, fix: str, minimum: int = 1) -> int:
    """Require an integer of at least `minimum`."""
    rule, number = f"an integer >= {minimum}", _spelled(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        meant = number.is_integer() and number >= minimum
        raise refusal(name, rule, value, f"use {number:.0f}" if meant else fix)
    if value < minimum:
        raise refusal(name, rule, value, f"use {minimum} or more; {fix}")
    return int(value)


def auto_or_integer(name: str, value: Any, fix: str, minimum: int = 0) -> int | str:
    """Require "auto" or an integer of at least `minimum`."""
    is_auto = isinstance(value, str) and value == "auto"
    return "auto" if is_auto else integer(name, value, fix, minimum)


def number(name: str, value: Any, fix: str, bound: str, holds: Callable[[float], bool]) -> float:
    """A finite float.

    A string that spells one is read: PyYAML follows YAML 1.1, where `1e-3` is a string.
    """
    number = _spelled(value)
    if not math.isfinite(number) or not holds(number):
        raise refusal(name, f"a finite number {bound}", value, fix)
    return number


def choice(name: str, value: Any, fix: str, choices: tuple[str, ...]) -> str:
    """Require one of the choices."""
    if isinstance(value, str) and value in choices:
        # The choice itself: what came may be of a subclass of str.
        return choices[choices.index(value)]
    # YAML 1.1 reads `null` as None, and `off` or `no` as False.
    written = "none" if value is None or value is False else str(value).lower()
    close = difflib.get_close_matches(written, choices, 1, 0.5)
    fix = f"did you mean {close[0]!r}?" if close else fix
    raise refusal(name, "one of " + ", ".join(map(repr, choices)), value, fix)


def boolean(name: str, value: Any, fix: str) -> bool:
    """Require True or False."""
    if not isinstance(value, bool):
        raise refusal(name, "True or False, without quotes", value, fix)
    return value


def integers(name: str, value: Any, fix: str, minimum: int) -> tuple[int, ...]:
    """Require a list of integers."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
        raise refusal(
            name, f"a list of integers >= {minimum}", value, f"use a list such as [4, 2]; {fix}"
        )
    return tuple(integer(f"{name}[{i}]", item, fix, minimum) for i, item in enumerate(value))


def family(name: str, value: Any, fix: str) -> str:
    """Require the name of a registered family."""
    return choice(name, value, fix, tuple(FAMILIES))


def backend(name: str, value: Any, fix: str) -> str:
    """Require the name of a registered backend."""
    if not isinstance(value, str):
        raise refusal(name, "the name of a registered backend", value, fix)
    find_backend(value)
    return value


def basis(name: str, value: Any, fix: str) -> "str | Basis":
    """Require the name of a basis, or its columns."""
    if isinstance(value, str):
        return choice(name, value, fix, ("curvature", "random"))
    try:
        columns: Any = np.asarray(value, float)
    except (TypeError, ValueError):
        columns = np.zeros(0)  # which has no two axes, as is asked below
    if (
        columns.ndim != 2
        or not np.all(np.isfinite(columns))
        or np.linalg.matrix_rank(columns) < columns.shape[1]
    ):
        rule = "'curvature', 'random' or an array (dim, d_latent) of independent columns"
        raise refusal(name, rule, value, fix)
    return Basis(columns)


ranks = partial(integers, minimum=0)
widths = partial(integers, minimum=1)
natural = partial(integer, minimum=0)
auto_or_positive = partial(auto_or_integer, minimum=1)
positive = partial(number, bound="> 0", holds=lambda x: x > 0)
nonnegative = partial(number, bound=">= 0", holds=lambda x: x >= 0)
fraction = partial(number, bound="in [0, 1)", holds=lambda x: 0 <= x < 1)
share = partial(number, bound="in (0, 1]", holds=lambda x: 0 < x <= 1)
decay = partial(number, bound="in (0, 1)", holds=lambda x: 0 < x < 1)
at_least_half = partial(number, bound=">= 0.5", holds=lambda x: x >= 0.5)
