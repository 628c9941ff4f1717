"""The command that measures on a GPU, where there is none: its order, its limit, its numbers."""

import functools
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bench import gpu, gpu_numbers, gpu_stages
from bench.gpu import FAILED, MEASURED, PARTLY
from bench.gpu_stages import SHORT, STAGES, Piece
from fastvi.kernels import OPS
from fastvi.kernels._dispatch import current_platform

ON_A_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a machine without a GPU")


class Clock:
    """A time that goes on by what stages take."""

    def __init__(self, taken, statuses=()):
        self.now, self.taken, self.statuses, self.launched = 0.0, taken, dict(statuses), []

    def __call__(self):
        return self.now

    def launch(self, stage, left):
        self.launched.append((stage, left))
        self.now += min(self.taken, left)
        return self.statuses.get(stage, MEASURED)


def test_stages_run_in_the_order_of_their_importance(capsys):
    clock = Clock(10.0)
    asked = ["estimates", "numbers", "copies"]
    assert gpu.run_stages(asked, 600.0, clock.launch, clock) == MEASURED
    assert clock.launched == [("numbers", 600.0), ("copies", 590.0), ("estimates", 580.0)]
    assert "copies: measured" in capsys.readouterr().out


def test_what_no_longer_fits_is_left_out_and_said(capsys):
    clock = Clock(250.0)
    assert gpu.run_stages(list(STAGES), 600.0, clock.launch, clock) == PARTLY
    assert [left for _, left in clock.launched] == [600.0, 350.0, 100.0]
    said = capsys.readouterr().out
    assert "steps: left out, 0 s are left" in said
    assert said.count("partly: out of time") == len(STAGES) - 3


def test_a_stage_that_fails_takes_no_other_with_it(capsys):
    clock = Clock(1.0, {"numbers": FAILED, "steps": PARTLY})
    assert gpu.run_stages(list(STAGES), 600.0, clock.launch, clock) == FAILED
    assert [stage for stage, _ in clock.launched] == list(STAGES)
    said = capsys.readouterr().out
    assert "numbers: FAILED" in said
    assert "estimates: measured" in said


def test_pieces_leave_rows_and_wrong_numbers_a_status(monkeypatch, capsys):
    recorded = []
    monkeypatch.setattr(gpu, "record", lambda table, rows: recorded.append((table, rows)))
    right, wrong = [{"error": 0.0, "is_right": True}], [{"error": 1.0, "is_right": False}]

    def pieces(*rows_of_pieces, kept=1.0):
        return lambda stage, form: (
            Piece("a piece", "table", kept, lambda rows=rows: rows) for rows in rows_of_pieces
        )

    run = functools.partial(gpu.run_stage, "numbers", "cpu", time.time() + 600)
    monkeypatch.setattr(gpu, "pieces", pieces(right, right))
    assert run(append=True) == MEASURED
    assert recorded == [("table", right)] * 2
    monkeypatch.setattr(gpu, "pieces", pieces(wrong, right))
    assert run(append=False) == FAILED
    assert len(recorded) == 2
    assert "WRONG NUMBERS" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "pieces", pieces(right, kept=1e6))
    assert run(append=True) == PARTLY
    assert "left out: a piece is kept 1000000 s" in capsys.readouterr().out


def test_a_process_that_outlasts_its_time_is_ended(monkeypatch, capsys):
    slow = [sys.executable, "-c", "import time; time.sleep(600)"]
    run = subprocess.run
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **rest: run(slow, **rest))
    assert gpu.launch("numbers", "cpu", 0.5, append=False) == PARTLY
    assert "numbers: ended after" in capsys.readouterr().out
    broken = [sys.executable, "-c", "raise SystemExit(134)"]
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **rest: run(broken, **rest))
    assert gpu.launch("numbers", "cpu", 60.0, append=False) == FAILED


@ON_A_CPU
def test_without_a_gpu_nothing_is_measured(capsys):
    assert gpu.describe_device("gpu") == gpu.NO_GPU
    assert "no GPU: jax sees" in capsys.readouterr().out
    assert gpu.describe_device("cpu") == MEASURED
    assert "say nothing of a GPU" in capsys.readouterr().out


def test_every_kernel_that_runs_here_is_checked():
    names = {(check.kernel, check.implementation) for check in gpu_numbers.checks(5)}
    assert names >= {
        (kernel, name)
        for kernel, op in OPS.items()
        for name, one in op.implementations.items()
        if name != "reference" and one.obstacle(current_platform()) is None
    }


def test_a_wrong_kernel_is_found():
    """A diagonal that is off by one part in a thousand, as with products of 11 bits."""
    checks = {check.kernel: check for check in gpu_numbers.checks(33)}
    check = checks["hutchinson"]
    assert gpu_numbers.row(check)["is_right"]
    off = check._replace(actual=lambda: [1.001 * np.asarray(one) for one in check.actual()])
    found = gpu_numbers.row(off)
    assert found["error"] == pytest.approx(1e-3, rel=0.01)
    assert not found["is_right"]
    spoiled = check._replace(actual=lambda: [np.nan * np.asarray(one) for one in check.actual()])
    assert not gpu_numbers.row(spoiled)["is_right"]


def test_copies_are_timed():
    rows = gpu_stages.copy_rows(2**12, rounds=2)
    assert [row["copy"] for row in rows] == ["host to device", "device to host", "on the device"]
    for row in rows:
        moved = row["bytes"] * (2 if row["copy"] == "on the device" else 1)
        assert row["gb_per_s"] == pytest.approx(moved / (1e3 * row["us"]))


@pytest.mark.slow
@ON_A_CPU
def test_the_whole_command_in_its_short_form(tmp_path):
    environment = os.environ | {"BENCH_KEEP": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == MEASURED, done.stdout + done.stderr
    for stage in STAGES:
        assert f"{stage}: measured" in done.stdout
    for problem in SHORT.problems:
        assert f"{problem} in bfloat16" in done.stdout
