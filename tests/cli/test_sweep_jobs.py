"""Jobs of a sweep: killed at any moment, they leave a whole table, and each run once."""

import csv
import json
import os
import random
import shutil
import signal
import stat
import sys
import threading
import time

import jax.numpy as jnp
import pytest
import yaml

import fastvi
from fastvi.cli import launcher
from fastvi.cli import sweep as sweep_module
from tests.support import sweep_model
from tests.support.command_line import run

CELLS, JOBS, PATIENCE = 24, 4, 1800.0
FAST = {
    "method": "variational",
    "steps": 20,
    "M": 1,
    "r": 0,
    "eval_samples": 16,
    "early_stop": False,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An estimate on disk, which stands in for those of a sweep."""
    data = (jnp.ones((20, 1)),)
    result = fastvi.estimate_llc(
        lambda w, batch: 0.5 * jnp.sum(w**2) * jnp.mean(batch[0]),
        jnp.zeros(3),
        data,
        num_chains=1,
        progress=False,
        **FAST,
    )
    return result.save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def place(tmp_path, monkeypatch, saved):
    """A current folder with a sweep of stand-ins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "log").touch()
    monkeypatch.setenv(sweep_model.LOG, str(tmp_path / "log"))
    monkeypatch.setenv(sweep_model.STAND_IN, str(saved))
    monkeypatch.setenv(sweep_model.SECONDS, "0.3")
    root = os.path.dirname(os.path.dirname(fastvi.__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    given = {
        "target": "tests.support.sweep_model:target",
        "out": "out",
        "num_chains": 1,
        "base": FAST,
        "grid": {"seed": [*range(CELLS)]},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(given))
    return tmp_path


def table(place):
    with (place / "out" / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def noted(place):
    return [line.split()[:2] for line in (place / "log").read_text().splitlines()]


def workers(place):
    """Return the processes that hold runs now."""
    found = set()
    for path in (place / "out" / ".fastvi-leases").glob("seed=*"):
        # one that is released or being written meanwhile
        try:
            found.add(json.loads(path.read_text())["process"])
        except (FileNotFoundError, ValueError, KeyError):
            continue
    return found


def kill_two(place, random, killed):
    """Kill two jobs, each when a random number of runs is done and a random time went by."""
    for least in sorted(random.sample(range(1, CELLS // 2), 2)):
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            done = len(list((place / "out").glob("seed=*/cell.json")))
            alive = sorted(workers(place) - set(killed))
            if done >= least and alive:
                time.sleep(random.uniform(0, 0.5))
                killed.append(random.choice(alive))
                os.kill(killed[-1], signal.SIGKILL)
                break
            time.sleep(0.02)


def sweep_with_two_kills(place, seed):
    killed = []
    killer = threading.Thread(target=kill_two, args=(place, random.Random(seed), killed))
    killer.start()
    status, text, errors = run(
        ["sweep", "--launcher", "submitit", "--executor", "local", "--jobs", str(JOBS)]
    )
    killer.join()
    assert (len(set(killed)), status) == (2, 0), errors
    assert "died" in errors
    rows = table(place)
    assert [row["seed"] for row in rows] == [str(seed) for seed in range(CELLS)]
    assert all(float(row["llc"].split()[0]) > 0 for row in rows), text
    notes = noted(place)
    names = [name for verb, name in notes if verb == "publish"]
    # a process that is killed between the two leaves a run and no note
    assert len(names) == len(set(names)) >= CELLS - 2
    assert not [name for verb, name in notes if verb == "remove"]
    assert sorted(path.name for path in (place / "out").glob("seed=*")) == sorted(
        f"seed={seed}" for seed in range(CELLS)
    )


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_two_killed_jobs_leave_a_whole_table_and_each_run_once(place, seed):
    sweep_with_two_kills(place, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_two_killed_jobs_of_estimates_leave_a_whole_table(place, monkeypatch, seed):
    monkeypatch.delenv(sweep_model.STAND_IN)
    # each job compiles, and what it estimates is of no interest
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    sweep_with_two_kills(place, seed)


class Job:
    """A job of a fake executor: it runs in this process, dies, or never ends."""

    def __init__(self, number, function, sweep, dies):
        self.job_id, self.function, self.sweep, self.dies = str(number), function, sweep, dies
        self.state, self.cancelled = "RUNNING", False
        self.paths = type("Paths", (), {"result_pickle": self, "stderr": "log"})()

    def task(self, number):
        return self

    def exists(self):
        return self.dies is False

    def done(self):
        if self.dies is False and self.state == "RUNNING":
            self.found = self.function(self.sweep)
        self.state = self.state if self.dies is None else "FAILED"
        return self.dies is not None

    def exception(self):
        return None

    def result(self):
        return self.found

    def cancel(self, check):
        self.cancelled = True


class Executor:
    """A fake executor: `dies` says of each submitted job whether it does, or None for no end."""

    cluster = "fake"

    def __init__(self, dies):
        self.dies, self.jobs = dies, []

    def map_array(self, function, sweeps):
        fresh = []
        for sweep in sweeps:
            number = len(self.jobs) + len(fresh)
            fresh.append(Job(number, function, sweep, self.dies(number)))
        self.jobs += fresh
        return fresh


@pytest.fixture
def fake(place, monkeypatch):
    """Let jobs be those of a fake executor, in this process, without waiting."""
    context = pytest.MonkeyPatch()
    for module, name in (
        (sweep_module, "make_executor"),
        (os, "rename"),
        (launcher, "POLL_SECONDS"),
        (sweep_model.sweep_cells, "estimate_origin"),
        (sweep_model.sweep_cells, "observe_problem"),
        (sweep_model.sweep_round, "draw_sweep"),
        (sweep_model.runs, "plot_traces"),
        (sweep_model.runs, "write_report"),
    ):
        context.setattr(module, name, getattr(module, name))  # put back what the target replaces
    monkeypatch.setenv(sweep_model.SECONDS, "0")
    launcher.POLL_SECONDS = 0

    def chosen(dies):
        executor = Executor(dies)
        sweep_module.make_executor = lambda launch, folder: executor
        return executor

    yield chosen
    context.undo()


def launched(*options):
    return run(["sweep", "--launcher", "submitit", *options])


def test_jobs_that_die_are_submitted_again_so_often(fake, place):
    executor = fake(lambda number: True)
    status, _, errors = launched("--jobs", "2", "--retries", "3")
    assert status == 1
    assert len(executor.jobs) == 2 * 4
    assert {job.sweep.shard for job in executor.jobs} == {"1/2", "2/2"}
    assert f"fastvi: {CELLS} of {CELLS} runs are missing: seed=0, seed=1, seed=2, ..." in errors
    assert [row["findings"] for row in table(place)] == ["no run yet"] * CELLS


def test_one_job_that_lives_does_the_work_of_those_that_died(fake, place):
    executor = fake(lambda number: number != 3)
    status, text, errors = launched("--jobs", "3", "--retries", "1")
    assert status == 0, errors
    assert len(executor.jobs) <= 6
    assert sorted(noted(place)) == sorted(["publish", f"seed={seed}"] for seed in range(CELLS))
    assert "written: out/table.csv, out/sweep.png" in text


def test_no_more_jobs_than_runs_and_no_run_twice(fake, place):
    given = yaml.safe_load((place / "sweep.yaml").read_text())
    (place / "sweep.yaml").write_text(yaml.safe_dump({**given, "grid": {"seed": [0, 1]}}))
    executor = fake(lambda number: False)
    assert launched()[0] == 0
    assert len(executor.jobs) == 2
    assert noted(place) == [["publish", "seed=0"], ["publish", "seed=1"]]
    assert launched()[0] == 0
    assert len(noted(place)) == 2


def test_what_another_attempt_would_meet_again_is_told_once(fake, place):
    given = yaml.safe_load((place / "sweep.yaml").read_text())
    (place / "sweep.yaml").write_text(yaml.safe_dump({**given, "target": "absent_model:target"}))
    executor = fake(lambda number: False)
    status, _, errors = launched("--jobs", "2")
    assert status == 1
    assert len(executor.jobs) == 2
    assert errors.count("fastvi: error of a job: TARGET 'absent_model:target'") == 1


def test_ctrl_c_cancels_jobs_and_keeps_what_is_done(fake, place, monkeypatch):
    executor = fake(lambda number: False if number == 0 else None)

    def interrupted(seconds):
        if any((place / "out").glob("seed=*")):
            raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "time", type("Time", (), {"sleep": interrupted}))
    monkeypatch.setattr(launcher.time, "monotonic", time.monotonic, raising=False)
    given = yaml.safe_load((place / "sweep.yaml").read_text())
    (place / "sweep.yaml").write_text(yaml.safe_dump({**given, "grid": {"seed": [0, 1, 2]}}))
    monkeypatch.setattr(launcher, "LAST_SECONDS", 1e9)
    status, _, errors = launched("--jobs", "3")
    assert status == 130
    assert [job.cancelled for job in executor.jobs] == [False, True, True]
    assert "fastvi: jobs are cancelled; 3 of 3 runs are done and stay" in errors
    assert len(list((place / "out").glob("seed=*"))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "2"], "--jobs is of a launcher: add --launcher submitit"),
        (["--retries", "0"], "--retries is of a launcher"),
        (["--executor", "local"], "--executor is of a launcher"),
        (["--launch", "timeout_min=3"], "--launch is of a launcher"),
        (["--wait"], "--wait is of a shard"),
        (["--lease", "0"], "--lease must be a number of seconds > 0; got 0.0"),
        (["--launcher", "submitit", "--jobs", "0"], "--jobs must be 1 or more; got 0"),
        (["--launcher", "submitit", "--retries", "-1"], "--retries must be 0 or more; got -1"),
        (["--launcher", "submitit", "--shard", "1/2"], "--shard is what a launcher gives"),
        (["--launcher", "submitit", "--launch", "a"], "--launch takes NAME=VALUE"),
        (
            ["--launcher", "submitit", "--executor", "local", "--launch", "slurm_nonsense=1"],
            "Unknown argument 'nonsense' for executor 'slurm'",
        ),
        (
            ["--launcher", "submitit", "--executor", "local", "--launch", "timeout_min=long"],
            'Parameter "timeout_min" expected type',
        ),
    ],
)
def test_options_of_jobs_are_refused_before_anything_is_withdrawn(options, message, place):
    (place / "out").mkdir()
    (place / "out" / "run.json").write_text('{"format": "fastvi sweep", "version": 2}')
    (place / "out" / "table.csv").write_text("earlier")
    status, _, errors = run(["sweep", *options])
    assert (status, errors.count("\n")) == (2, 1)
    assert message in errors
    assert (place / "out" / "table.csv").read_text() == "earlier"


def test_submitit_is_named_with_its_extra(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    status, _, errors = launched()
    assert status == 2
    assert 'submitit: pip install "fastvi[cluster]"' in errors


SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
text = open(script).read()
open("sbatch.txt", "a").write(text)
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", text).groups())
for task in range(first, last + 1):
    names = {{"ARRAY_JOB_ID": "77", "ARRAY_TASK_ID": task, "JOB_ID": 77 + task, "NTASKS": 1,
             "JOB_NUM_NODES": 1, "NODEID": 0, "PROCID": 0, "LOCALID": 0}}
    environment = {{**os.environ, **{{f"SLURM_{{k}}": str(v) for k, v in names.items()}}}}
    with open(f"slurm-{{task}}.log", "w") as log:
        subprocess.Popen(["bash", script], env=environment, stdout=log, stderr=log)
print("Submitted batch job 77")
"""
SRUN = """#!{python}
import os, sys
rest = sys.argv[1:]
while rest[0].startswith("-"):
    rest = rest[2:] if rest[0] in ("--output", "--error") else rest[1:]
os.execvp(rest[0], rest)
"""
SACCT = """#!{python}
print("JobID|State|NodeList")
"""


@pytest.mark.slow
def test_slurm_gets_an_array_with_the_parameters(place, monkeypatch):
    (place / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT), ("scancel", SACCT)):
        path = place / "bin" / name
        path.write_text(text.format(python=sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", os.pathsep.join([str(place / "bin"), os.environ["PATH"]]))
    assert shutil.which("sbatch") == str(place / "bin" / "sbatch")
    status, _, errors = launched(
        "--jobs", "2", "--launch", "timeout_min=17", "slurm_partition=gpu",
        "slurm_array_parallelism=1", "slurm_use_srun=true",
    )  # fmt: skip
    assert status == 0, errors
    assert len(table(place)) == CELLS
    assert sorted(noted(place)) == sorted(["publish", f"seed={seed}"] for seed in range(CELLS))
    script = (place / "sbatch.txt").read_text()
    for line in ("--array=0-1%1", "--partition=gpu", "--time=17", "--job-name=fastvi-sweep"):
        assert f"#SBATCH {line}\n" in script
