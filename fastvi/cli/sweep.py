"""`fastvi sweep`.

One model under a grid of settings, over checkpoints and parts of the weights; an interrupted sweep
goes on where it stopped, and processes on any number of machines share one.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from fastvi._errors import ConfigError
from fastvi.cli.launcher import Launch, make_executor, parse_launch, watch_jobs
from fastvi.cli.sweep_cells import Outcome, Problems, Workplace
from fastvi.cli.sweep_plan import Cell, SweepPlan, read_plan
from fastvi.cli.sweep_round import Written, joined, write_sweep
from fastvi.demos.base import Say
from fastvi.results.claim import SWEEP, prepared
from fastvi.results.lease import SECONDS
from fastvi.results.runs import check_packages
from fastvi.results.terminal import warn

WAIT_SECONDS = 1.0  # between looks at runs that other processes hold


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Estimate under every combination of a grid of settings.

    Attributes:
        config: YAML file with a target and a grid; started again, an interrupted sweep goes on.
        out: Folder of the sweep; runs/NAME of the file when neither it nor the file says.
        trust: Run the code that a run folder names, where the target is one.
        quiet: Print the table alone.
        shard: Take every N-th run first, from the I-th on, then what nobody else has: I/N from 1/N
            to N/N, or "slurm" for the place of this job in its array. Ends when other processes
            hold all that is left.
        wait: With a shard, wait for what others hold, and take it over from those that die.
        lease: Seconds without a sign of life after which a run is taken from its process.
        launcher: Submit jobs that run the sweep, and wait for them.
        jobs: How many jobs, of a launcher; 4 when left out.
        executor: Where submitit runs them; SLURM where there is one, else this machine.
        launch: Parameters of submitit, for example --launch timeout_min=240 slurm_partition=gpu.
        retries: Times that a job which died is submitted again; 3 when left out.
    """

    config: Path = dataclasses.field(default=Path("sweep.yaml"), metadata={"metavar": "SWEEP.YAML"})
    out: Path | None = dataclasses.field(default=None, metadata={"metavar": "FOLDER"})
    trust: bool = False
    quiet: bool = False
    shard: str | None = dataclasses.field(default=None, metadata={"metavar": "I/N or 'slurm'"})
    wait: bool = False
    lease: float = SECONDS
    launcher: Literal["submitit"] | None = None
    jobs: int | None = None
    executor: Literal["local", "slurm", "debug"] | None = None
    launch: tuple[tuple[str, ...], ...] = dataclasses.field(
        default=(), metadata={"metavar": "NAME=VALUE [NAME=VALUE ...]", "repeated": True}
    )
    retries: int | None = None

    def run(self, say: Say) -> int:
        """Run what is missing, then write the table and the figure, then tell them."""
        check_packages()
        launch = self._check_options()
        plan = read_plan(self.config, trust=self.trust)
        where = self.out or plan.out or Path("runs") / self.config.stem
        if launch is not None:
            return self._launch(launch, plan, where, say)
        place, count, name = (
            (1, 1, None) if self.shard is None else read_shard(self.shard, os.environ)
        )
        tell = (lambda line: None) if self.quiet else say
        with prepared(where, SWEEP) as folder, joined(folder, plan, self.lease, name) as workplace:
            problems = Problems(plan)
            outcomes = settle_all(
                in_order(plan.cells, place, count),
                workplace,
                problems,
                tell,
                progress=not self.quiet,
                waits=self.wait or self.shard is None,
            )
            tell("")
            written = write_sweep(workplace, plan, outcomes, say)
        _tell_written(written, tell)
        failed = any(outcome.failed for outcome in outcomes.values())
        return int(written.trouble is not None or failed)

    def _check_options(self) -> Launch | None:
        """Return what is to be launched, and refuse options that would have no effect."""
        if not 0 < self.lease < float("inf"):
            raise ConfigError(f"--lease must be a number of seconds > 0; got {self.lease!r}.")
        if self.wait and self.shard is None:
            raise ConfigError("--wait is of a shard; a whole sweep waits. Leave it out.")
        of_jobs = {
            "--jobs": self.jobs,
            "--executor": self.executor,
            "--launch": self.launch or None,
            "--retries": self.retries,
        }
        given = [option for option, value in of_jobs.items() if value is not None]
        if self.launcher is None:
            if given:
                raise ConfigError(f"{given[0]} is of a launcher: add --launcher submitit.")
            return None
        if self.shard is not None:
            raise ConfigError("--shard is what a launcher gives to its jobs. Leave one out.")
        return parse_launch(self.jobs, self.executor, self.launch, self.retries)

    def _launch(self, launch: Launch, plan: SweepPlan, where: Path, say: Say) -> int:
        """Submit jobs that run the sweep, wait for them, and write what they have left."""
        tell = (lambda line: None) if self.quiet else say
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(prepared(where, SWEEP))
            executor = make_executor(launch, folder)
            workplace = stack.enter_context(joined(folder, plan, self.lease))
            job = Sweep(
                config=self.config.resolve(),
                out=folder.resolve(),
                trust=self.trust,
                quiet=self.quiet,
                lease=self.lease,
            )
            shards = [
                dataclasses.replace(job, shard=f"{place}/{launch.jobs}")
                for place in range(1, launch.jobs + 1)
            ]
            watch_jobs(executor, launch.retries, shards, workplace, plan, progress=not self.quiet)
            written = write_sweep(workplace, plan, {}, say)
        _tell_written(written, tell)
        missing = [
            cell.name
            for cell, outcome in zip(plan.cells, written.outcomes, strict=True)
            if outcome.numbers is None
        ]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            warn(f"fastvi: {len(missing)} of {len(plan.cells)} runs are missing: {shown}")
        return int(written.trouble is not None or bool(missing))


