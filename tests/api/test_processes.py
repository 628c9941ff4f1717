"""Two processes with two devices each find the numbers of one process with one device."""

import contextlib
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import enable_x64

import fastvi
from tests.support import meshes
from tests.support.host_devices import ROOT, environment_with


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = environment_with(2, JAX_ENABLE_X64="1", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.processes", str(number), str(port), str(folder)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate() for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


@pytest.fixture(scope="module")
def alone():
    with enable_x64(True):
        inputs = meshes.WEIGHTS, meshes.DATA
        return fastvi.estimate_llc(meshes.loss, *inputs, **meshes.OPTIONS, **meshes.FROM_LOCALIZER)


def test_all_processes_find_the_same(found):
    assert found[0] == found[1] | {"broken": found[0]["broken"]}
    assert found[0]["devices"] == 4


def test_two_processes_find_the_numbers_of_one(found, alone):
    one = found[0]["walk"]
    assert abs(one["llc"] - alone.llc) < 1e-6 * alone.llc_sem
    np.testing.assert_allclose(one["walk"], alone.walk_llc, rtol=1e-6)


def test_other_ways_to_the_data_agree_within_errors(found, alone):
    # the same examples in another order, and other ones
    for name, count in (("fit", 1003), ("parts", 1003), ("global", 1000)):
        assert found[0][name]["n"] == count
    for name in ("fit", "parts", "once", "global"):
        one = found[0][name]
        assert abs(one["llc"] - alone.llc) < 4 * np.hypot(one["error"], alone.llc_sem), name


def test_errors_of_one_process_reach_all(found):
    assert "process 1 could not read its part" in found[0]["broken"]
    assert "a disk has gone" in found[1]["broken"]
    for one in found:
        assert "same first batch" in one["same"]
        assert "one process" in one["resumed"]


def test_one_process_writes(found, folder):
    kept = fastvi.LLCEstimate.load(folder / "runs" / "a")
    assert kept.llc == found[0]["walk"]["llc"]
    # neither the folder that was refused, nor anything of the other process
    assert [path.name for path in folder.iterdir()] == ["runs"]
    assert not [path for path in folder.rglob("*") if ".fastvi" in path.name]
