"""What processes that run one sweep share: its round, its table and its figure."""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fastvi._errors import ConfigError, DataError
from fastvi.cli.sweep_cells import FAILED, LEASES, NO_RUN, Outcome, Workplace
from fastvi.cli.sweep_figure import draw_sweep
from fastvi.cli.sweep_plan import SweepPlan
from fastvi.cli.table import format_table, write_csv
from fastvi.results import files
from fastvi.results.claim import ORIGIN_FILE, SWEEP, in_turn, lease_in
from fastvi.results.lease import Lease, holder_of, is_living

TABLE_FILE, FIGURE_FILE, PAGE_DPI = "table.csv", "sweep.png", 150
VERSION = 2  # of the sweep's file; raised where its entries change their meaning
MEMBER = "process-"  # begins the names of the leases of processes; no cell's begins so


@contextlib.contextmanager
def joined(
    folder: Path, plan: SweepPlan, seconds: float, name: str | None = None
) -> Iterator[Workplace]:
    """Join the round of the processes that run a sweep now, or begin one.

    Args:
        folder: The folder of the sweep.
        plan: What is to be run.
        seconds: Term of leases.
        name: Name of a round that goes on though none of its processes may live at the moment, as
            the jobs of one array do.

    Raises:
        ConfigError: If processes run something else in it.
    """
    with in_turn(folder):
        for below in (LEASES, FAILED):
            (folder / below).mkdir(exist_ok=True)
        current, member = _choose_round(folder, plan, name), f"{MEMBER}{uuid.uuid4().hex}"
        lease = lease_in(folder / LEASES, member, seconds=seconds)
    # A name of its own: nobody else has it.
    assert isinstance(lease, Lease)
    with lease:
        yield Workplace(folder, current, seconds)


def _choose_round(folder: Path, plan: SweepPlan, name: str | None) -> str:
    try:
        found = files.read_object(folder / ORIGIN_FILE, "")
    except DataError:
        found = {}
    same = found.get("version") == VERSION and found.get("plan") == plan.digest
    living = [path for path in (folder / LEASES).glob(f"{MEMBER}*") if is_living(path)]
    if living and not same:
        holder = holder_of(living[0]) or "another process"
        raise ConfigError(
            f"the folder {str(folder)!r} is being written by a sweep of something else ({holder!r})"
            ". Name another folder with --out, or wait for it."
        )
    if same and (living or (name is not None and name == found.get("round"))):
        return str(found["round"])
    # A table of an earlier grid beside the runs of this one would be taken for theirs.
    for old in (TABLE_FILE, FIGURE_FILE):
        (folder / old).unlink(missing_ok=True)
    # What failed is tried again, and no process lives that could be at work on these.
    for old in (*(folder / FAILED).iterdir(), *(folder / LEASES).glob(f"{MEMBER}*")):
        old.unlink(missing_ok=True)
    current = name or uuid.uuid4().hex
    record = {"format": SWEEP, "version": VERSION, "target": plan.target}
    record |= {"plan": plan.digest, "round": current}
    files.replace_file(folder / ORIGIN_FILE, files.json_bytes(record))
    return current


class Written(NamedTuple):
    """What was written of a sweep, what went wrong, and what became of each cell."""

    paths: list[Path]
    trouble: str | None
    outcomes: list[Outcome]

    @property
    def missing(self) -> int:
        """How many cells have no run."""
        return self.outcomes.count(NO_RUN)


def write_sweep(
    place: Workplace,
    plan: SweepPlan,
    own: Mapping[str, Outcome],
    say: Callable[[str], None],
) -> Written:
    """Write the table of all cells that are there and, where a run succeeded, the figure.

    Args:
        place: The folder and the round.
        plan: The cells.
        own: What this process knows by the names of cells.
        say: Is told the table, whatever a figure fails with.

    Raises:
        ConfigError: If another round has begun in the folder.
    """
    # The last one to read what is there is also the last one to write.
    with in_turn(place.folder) as turn:
        place.check()
        outcomes = [own.get(cell.name) or place.find(cell) or NO_RUN for cell in plan.cells]
        rows = [one.row(cell) for one, cell in zip(outcomes, plan.cells, strict=True)]
        numbers = [
            (cell.values, one.numbers)
            for one, cell in zip(outcomes, plan.cells, strict=True)
            if one.numbers is not None
        ]
        written, trouble = [], None
        try:
            with files.staged(place.folder) as staging:
                write_csv(rows, staging / TABLE_FILE)
                turn.check()
                # Published before the figure is drawn, which may fail.
                files.publish(staging, place.folder, (TABLE_FILE,))
                written.append(place.folder / TABLE_FILE)
                if numbers:
                    figure = draw_sweep(numbers, plan.steps)
                    figure.savefig(staging / FIGURE_FILE, dpi=PAGE_DPI)
                    turn.check()
                    files.publish(staging, place.folder, (FIGURE_FILE,))
                    written.append(place.folder / FIGURE_FILE)
        except OSError as error:
            said = f"the table or the figure could not be written to {place.folder}"
            trouble = f"{said} ({files.first_line(error)})"
        finally:
            for line in format_table(rows):
                say(line)
    return Written(written, trouble, outcomes)
