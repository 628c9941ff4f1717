"""Run tests, lint and documents on every Python that the package names, and print one line each.

A Python that this machine lacks is named and left out. The lowest one runs twice: with the newest
versions that install there, and with those of constraints-lowest.txt. Environments, homes and logs
lie in .venv-matrix/, anew for every run.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-matrix"
LOWEST = ROOT / "tests" / "constraints-lowest.txt"
TARGETS = ("test", "lint", "docs")
LIMIT = 3600  # seconds for one target of make
VERSION = "import sys, venv, ensurepip; print('.'.join(map(str, sys.version_info[:3])))"


class Cell(NamedTuple):
    """An interpreter, and the constraints to install under."""

    name: str
    python: Path
    version: str
    constraints: Path | None


def supported():
    """Return the versions that pyproject.toml names, as (3, 11), in their order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.findall(r"Python :: (\d+)\.(\d+)$", "\n".join(project["classifiers"]), flags=re.M)
    return sorted((int(major), int(minor)) for major, minor in found)


def candidates(name, home=None):
    """Return the files that may be interpreters of a version such as 3.12.

    On PATH, then pyenv's and uv's.
    """
    home = Path.home() if home is None else home
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += [Path("/usr/local/bin"), Path("/usr/bin"), Path("/opt/homebrew/bin")]
    pyenv = Path(os.environ.get("PYENV_ROOT", home / ".pyenv"))
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", home / ".local" / "share" / "uv" / "python"))
    kept = [*sorted(pyenv.glob(f"versions/{name}.*/bin")), *sorted(uv.glob(f"*{name}.*/bin"))]
    files = [folder / f"python{name}" for folder in (*folders, *reversed(kept))]
    return [file for file in dict.fromkeys(files) if os.access(file, os.X_OK)]


def find_python(name, home=None):
    """Return the first candidate that runs, is of this version and can make an environment.

    None without one.

    A shim of pyenv is on PATH for each version, and fails where that version is not selected.
    """
    for file in candidates(name, home):
        try:
            done = subprocess.run(
                [file, "-c", VERSION], capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.startswith(f"{name}."):
            return file, done.stdout.strip()
    return None


def find_cells():
    """Return what there is to run, and the names of the versions that are missing."""
    cells, missing = [], []
    for index, (major, minor) in enumerate(supported()):
        name = f"{major}.{minor}"
        found = find_python(name)
        if found is None:
            missing.append(name)
            continue
        cells.append(Cell(name, *found, None))
        if index == 0:
            cells.append(Cell(f"{name}-lowest", *found, LOWEST))
    return cells, missing


def run_cell(cell):
    """Make each target in an environment and a home of the cell's own.

    Return its line and whether all passed.
    """
    environment, home = FOLDER / cell.name, FOLDER / f"{cell.name}-home"
    for folder in (environment, home):
        shutil.rmtree(folder, ignore_errors=True)
    home.mkdir(parents=True)
    cache = os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))
    variables = {**os.environ, "HOME": str(home), "PIP_CACHE_DIR": cache}
    if cell.constraints is not None:
        variables["PIP_CONSTRAINT"] = str(cell.constraints)
    make = ["make", "-C", str(ROOT), f"PYTHON={cell.python}", f"VENV={environment}"]
    log, begin, passed = FOLDER / f"{cell.name}.log", time.monotonic(), {}
    with log.open("w", encoding="utf-8") as file:
        for target in TARGETS:
            try:
                done = subprocess.run(
                    [*make, target],
                    env=variables,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=LIMIT,
                    check=False,
                )
                passed[target] = done.returncode == 0
            except subprocess.TimeoutExpired:
                passed[target] = False
    minutes = (time.monotonic() - begin) / 60
    text = log.read_text(encoding="utf-8", errors="replace")
    return describe(cell, jax_version(environment), text, passed, minutes), all(passed.values())


def jax_version(environment):
    """Ask an environment for its jax."""
    program = "import importlib.metadata as m; print(m.version('jax'))"
    try:
        done = subprocess.run(
            [environment / "bin" / "python", "-c", program],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "none"
    return done.stdout.strip() or "none"


def describe(cell, jax, text, passed, minutes):
    """Put a cell into a line.

    Versions, the counts of pytest's runs together, each target, minutes.
    """
    summary = re.findall(r"^(?:=+ )?((?:\d+ [a-z]+,? ?)+) in [\d.]+s", text, flags=re.M)
    count = Counter()
    for part in ", ".join(summary).split(", ") if summary else ():
        number, word = part.split()
        count[word.removesuffix("s")] += int(number)
    failed = count["failed"] + count["error"]
    tests = f"{count['passed']} passed, {failed} failed" if summary else "no tests ran"
    words = ", ".join(
        f"{target} {'passed' if good else 'FAILED'}" for target, good in passed.items()
    )
    lowest = " (lowest versions)" if cell.constraints else ""
    return f"python {cell.version}{lowest}, jax {jax}: {tests}; {words}; {minutes:.1f} min"


def main():
    cells, missing = find_cells()
    for name in missing:
        print(f"python {name}: not on this machine", flush=True)
    FOLDER.mkdir(exist_ok=True)
    good = True
    for cell in cells:
        line, passed = run_cell(cell)
        good &= passed
        print(line if passed else f"{line}; see {FOLDER.name}/{cell.name}.log", flush=True)
    if not cells:
        print("no supported Python was found", flush=True)
    return 0 if good and cells else 1


if __name__ == "__main__":
    sys.exit(main())
