"""Run folders: an estimate with its settings, figure and page, and where it came from."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastvi._errors import DataError
from fastvi._optional import import_optional
from fastvi.diagnostics.plots import import_matplotlib, plot_traces
from fastvi.result import RESULT_FILE, TRACES_FILE, LLCEstimate

CONFIG_FILE, FIGURE_FILE, REPORT_FILE, ORIGIN_FILE = "config.yaml", "traces.png", "report.html", "run.json"
FIGURE_DPI = 150
CONTENTS = {
    RESULT_FILE: "values, errors, spectrum, findings",
    TRACES_FILE: "every step of every chain, and the log weights",
    CONFIG_FILE: "settings of the fit, for --config",
    FIGURE_FILE: "the traces and the spectrum as a figure",
    REPORT_FILE: "all of it as a page for a browser",
    ORIGIN_FILE: "the command's own settings",
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """What an estimate was made of, beside the configuration: `target` is `module:function`, or None for a demo."""

    target: str | None
    seed: int
    localization: float
    nbeta: float | None
    num_chains: int | None


def check_packages() -> None:
    """Raise MissingExtraError unless a run folder can be written."""
    import_matplotlib()
    import_optional("yaml", extra="cli", distribution="PyYAML", purpose=f"writing {CONFIG_FILE}")


def write_run(result: LLCEstimate, folder: str | os.PathLike[str], origin: Origin, settings: Any = None) -> Path:
    """Write a run folder beside its place and move it there when complete; files of an earlier run are replaced.

    Args:
        result: The estimate.
        folder: The folder.
        origin: What it was made of.
        settings: The configuration as it was asked for; that of the result when left out.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    result.save(partial)
    (result.config if settings is None else settings).to_yaml(partial / CONFIG_FILE)
    plot_traces(result).savefig(partial / FIGURE_FILE, dpi=FIGURE_DPI)
    result.report(partial / REPORT_FILE)
    (partial / ORIGIN_FILE).write_text(json.dumps(dataclasses.asdict(origin), indent=2) + "\n", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == RESULT_FILE):  # the mark of a complete run last
        place = folder / path.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(path, place)
    partial.rmdir()
    return folder


def read_origin(folder: str | os.PathLike[str]) -> Origin:
    """Read where a run came from.

    Raises:
        DataError: If the folder does not say.
    """
    path = Path(folder) / ORIGIN_FILE
    if not path.is_file():
        raise DataError(f"{folder} is not a run folder: {ORIGIN_FILE} is missing.")
    return Origin(**json.loads(path.read_text(encoding="utf-8")))


def listing(folder: Path) -> list[str]:
    """Name what a run folder holds, line by line."""
    width = max(len(str(folder / name)) for name in CONTENTS)
    return [f"  {folder / name!s:<{width}}   {what}" for name, what in CONTENTS.items()]
