"""Run the shards of a sweep as jobs, by submitit: submit, watch, submit again those that died."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastvi._errors import ConfigError, DataError
from fastvi._optional import MissingExtraError, import_optional
from fastvi.cli.sweep_cells import Workplace
from fastvi.cli.sweep_plan import Cell, SweepPlan
from fastvi.cli.target import parse_settings
from fastvi.fitting.protocols import Progress
from fastvi.results.claim import ASIDE
from fastvi.results.progress import reporting
from fastvi.results.terminal import warn

JOBS, RETRIES = 4, 3
JOBS_FOLDER = f"{ASIDE}jobs"  # of submitit's logs, in the folder of the sweep
POLL_SECONDS = 0.5
# Minutes of a job where nothing is said. On a cluster a scheduler must be told a time, and a job
# that runs out of it is submitted again; here a job may take as long as it needs.
MINUTES, MINUTES_HERE = 60, 365 * 24 * 60
# Seconds that jobs get to end by themselves when no run is left; those that the scheduler has not
# begun are cancelled at once. A job that begins looks at all runs, and ends.
LAST_SECONDS = 60.0
CANCEL_SECONDS = 5.0  # that cancelled jobs get to end
# Seconds after which a preempted job that no scheduler has put back into its queue has died.
PREEMPTED_SECONDS = 300.0
# What another attempt would meet again.
REFUSALS = (ConfigError, DataError, MissingExtraError)
# What submitit refuses parameters and submissions with.
REFUSED = (AssertionError, NameError, RuntimeError, TypeError, ValueError, OSError)


class Launch(NamedTuple):
    """How jobs are launched.

    Attributes:
        jobs: How many.
        executor: Where submitit runs them; chosen by it where that is None.
        parameters: What submitit's executor takes.
        retries: Times that each job is submitted again.
    """

    jobs: int
    executor: str | None
    parameters: dict[str, Any]
    retries: int


def parse_launch(
    jobs: int | None,
    executor: str | None,
    launch: Sequence[Sequence[str]],
    retries: int | None,
) -> Launch:
    """Check the options of a launcher.

    Raises:
        ConfigError: If one is impossible.
        MissingExtraError: If submitit is not installed.
    """
    _import_submitit()
    jobs = JOBS if jobs is None else jobs
    retries = RETRIES if retries is None else retries
    if jobs < 1:
        raise ConfigError(f"--jobs must be 1 or more; got {jobs}.")
    if retries < 0:
        raise ConfigError(f"--retries must be 0 or more; got {retries}.")
    parameters = parse_settings([pair for pairs in launch for pair in pairs], "--launch")
    return Launch(jobs, executor, parameters, retries)


class RunShard:
    """What a job runs; submitit pickles it by its name."""

    def __call__(self, sweep: Any) -> str | None:
        """Run a shard; return in words what no other attempt would change, if there is that."""
        try:
            sweep.run(lambda line: print(line, flush=True))
        except REFUSALS as error:
            print(f"fastvi: error: {error}", flush=True)
            return " ".join(str(error).split())
        return None

    def checkpoint(self, sweep: Any) -> Any:
        """Say what goes on where a scheduler preempts the job: the same, as its runs are kept."""
        return _import_submitit().helpers.DelayedSubmission(self, sweep)


class _Ended(NamedTuple):
    """How a job ended: whether by itself, and in words what it could not do or died of."""

    by_itself: bool
    words: str | None


@dataclasses.dataclass
class _Shard:
    """A shard, its job while there is one, and how often it was submitted."""

    sweep: Any
    job: Any = None
    submitted: int = 0
    refusal: str | None = None
    preempted_at: float | None = None


def watch_jobs(
    executor: Any,
    retries: int,
    sweeps: Sequence[Any],
    place: Workplace,
    plan: SweepPlan,
    *,
    progress: bool,
) -> None:
    """Submit a job for each shard, and again those that died, until no run is missing.

    Args:
        executor: Of `make_executor`.
        retries: Times that each job is submitted again.
        sweeps: The commands of the shards.
        place: Folder and round.
        plan: The cells.
        progress: Whether to show a line of what is done.

    Raises:
        ConfigError: If submitit refuses a submission.
    """
    shards, missing = [_Shard(sweep) for sweep in sweeps[: len(plan.cells)]], [*plan.cells]
    nothing_since = None
    with reporting(progress) as report:
        try:
            _submit(executor, shards)
            while True:
                began = time.monotonic()
                died = _let_go(executor, shards)
                # Looked for after the jobs: one that has ended has left what it has done.
                missing = [cell for cell in missing if place.find(cell) is None]
                _submit_again(executor, died, retries, bool(missing))
                running = [shard for shard in shards if shard.job is not None]
                if report is not None:
                    done = len(plan.cells) - len(missing)
                    report(Progress("sweep", done, len(plan.cells), float(len(running))))
                if not missing:
                    nothing_since = nothing_since or time.monotonic()
                    begun = [one for one in running if one.job.state.upper() != "PENDING"]
                    if not begun or time.monotonic() - nothing_since > LAST_SECONDS:
                        break
                elif not running and not _submit_one(executor, shards, retries, place, missing):
                    break
                # A sweep of thousands of runs is looked at for a tenth of the time at most.
                time.sleep(max(POLL_SECONDS, 9 * (time.monotonic() - began)))
        except BaseException:
            left = _cancel(shards)
            done = sum(place.find(cell) is not None for cell in plan.cells)
            warn(f"fastvi: jobs are cancelled; {done} of {len(plan.cells)} runs are done and stay")
            _let_end(left)
            raise
        _let_end(_cancel(shards))
    for words in dict.fromkeys(shard.refusal for shard in shards if shard.refusal):
        warn(f"fastvi: error of a job: {words}")


def _import_submitit() -> Any:
    return import_optional(
        "submitit", extra="cluster", distribution="submitit", purpose="--launcher submitit"
    )


def make_executor(launch: Launch, folder: Path) -> Any:
    """Return submitit's executor, whose logs go into the folder of the sweep.

    Raises:
        ConfigError: If submitit refuses the executor or a parameter.
    """
    submitit = _import_submitit()
    try:
        executor = submitit.AutoExecutor(folder / JOBS_FOLDER, cluster=launch.executor)
        minutes = MINUTES if executor.cluster == "slurm" else MINUTES_HERE
        defaults = {"name": "fastvi-sweep", "timeout_min": minutes}
        executor.update_parameters(**{**defaults, **launch.parameters})
    except REFUSED as error:
        raise ConfigError(f"submitit refuses --launch or --executor: {error}") from error
    return executor


def _submit(executor: Any, shards: Sequence[_Shard]) -> None:
    """Submit shards, as one array where the scheduler has those."""
    try:
        jobs = executor.map_array(RunShard(), [shard.sweep for shard in shards])
    except REFUSED as error:
        raise ConfigError(f"submitit could not submit: {error}") from error
    for shard, job in zip(shards, jobs, strict=True):
        shard.job, shard.submitted, shard.preempted_at = job, shard.submitted + 1, None


def _let_go(executor: Any, shards: Sequence[_Shard]) -> list[tuple[_Shard, str]]:
    """Let go of jobs that have ended; return the shards of those that died, and of what."""
    died = []
    for shard in shards:
        job = shard.job
        ended = None if job is None else _how_it_ended(executor, shard)
        if job is None or ended is None:
            continue
        if ended.by_itself:
            shard.refusal = ended.words
        else:
            died.append((shard, f"job {job.job_id} died ({ended.words})"))
        shard.job = None
    return died


def _submit_again(
    executor: Any, died: Sequence[tuple[_Shard, str]], retries: int, is_missing: bool
) -> None:
    """Submit the shards of jobs that died, each so often at most, while runs are missing."""
    again = [shard for shard, _ in died if is_missing and shard.submitted <= retries]
    for shard, words in died:
        times = f"; submitted again, {shard.submitted} of {retries} times"
        warn(f"fastvi: {words}{times if shard in again else ''}")
    if again:
        _submit(executor, again)


def _how_it_ended(executor: Any, shard: _Shard) -> _Ended | None:
    """Say how a job ended, None where it has not."""
    job = shard.job
    if not job.done():
        return _if_left_preempted(shard)
    if executor.cluster == "debug":  # which runs in this process, and keeps no file
        return _Ended(True, job.result())
    first = job.task(0)
    # submitit would wait for the file; a job that ends by itself has left it.
    if not first.paths.result_pickle.exists():
        return _Ended(False, f"its last state is {job.state}")
    error = first.exception()
    if error is not None:
        said = [line for line in str(error).splitlines() if line.strip(" -")]
        return _Ended(False, f"{said[-3] if len(said) > 2 else error}, see {first.paths.stderr}")
    return _Ended(True, first.result())


def _if_left_preempted(shard: _Shard) -> _Ended | None:
    if not shard.job.state.upper().startswith("PREEMPTED"):
        shard.preempted_at = None
        return None
    shard.preempted_at = shard.preempted_at or time.monotonic()
    left = time.monotonic() - shard.preempted_at > PREEMPTED_SECONDS
    return _Ended(False, "it was preempted and not requeued") if left else None


def _submit_one(
    executor: Any,
    shards: Sequence[_Shard],
    retries: int,
    place: Workplace,
    missing: Sequence[Cell],
) -> bool:
    """Submit a job for runs that no process holds, after all jobs have ended; False if none may."""
    if all(place.is_held(cell) for cell in missing):
        return True  # by processes that were started by hand
    able = [one for one in shards if one.refusal is None and one.submitted <= retries]
    if able:
        _submit(executor, able[:1])
    return bool(able)


def _cancel(shards: Sequence[_Shard]) -> list[Any]:
    """Cancel the jobs that are left, and return them."""
    left = [shard.job for shard in shards if shard.job is not None]
    # One that ended meanwhile is none to be cancelled, and a scheduler may be away.
    with contextlib.suppress(OSError):
        for job in left:
            job.cancel(check=False)
    return left


def _let_end(jobs: Sequence[Any]) -> None:
    ends = time.monotonic() + CANCEL_SECONDS
    while time.monotonic() < ends and not all(job.done() for job in jobs):
        time.sleep(POLL_SECONDS)
