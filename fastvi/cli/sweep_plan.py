"""What a sweep's file asks for: a cell for each combination of its grid."""

import dataclasses
import glob
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvi._errors import ConfigError, DataError
from fastvi._optional import import_optional
from fastvi.api.arguments import choose_localization
from fastvi.cli.target import absolute, resolve
from fastvi.config import VIConfig
from fastvi.config.sources import parse_yaml
from fastvi.integrations.checkpoint_steps import order_by_step
from fastvi.results import files
from fastvi.results.runs import Origin, check_packages

RUN_OPTIONS = ("seed", "localization", "nbeta", "num_chains")
WHAT_VARIES = ("params", "parts")  # axes of what is estimated on, beside those of how
ENTRIES = ("target", "params", "out", "base", "grid", *RUN_OPTIONS)
LOCALIZATION = ("localization", "gamma")  # two names of one thing


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep: where it lies in the grid, and what it takes."""

    values: dict[str, Any]
    origin: Origin
    config: VIConfig

    @property
    def shown(self) -> dict[str, str]:
        """The values as text, different where they are."""
        return {name: _text(value) for name, value in self.values.items()}

    @property
    def name(self) -> str:
        """Name of the run's folder, different where the values are."""
        return files.folder_name(",".join(f"{name}={text}" for name, text in self.shown.items()))


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a sweep's file asks for.

    Attributes:
        target: `module:function`.
        cells: The runs.
        out: The folder that the file names.
        params: The checkpoint that all runs share.
        parts: Patterns of each part of the parameters by its name, where the grid has parts.
        steps: Training step of each checkpoint, where the grid has some whose names tell it.
    """

    target: str
    cells: list[Cell]
    out: Path | None
    params: str | None = None
    parts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    steps: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Condense what is to be run."""
        runs = [
            (cell.name, dataclasses.asdict(cell.origin), cell.config.to_dict())
            for cell in self.cells
        ]
        return hashlib.sha256(json.dumps(runs, default=str).encode()).hexdigest()[:16]


def read_plan(path: Path, *, trust: bool = False) -> SweepPlan:
    """Read and check a sweep's file.

    Raises:
        ConfigError: If it cannot be read, or asks for something unknown, impossible or twice.
    """
    import_optional("yaml", extra="cli", distribution="PyYAML", purpose="a sweep")
    try:
        given = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--config must be the YAML file of a sweep; {files.first_line(error)}"
        ) from error
    if not isinstance(given, Mapping) or "target" not in given or not given.get("grid"):
        raise ConfigError(f"{path} must name a target and a grid; see the docs on sweeps.")
    unknown = [name for name in given if name not in ENTRIES]
    if unknown:
        raise ConfigError(
            f"{path}: unknown entry {unknown[0]!r}; a sweep has {', '.join(ENTRIES)}."
        )
    for name, kind, words in (
        ("target", str, "module:function"),
        ("grid", Mapping, "a list for each setting"),
    ):
        if not isinstance(given[name], kind):
            raise ConfigError(f"{path}: {name} must be {words}; got {given[name]!r}.")
    if "out" in given and not (isinstance(given["out"], str) and given["out"]):
        raise ConfigError(f"{path}: out must be the name of a folder; got {given['out']!r}.")
    parts = _read_parts(path, given["grid"])
    grid = _read_grid(path, given["grid"], parts)
    _check_given_once(path, given, grid)
    resolved = resolve(given["target"], trust=trust)
    target, before = resolved.target, resolved.before
    # A run folder remembers parameters that were not its target's own, and the part that varied.
    base_origin = Origin(
        target,
        0,
        1.0,
        None,
        None,
        absolute(given["params"]) if "params" in given else before and before.origin.params,
        before and before.origin.part,
    )
    base = VIConfig.create(given.get("base"))
    shared = {name: given[name] for name in RUN_OPTIONS if name in given}
    cells = [
        _cell(base_origin, parts, base, shared, dict(zip(grid, values, strict=True)))
        for values in itertools.product(*grid.values())
    ]
    for cell in cells:  # before the first of them runs
        check_packages(cell.config)
    return SweepPlan(
        target,
        cells,
        Path(given["out"]) if "out" in given else None,
        base_origin.params,
        parts,
        _read_steps(grid.get("params", [])),
    )


