"""`fastvi sweep`.

One model under a grid of settings; an interrupted sweep goes on where it stopped.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax

from fastvi._errors import ConfigError, DataError, NonFiniteError, UnavailableError
from fastvi._optional import import_optional
from fastvi.api.arguments import choose_localization
from fastvi.cli.llc import estimate_origin, observe_problem
from fastvi.cli.sweep_figure import draw_sweep
from fastvi.cli.table import describe, format_table, write_csv
from fastvi.cli.target import ModelArguments, absolute, load, resolve
from fastvi.config import VIConfig
from fastvi.config.sources import parse_yaml
from fastvi.demos.base import Say
from fastvi.results import files
from fastvi.results.claim import ORIGIN_FILE, SWEEP, claimed, held_by, in_turn
from fastvi.results.estimate import LLCEstimate
from fastvi.results.runs import (
    Origin,
    check_packages,
    read_record,
    read_settings,
    write_run_somewhere,
)
from fastvi.results.terminal import warn
from fastvi.target.identity import differing

TABLE_FILE, FIGURE_FILE, PAGE_DPI = "table.csv", "sweep.png", 150
RUN_OPTIONS = ("seed", "localization", "nbeta", "num_chains")
ENTRIES = ("target", "params", "out", "base", "grid", *RUN_OPTIONS)
LOCALIZATION = ("localization", "gamma")  # two names of one thing
# Columns of a run, as `describe` fills them; a run that failed has dashes.
COLUMNS = ("llc", "q alone", "elbo", "k-hat", "FGE", "s", "findings")
LONGEST_NAME = 150  # of a run's folder; file systems take 255
VERSION = 1  # of the sweep's file; raised where its entries change their meaning

# What one run may fail with while the others are none the worse: a setting that its problem
# refuses, data that it cannot use, a divergence, or a device that has not the memory for it.
FAILURES = (ConfigError, DataError, NonFiniteError, UnavailableError, jax.errors.JaxRuntimeError)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Estimate under every combination of a grid of settings.

    Attributes:
        config: YAML file with a target and a grid; started again, an interrupted sweep goes on.
        out: Folder of the sweep; runs/NAME of the file when neither it nor the file says.
        trust: Run the code that a run folder names, where the target is one.
        quiet: Print the table alone.
        shard: Run a part of the cells, beside processes that run the others: I/N for every N-th
            from the I-th on, from 1/N to N/N; "slurm" for the place of this job in its array.
    """

    config: Path = dataclasses.field(default=Path("sweep.yaml"), metadata={"metavar": "SWEEP.YAML"})
    out: Path | None = dataclasses.field(default=None, metadata={"metavar": "FOLDER"})
    trust: bool = False
    quiet: bool = False
    shard: str | None = dataclasses.field(default=None, metadata={"metavar": "I/N or 'slurm'"})

    def run(self, say: Say) -> int:
        """Run what is missing, then write the table and the figure, then tell them."""
        check_packages()
        plan = read_plan(self.config, trust=self.trust)
        place, count = (1, 1) if self.shard is None else read_shard(self.shard, os.environ)
        tell = (lambda line: None) if self.quiet else say
        where = self.out or plan.out or Path("runs") / self.config.stem
        with claimed(where, SWEEP, shared=self.shard is not None) as folder:
            with in_turn(folder):
                _begin(folder, plan)
            problem = load(plan.target, plan.params)
            # Cached: what the problem computes depends on no other setting than the dtype.
            observe = functools.cache(lambda dtype: observe_problem(problem, VIConfig(dtype=dtype)))
            own, outcomes = plan.cells[place - 1 :: count], {}
            for number, cell in enumerate(own, 1):
                outcome = run_cell(
                    cell, folder, problem, observe, progress=not self.quiet, tell=tell
                )
                tell(f"[{number}/{len(own)}] {cell.name}: {outcome.words}")
                outcomes[cell.name] = outcome
            # The last one to read what is there is also the last one to write.
            with in_turn(folder):
                every = [
                    outcomes.get(cell.name) or find_cell(cell, folder, observe)
                    for cell in plan.cells
                ]
                try:
                    written, trouble = _write(every, folder)
                # Whatever a figure fails with, the table is told.
                finally:
                    tell("")
                    for line in format_table([outcome.row for outcome in every]):
                        say(line)
        tell(f"\nwritten: {', '.join(map(str, written)) or 'nothing'}")
        if trouble is not None:
            warn(f"fastvi: warning: {trouble}")
        return int(trouble is not None or any(outcome.failed for outcome in outcomes.values()))


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
        shown = ",".join(f"{name}={value}" for name, value in self.shown.items())
        # A value may hold a slash, or a letter that some file system refuses.
        name = quote(shown, safe=",=[]+ '")
        if len(name) <= LONGEST_NAME:
            return name
        # Names that begin alike are told apart by their digest.
        return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a sweep's file asks for."""

    target: str
    cells: list[Cell]
    out: Path | None
    params: str | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    A row of the table, words for the terminal, and the estimate where there is one.
    """

    row: dict[str, str]
    words: str
    values: dict[str, Any]
    result: LLCEstimate | None = None
    failed: bool = False


def run_cell(
    cell: Cell,
    folder: Path,
    problem: ModelArguments,
    observe: Callable[[str], dict[str, Any]],
    *,
    progress: bool,
    tell: Callable[[str], None],
) -> Outcome:
    """Keep the run of a cell that is there and was asked for in the same way, or run it.

    A failure is an outcome.

    Args:
        cell: The cell.
        folder: The sweep's folder.
        problem: What is estimated on.
        observe: Says what the problem computes in a dtype.
        progress: Whether to show a status line.
        tell: Receives a line where a run that was killed goes on.
    """
    place = folder / cell.name
    try:
        fingerprint = observe(cell.config.dtype)
        result, reason = finished(place, cell, fingerprint)
        if result is not None:
            return _outcome(cell, result, "kept, ")
        began = time.perf_counter()
        with claimed(place, below_ours=True):
            result = estimate_origin(
                problem,
                cell.origin,
                cell.config,
                place,
                progress=progress,
                tell=lambda line: tell(f"{cell.name}: {line}"),
            )
            kept = write_run_somewhere(result, place, cell.origin, cell.config, fingerprint)
    except FAILURES as error:
        said = files.first_line(error)
        # A divergence is known by the name of its finding.
        is_broken = isinstance(error, NonFiniteError)
        findings = "non_finite" if is_broken else f"{type(error).__name__}: {said}"
        return _without_llc(cell, findings, f"failed, {said.split('. ')[0]}", failed=True)
    if kept.trouble is not None:
        warn(f"fastvi: warning: {kept.trouble}")
    return _outcome(
        cell,
        result,
        f"{reason}, " if reason else "",
        f", {time.perf_counter() - began:.0f} s",
        failed=kept.trouble is not None,
    )


def find_cell(cell: Cell, folder: Path, observe: Callable[[str], dict[str, Any]]) -> Outcome:
    """Say what another process has made of a cell by now."""
    try:
        result, _ = finished(folder / cell.name, cell, observe(cell.config.dtype))
    except FAILURES:  # which the process that runs it tells
        result = None
    if result is not None:
        return _outcome(cell, result, "kept, ")
    return _without_llc(cell, "no run yet", "no run yet")


def read_shard(shard: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the place of a part, from 1 on, and the number of parts.

    Raises:
        ConfigError: If it is neither I/N with I from 1 to N, nor "slurm" in a job of an array.
    """
    if shard == "slurm":
        names = (f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "STEP", "COUNT"))
        try:
            number, least, step, count = (int(environment[name]) for name in names)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                '--shard slurm must run in a job of an array, as of "sbatch --array=1-8"; '
                f"{error} is not set, or no number."
            ) from error
        return (number - least) // step + 1, count
    place, _, count = shard.partition("/")
    if place.isdecimal() and count.isdecimal() and 1 <= int(place) <= int(count):
        return int(place), int(count)
    raise ConfigError(f'--shard must be I/N with I from 1 to N, or "slurm"; got {shard!r}.')