def settle_all(
    cells: Sequence[Cell],
    place: Workplace,
    problems: Problems,
    tell: Say,
    *,
    progress: bool,
    waits: bool,
) -> dict[str, Outcome]:
    """Keep or run cells, in their order, leaving out those that other processes hold.

    Those are looked at again, for their processes may die.

    Args:
        cells: The cells.
        place: Folder and round.
        problems: What is estimated on.
        tell: Is told each cell, on a line.
        progress: Whether to show a status line.
        waits: Whether to stay until none is left; otherwise until others hold all that are.

    Returns:
        By its name, what became of each cell that is settled.
    """
    outcomes: dict[str, Outcome] = {}
    left = [*cells]
    while left:
        held = []
        for cell in left:
            outcome = place.settle(cell, problems, tell, progress=progress)
            if outcome is None:
                held.append(cell)
                continue
            outcomes[cell.name] = outcome
            tell(f"[{len(outcomes)}/{len(cells)}] {cell.name}: {outcome.words}")
        if len(held) == len(left):
            if not waits:
                break
            time.sleep(WAIT_SECONDS)
        left = held
    return outcomes


def in_order(cells: Sequence[Cell], place: int, count: int) -> list[Cell]:
    """Return the cells of a shard, then those of the shards after it, one after the other."""
    return [cell for first in range(count) for cell in cells[(place - 1 + first) % count :: count]]


def read_shard(shard: str, environment: Mapping[str, str]) -> tuple[int, int, str | None]:
    """Return the place of a part, from 1 on, the number of parts, and the name of the array.

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
        array = environment.get("SLURM_ARRAY_JOB_ID")
        return (number - least) // step + 1, count, array and f"slurm-{array}"
    place, _, count = shard.partition("/")
    if place.isdecimal() and count.isdecimal() and 1 <= int(place) <= int(count):
        return int(place), int(count), None
    raise ConfigError(f'--shard must be I/N with I from 1 to N, or "slurm"; got {shard!r}.')


def _tell_written(written: Written, tell: Say) -> None:
    tell(f"\nwritten: {', '.join(map(str, written.paths)) or 'nothing'}")
    if written.trouble is not None:
        warn(f"fastvi: warning: {written.trouble}")