def _read_parts(path: Path, grid: Mapping[Any, Any]) -> dict[str, list[str]]:
    """Return the patterns of each part; a list names each part by its pattern."""
    given = grid.get("parts", {})
    named = (
        [*given.items()] if isinstance(given, Mapping) else [(one, one) for one in _listed(given)]
    )
    parts = {}
    for name, given_patterns in named:
        patterns = _listed(given_patterns)
        if isinstance(name, str) and patterns and all(isinstance(one, str) for one in patterns):
            parts[name] = patterns
        else:
            raise ConfigError(
                f"{path}: grid.parts must be names with patterns of parameters, such as "
                f"{{embeddings: embed/**}}, or a list of patterns; got {given!r}."
            )
    return parts


def _read_grid(
    path: Path, given: Mapping[Any, Any], parts: Mapping[str, list[str]]
) -> dict[str, list[Any]]:
    """Return the values of each axis, one or more and all different."""
    grid = {name: _listed(value) for name, value in given.items()}
    if "params" in grid:
        grid["params"] = [file for one in grid["params"] for file in _expand(path, one)]
    # Two of one name would be one in a mapping.
    if isinstance(given.get("parts"), Mapping):
        grid["parts"] = [*parts]
    for name, values in grid.items():
        texts = [_text(value) for value in values]
        twice = [text for place, text in enumerate(texts) if text in texts[:place]]
        if not values or twice:
            came = f"{twice[0]} twice" if twice else "[]"
            raise ConfigError(
                f"{path}: grid.{name} must list one value or more, all different; got {came}."
            )
    return grid


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _expand(path: Path, given: Any) -> list[str]:
    """Return the checkpoints that a path or a pattern of paths names, numbers in their order."""
    if not isinstance(given, str) or not given:
        raise ConfigError(
            f"{path}: grid.params must list checkpoints, PATH, PATH:PART or a pattern such as "
            f"run/step_*.npz; got {given!r}."
        )
    if not glob.has_magic(given) or Path(given).exists():
        return [given]
    found, part = glob.glob(given), ""
    if not found:
        # The name of a part has no pattern, and a path with a colon was looked for first.
        before, colon, part = given.rpartition(":")
        found, part = glob.glob(before), colon + part
    if not found:
        raise ConfigError(f"{path}: grid.params: no checkpoint is named as in {given!r}.")
    return [f"{one}{part}" for one in sorted(found, key=_in_order)]


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sort step_9 before step_10."""
    return [
        (int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)
    ]


def _read_steps(params: Sequence[str]) -> dict[str, int]:
    """Return the training step of each checkpoint; none unless all names tell theirs."""
    paths = {Path(one if Path(one).exists() else one.rpartition(":")[0]): one for one in params}
    try:
        return {paths[path]: step for step, path in order_by_step([*paths]).items()}
    except DataError:
        return {}


def _check_given_once(path: Path, given: Mapping[str, Any], grid: Mapping[str, Any]) -> None:
    """Refuse a setting that the file gives in two places.

    One of them would not be what a row was computed with.
    """
    # Another type of base is refused where the configuration is made.
    base = given.get("base")
    places = {
        "at the top": [name for name in (*RUN_OPTIONS, "params") if name in given],
        "in base": [*base] if isinstance(base, Mapping) else [],
        "in the grid": [*grid],
    }
    seen: dict[str, str] = {}
    for place, names in places.items():
        for name in names:
            meant = LOCALIZATION[0] if name in LOCALIZATION else name
            if meant in seen:
                raise ConfigError(
                    f"{path} gives one setting in two places: {seen[meant]} and {name} {place}. "
                    "Leave one out."
                )
            seen[meant] = f"{name} {place}"


def _cell(
    base_origin: Origin,
    parts: Mapping[str, list[str]],
    base: VIConfig,
    shared: dict[str, Any],
    values: dict[str, Any],
) -> Cell:
    options = shared | {name: values[name] for name in RUN_OPTIONS if name in values}
    asked = {
        name: value
        for name, value in values.items()
        if name not in RUN_OPTIONS and name not in WHAT_VARIES
    }
    config = base.replace(**asked)
    config.check_available()
    config.check_asked(asked)
    part = values.get("parts")
    return Cell(
        values=values,
        origin=dataclasses.replace(
            base_origin,
            seed=options.get("seed", 0),
            localization=choose_localization(options.get("localization"), config, 1.0),
            nbeta=options.get("nbeta"),
            num_chains=options.get("num_chains"),
            params=absolute(values.get("params", base_origin.params)),
            part=base_origin.part if part is None else {part: parts[part]},
        ),
        # Kept out of the configuration: the localization alone needs no program of its own.
        config=config.replace(gamma=None),
    )


def _text(value: Any) -> str:
    """Spell a value so that different ones are spelled differently; 5.0 is 5."""
    # From 1e16 on, repr is the shorter spelling; infinity and NaN are no integers.
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return str(int(value))
    return value if isinstance(value, str) else repr(value).replace(" ", "")