def _without_llc(cell: Cell, findings: str, words: str, *, failed: bool = False) -> Outcome:
    """Return the row of a cell that has no estimate: dashes, and why."""
    row = cell.shown | dict.fromkeys(COLUMNS, "-") | {"findings": findings}
    return Outcome(row, words, cell.values, failed=failed)


def _outcome(
    cell: Cell, result: LLCEstimate, before: str, after: str = "", *, failed: bool = False
) -> Outcome:
    """Take from an estimate what the table and the figure show.

    The fit, with its parameters and data, is let go.
    """
    return Outcome(
        cell.shown | describe(result),
        f"{before}llc {result.llc_text}{after}",
        cell.values,
        dataclasses.replace(result, fitted=None, ensemble=None),
        failed,
    )


def finished(
    folder: Path, cell: Cell, fingerprint: dict[str, Any]
) -> tuple[LLCEstimate | None, str]:
    """Return the run if it is complete and of the same target and settings.

    Else why it is run again.
    """
    # An empty folder holds no run whose loss is to be told.
    if not folder.is_dir() or not held_by(folder):
        return None, ""
    try:
        record, config = read_record(folder), read_settings(folder)
        if record.origin != cell.origin or config != cell.config:
            return None, "run again under other settings"
        names = ", ".join(differing(fingerprint, record.fingerprint or {}))
        if names:
            return None, f"run again because the target computes something else ({names})"
        return LLCEstimate.load(folder), ""
    except (ConfigError, DataError) as error:
        return None, f"run again because {str(error).split('. ')[0]}"


