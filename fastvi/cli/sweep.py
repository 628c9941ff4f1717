"""`fastvi sweep`: one model under a grid of settings; an interrupted sweep goes on where it stopped."""

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvi._errors import ConfigError, NonFiniteError
from fastvi._optional import import_optional
from fastvi.cli.llc import estimate_origin
from fastvi.cli.sweep_figure import draw_sweep
from fastvi.cli.table import describe, format_table, write_csv
from fastvi.cli.target import load, resolve, settle_localization
from fastvi.config import VIConfig
from fastvi.demos.base import Say
from fastvi.result import RESULT_FILE, LLCEstimate, with_error
from fastvi.runs import CONFIG_FILE, Origin, check_packages, read_origin, write_run

TABLE_FILE, FIGURE_FILE, PAGE_DPI = "table.csv", "sweep.png", 150
RUN_OPTIONS = ("seed", "localization", "nbeta", "num_chains")
ENTRIES = ("target", "out", "base", "grid", *RUN_OPTIONS)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Estimate under every combination of a grid of settings.

    Attributes:
        config: YAML file with a target and a grid; started again, an interrupted sweep goes on.
        out: Folder of the sweep; runs/NAME of the file when neither it nor the file says.
        quiet: Print the table alone.
    """

    config: Path = Path("sweep.yaml")
    out: Path | None = None
    quiet: bool = False

    def run(self, say: Say) -> int:
        """Run what is missing, then write the table and the figure."""
        check_packages()
        plan = read_plan(self.config)
        folder = self.out or plan.out or Path("runs") / self.config.stem
        tell = (lambda line: None) if self.quiet else say
        rows, results, failed, problem = [], [], 0, None
        for place, cell in enumerate(plan.cells):
            run_folder = folder / cell.name
            label = f"[{place + 1}/{len(plan.cells)}] {cell.name}"
            result = finished(run_folder, cell)
            if result is not None:
                tell(f"{label}: kept, llc {with_error(result.llc, result.llc_sem)}")
            else:
                problem = problem or load(cell.origin.target or "")
                began = time.perf_counter()
                try:
                    result = estimate_origin(problem, cell.origin, cell.config, progress=not self.quiet)
                except NonFiniteError as error:
                    failed += 1
                    tell(f"{label}: failed, {str(error).split('.')[0]}")
                    rows.append({**cell.shown, **dict.fromkeys(describe_names(), "-"), "findings": "non_finite"})
                    continue
                write_run(result, run_folder, cell.origin, cell.config)
                seconds = time.perf_counter() - began
                tell(f"{label}: llc {with_error(result.llc, result.llc_sem)}, {seconds:.0f} s")
            rows.append({**cell.shown, **describe(result)})
            results.append((cell.values, result))
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(rows, folder / TABLE_FILE)
        tell("")
        for line in format_table(rows):
            say(line)
        if results:
            draw_sweep(results).savefig(folder / FIGURE_FILE, dpi=PAGE_DPI)
        tell("")
        tell(f"written: {folder / TABLE_FILE}, {folder / FIGURE_FILE}")
        return 1 if failed else 0


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep: where it lies in the grid, and what it takes."""

    values: dict[str, Any]
    origin: Origin
    config: VIConfig

    @property
    def shown(self) -> dict[str, str]:
        """The values as text."""
        return {name: _text(value) for name, value in self.values.items()}

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return ",".join(f"{name}={value}" for name, value in self.shown.items()).replace("/", "-")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep's file asks for."""

    cells: list[Cell]
    out: Path | None


def describe_names() -> tuple[str, ...]:
    """Name the columns of a run."""
    return ("llc", "q alone", "elbo", "k-hat", "FGE", "s", "findings")


def finished(folder: Path, cell: Cell) -> LLCEstimate | None:
    """Return the run if it is complete and was asked for in the same way."""
    if not (folder / RESULT_FILE).is_file():
        return None
    same = read_origin(folder) == cell.origin and VIConfig.create(folder / CONFIG_FILE) == cell.config
    return LLCEstimate.load(folder) if same else None


def read_plan(path: Path) -> Plan:
    """Read and check a sweep's file.

    Raises:
        ConfigError: If it cannot be read, or asks for something unknown or impossible.
    """
    yaml = import_optional("yaml", extra="cli", distribution="PyYAML", purpose="a sweep")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config must be the YAML file of a sweep; {str(error).splitlines()[0]}") from error
    if not isinstance(given, Mapping) or "target" not in given or not given.get("grid"):
        raise ConfigError(f"{path} must name a target and a grid; see the docs on sweeps.")
    unknown = [name for name in given if name not in ENTRIES]
    if unknown:
        raise ConfigError(f"{path}: unknown entry {unknown[0]!r}; a sweep has {', '.join(ENTRIES)}.")
    grid = {name: value if isinstance(value, list) else [value] for name, value in given["grid"].items()}
    target = resolve(str(given["target"]))[0]
    base = VIConfig.create(given.get("base"))
    shared = {name: given[name] for name in RUN_OPTIONS if name in given}
    combinations = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    cells = [_cell(target, base, shared, values) for values in combinations]
    return Plan(cells, Path(given["out"]) if "out" in given else None)


def _cell(target: str, base: VIConfig, shared: dict[str, Any], values: dict[str, Any]) -> Cell:
    options = {**shared, **{name: value for name, value in values.items() if name in RUN_OPTIONS}}
    config = base.replace(**{name: value for name, value in values.items() if name not in RUN_OPTIONS})
    config.check_available()
    given = options.get("localization")
    return Cell(
        values=values,
        origin=Origin(
            target=target,
            seed=int(options.get("seed", 0)),
            localization=settle_localization(None if given is None else float(given), config, 1.0),
            nbeta=options.get("nbeta"),
            num_chains=options.get("num_chains"),
        ),
        config=config.replace(gamma=None),  # the localization alone needs no program of its own
    )


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
