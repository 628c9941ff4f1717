"""Entries of a configuration that are mappings of their own: the flow and the sampler."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, final

from fastvi.config import rules as checks
from fastvi.config import sources
from fastvi.config.fields import CheckedFields, nearest, refuse_unknown
from fastvi.families.backends.base import Architecture
from fastvi.sampling.settings import START_OF_GRADIENTS, STARTS, SamplerSettings

FLOW_DEFAULTS: dict[str, Any] = asdict(Architecture())

CHOICES = {"start": STARTS, "gradients": tuple(START_OF_GRADIENTS)}


@final
@dataclass(frozen=True, kw_only=True)
class FlowConfig(CheckedFields):
    """Configure the normalizing flow of the "flow" family.

    Attributes:
        template: Architecture of the flow. None means "realnvp".
        depth: Number of transforms. None means 4.
        hidden: Widths of the conditioner's hidden layers. None means (64, 64).
        bins: Number of bins of a spline. Refused without splines. None means 8.
        init_scale: Scale of the initial weights. Small values start near the identity. None means
            0.01.
    """

    prefix: ClassVar[str] = "flow."
    usual: ClassVar[Mapping[str, Any]] = FLOW_DEFAULTS

    template: Literal["realnvp", "maf", "spline_coupling", "nsf_ar"] | None = None
    depth: Annotated[int | None, checks.integer] = None
    hidden: Annotated[tuple[int, ...] | None, checks.widths] = None
    bins: Annotated[int | None, partial(checks.integer, minimum=2)] = None
    init_scale: Annotated[float | None, checks.nonnegative] = None

    @property
    def filled(self) -> Self:
        """This flow with the default in place of every entry that is not given."""
        return type(self)(**FLOW_DEFAULTS | {k: v for k, v in vars(self).items() if v is not None})


def flow_entry(name: str, value: Any, fix: str) -> FlowConfig:
    """Build the flow's configuration from its entries."""
    entries = sources.entries(name, value, fix)
    refuse_unknown(FlowConfig, entries)
    return FlowConfig(**entries)


Options = tuple[tuple[str, Any], ...]


def options_entry(name: str, value: Any, fix: str) -> Options:
    """Put a family's own options into a form that can be hashed: pairs in the order of names."""
    entries = nested_entries(name, value)
    wrong = [key for key in entries if not isinstance(key, str)]
    if wrong:
        raise checks.refusal(name, "a mapping of names to values", value, fix)
    return tuple((key, _hashable(checks.plain(item))) for key, item in sorted(entries.items()))


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def nested_entries(name: str, value: Any) -> dict[Any, Any]:
    """Return the entries of a mapping, none of None; pairs are those of options."""
    # Pairs are what `options_entry` keeps of a mapping.
    pairs = isinstance(value, tuple) and all(map(_is_pair, value))
    return sources.entries(
        name, dict(value or ()) if pairs or value is None else value, "give names with values"
    )


def sampler_entry(name: str, value: Any, fix: str) -> SamplerSettings:
    """Check the entries of the sampler's settings by the kind of their defaults."""
    del fix
    entries, usual = nested_entries(name, value), vars(SamplerSettings())
    for key, item in entries.items():
        if key not in usual:
            rule = f"one of {', '.join(usual)}"
            raise checks.refusal(
                f"{name}.{key}", rule, item, nearest(key, {one: one for one in usual})
            )
        if key in CHOICES:
            if item not in CHOICES[key]:
                rule = f"one of {', '.join(map(repr, CHOICES[key]))}"
                raise checks.refusal(f"{name}.{key}", rule, item, 'for example "auto"')
            continue
        rule = checks.positive
        if isinstance(usual[key], int):
            rule = checks.natural if key in ("max_burn_in", "max_refinements") else checks.integer
        entries[key] = rule(f"{name}.{key}", checks.plain(item), f"for example {usual[key]!r}")
    settings = SamplerSettings(**entries)
    # Some gradients go with one start alone, which another start would contradict.
    implied = START_OF_GRADIENTS[settings.gradients]
    if "auto" not in (settings.start, implied) and settings.start != implied:
        rule = f"{implied!r} beside {name}.gradients={settings.gradients!r}"
        raise checks.refusal(f"{name}.start", rule, settings.start, "leave it out")
    return settings
