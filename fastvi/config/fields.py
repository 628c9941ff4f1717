"""Checked dataclasses: every field is held to the rule of its annotation.

Unknown names and impossible values are refused where they enter, with the rule, what came and the
likely fix.
"""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import cache, partial
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Optional,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from fastvi.config import rules as checks

Rule = Callable[[str, Any, str], Any]
T = TypeVar("T")
if TYPE_CHECKING:
    # stages read a filled configuration, where it is given
    Open = Annotated[T, "None where it is not given"]
else:
    Open = Optional
OPEN: Any = None


class CheckedFields:
    """Base of the config dataclasses.

    Refuse unknown keywords, hold every field to its annotation's rule.

    Attributes:
        prefix: What stands before a field's name in errors.
        usual: What fields that are None take, for the examples in errors.
        aliases: Other names, which `create` reads, and the fields that they stand for.
    """

    prefix: ClassVar[str] = ""
    usual: ClassVar[Mapping[str, Any]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *_args: Any, **values: Any) -> Self:
        """Refuse unknown keywords before the dataclass does."""
        refuse_unknown(cls, values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Put every field into its plain form."""
        for name in rules_of(type(self)):
            object.__setattr__(self, name, checked(type(self), name, getattr(self, name)))


@cache
def rules_of(cls: type[Any]) -> dict[str, tuple[Rule, bool, str]]:
    """Each field's rule, whether it may be None, and an example.

    They are read from its annotation and default.
    """
    hints, rules = get_type_hints(cls, include_extras=True), {}
    for field in fields(cls):
        hint = hints[field.name]
        # A bare annotation is that of a choice, which gets its rule below, or of a bool.
        kind, rule = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, checks.boolean)
        optional = type(None) in get_args(kind)
        alone = [one for one in get_args(kind) if one is not type(None)] if optional else [kind]
        if len(alone) == 1 and get_origin(alone[0]) is Literal:
            rule = partial(checks.choice, choices=get_args(alone[0]))
        default = cls.usual.get(field.name, field.default)
        example = f"for example {default!r}" + (" (null in YAML)" if default is None else "")
        rules[field.name] = (rule, optional, example)
    return rules


def checked(cls: type[CheckedFields], name: str, value: Any) -> Any:
    """Return the value of a field in its plain form, or refuse it."""
    rule, optional, fix = rules_of(cls)[name]
    if value is None and optional:
        return None
    return rule(cls.prefix + name, checks.plain(value), fix)


def refuse_unknown(
    cls: type[CheckedFields], given: Mapping[Any, Any], also: Collection[str] = ()
) -> None:
    """Raise ConfigError for a name that is neither a field nor in `also`."""
    known = rules_of(cls)
    # `nearest` compares in lower case: `m` is close to `M`.
    candidates = {name.lower(): name for name in known} | {**cls.aliases}
    for name, value in given.items():
        if name not in known and name not in also:
            rule = f"a field of {cls.__name__} ({', '.join([*known][:5])}, ... {len(known)} in all)"
            raise checks.refusal(f"{cls.prefix}{name}", rule, value, nearest(name, candidates))


def nearest(name: Any, candidates: Mapping[str, str]) -> str:
    """Say which of the names was meant, where one is near."""
    near = difflib.get_close_matches(str(name).lower(), candidates, 1)
    return f"did you mean {candidates[near[0]]!r}?" if near else "remove it"