def _begin(folder: Path, plan: SweepPlan) -> None:
    """Mark the folder as a sweep's, and withdraw the table and the figure of an earlier one."""
    # A table of an earlier grid beside the runs of this one would be taken for theirs.
    for name in (TABLE_FILE, FIGURE_FILE):
        (folder / name).unlink(missing_ok=True)
    content = files.json_bytes({"format": SWEEP, "version": VERSION, "target": plan.target})
    files.replace_file(folder / ORIGIN_FILE, content)


def _write(outcomes: list[Outcome], folder: Path) -> tuple[list[Path], str | None]:
    """Write the table and, where a run succeeded, the figure.

    Return what was written, and what went wrong.
    """
    results = [
        (outcome.values, outcome.result) for outcome in outcomes if outcome.result is not None
    ]
    written = []
    try:
        with files.staged(folder) as staging:
            write_csv([outcome.row for outcome in outcomes], staging / TABLE_FILE)
            # Published before the figure is drawn, which may fail.
            files.publish(staging, folder, (TABLE_FILE,))
            written.append(folder / TABLE_FILE)
            if results:
                draw_sweep(results).savefig(staging / FIGURE_FILE, dpi=PAGE_DPI)
                files.publish(staging, folder, (FIGURE_FILE,))
                written.append(folder / FIGURE_FILE)
    except OSError as error:
        said = f"the table or the figure could not be written to {folder}"
        return written, f"{said} ({files.first_line(error)})"
    return written, None


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
    grid = _read_grid(path, given["grid"])
    _check_given_once(path, given, grid)
    resolved = resolve(given["target"], trust=trust)
    target = resolved.target
    # A run folder remembers parameters that were not its target's own.
    kept = None if resolved.before is None else resolved.before.origin.params
    params = absolute(given["params"]) if "params" in given else kept
    base = VIConfig.create(given.get("base"))
    shared = {name: given[name] for name in RUN_OPTIONS if name in given}
    cells = [
        _cell(target, params, base, shared, dict(zip(grid, values, strict=True)))
        for values in itertools.product(*grid.values())
    ]
    for cell in cells:  # before the first of them runs
        check_packages(cell.config)
    return SweepPlan(target, cells, Path(given["out"]) if "out" in given else None, params)


def _read_grid(path: Path, given: Mapping[Any, Any]) -> dict[str, list[Any]]:
    """Return the values of each axis, one or more and all different."""
    grid = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    for name, values in grid.items():
        texts = [_text(value) for value in values]
        twice = [text for place, text in enumerate(texts) if text in texts[:place]]
        if not values or twice:
            came = f"{twice[0]} twice" if twice else "[]"
            raise ConfigError(
                f"{path}: grid.{name} must list one value or more, all different; got {came}."
            )
    return grid


def _check_given_once(path: Path, given: Mapping[str, Any], grid: Mapping[str, Any]) -> None:
    """Refuse a setting that the file gives in two places.

    One of them would not be what a row was computed with.
    """
    # Another type of base is refused where the configuration is made.
    base = given.get("base")
    places = {
        "at the top": [name for name in RUN_OPTIONS if name in given],
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
    target: str,
    params: str | None,
    base: VIConfig,
    shared: dict[str, Any],
    values: dict[str, Any],
) -> Cell:
    options = shared | {name: values[name] for name in RUN_OPTIONS if name in values}
    asked = {name: value for name, value in values.items() if name not in RUN_OPTIONS}
    config = base.replace(**asked)
    config.check_available()
    config.check_asked(asked)
    return Cell(
        values=values,
        origin=Origin(
            target=target,
            seed=options.get("seed", 0),
            localization=choose_localization(options.get("localization"), config, 1.0),
            nbeta=options.get("nbeta"),
            num_chains=options.get("num_chains"),
            params=params,
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
