"""A lease is of one process at a time, and of nobody who is dead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import fastvi
from fastvi.results import lease as lease_module
from fastvi.results.lease import LeaseLostError, holder_of, is_living, take

PATIENCE = 120.0  # seconds for what takes one at most
# A process without jax, which takes a lease, says so, and after a line says whether it has it.
HOLDER = """
import sys, types
package = types.ModuleType("fastvi")
package.__path__ = [sys.argv[1] + "/fastvi"]
sys.modules["fastvi"] = package
from pathlib import Path
from fastvi.results.lease import take
lease = take(Path(sys.argv[2]), seconds=float(sys.argv[3]))
print("taken", flush=True)
sys.stdin.readline()
print(lease.is_held, flush=True)
lease.release()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lease"


def of_another_machine(path, seconds=60.0, age=0.0):
    content = {"token": "theirs", "seconds": seconds, "host": "far", "process": os.getpid()}
    path.write_text(json.dumps({**content, "machine": "another", "started": "1"}))
    made_older(path, age)


def made_older(path, age):
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))


def waited_for(condition):
    ends = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return found


def holder(path, seconds):
    root = os.path.dirname(os.path.dirname(fastvi.__file__))
    command = [sys.executable, "-c", HOLDER, root, str(path), str(seconds)]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    assert process.stdout.readline() == "taken\n"
    return process


def test_a_lease_is_of_one_and_is_given_back(path):
    with take(path) as lease:
        assert lease.is_held
        assert take(path) is None
        assert holder_of(path) == f"process {os.getpid()} on {os.uname().nodename}"
    assert list(path.parent.iterdir()) == []
    assert holder_of(path) is None


def test_a_process_that_ended_here_holds_nothing(path):
    with holder(path, 1e6) as process:
        assert take(path) is None
        process.kill()
        # nobody has waited for it, so that its number is still taken
        waited_for(lambda: not is_living(path))
        with take(path) as lease:
            assert lease.is_held
    assert list(path.parent.iterdir()) == []


def test_a_number_that_a_later_process_has_is_no_sign_of_life(path):
    with take(path):
        content = json.loads(path.read_text())
    assert content["process"] == os.getpid()
    path.write_text(json.dumps(content))
    assert is_living(path)
    path.write_text(json.dumps({**content, "started": "1"}))
    assert not is_living(path)


@pytest.mark.parametrize("seconds", [5.0, 600.0])
def test_a_lease_of_another_machine_expires_by_its_own_term(path, seconds):
    of_another_machine(path, seconds, age=seconds - 4.0)
    assert take(path) is None
    made_older(path, 5.0)
    with take(path) as lease:
        assert lease.is_held


def test_clocks_of_machines_say_nothing(path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    of_another_machine(path, age=56.0)
    assert is_living(path)
    made_older(path, 5.0)
    assert not is_living(path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"token": 3, "seconds": "x"}'])
def test_a_lease_that_says_nothing_expires_too(path, content):
    path.write_text(content)
    assert take(path) is None
    made_older(path, lease_module.SECONDS + 1)
    with take(path) as lease:
        assert lease.is_held


def test_a_lease_is_renewed_while_it_is_held(path):
    with take(path, seconds=2.0):
        for _ in range(2):
            made_older(path, 1.0)
            then = path.stat().st_mtime
            waited_for(lambda: path.stat().st_mtime > then + 0.9)  # noqa: B023
    # the thread ends with the last lease
    waited_for(lambda: all(one.name != "leases" for one in threading.enumerate()))
    assert list(path.parent.iterdir()) == []


def test_one_that_comes_back_has_lost_what_was_taken(path):
    with holder(path, 0.5) as process:
        process.send_signal(signal.SIGSTOP)
        lease = waited_for(lambda: take(path))
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate("\n", timeout=PATIENCE)
    assert out == "False\n"
    # nor has it removed the lease of the other
    assert lease.is_held
    lease.release()


def test_a_lost_lease_is_told_before_anything_is_published(path):
    with take(path) as lease:
        lease.check()
        path.unlink()
        of_another_machine(path)
        with pytest.raises(LeaseLostError, match="another process has taken"):
            lease.check()
        lease.renew()
    assert holder_of(path) == f"process {os.getpid()} on far"


def test_who_is_late_takes_no_living_lease(path, monkeypatch):
    """Two see an expired lease; one has taken it when the other moves the file away."""
    of_another_machine(path, age=61.0)
    withdraw, mine = lease_module._withdraw, []

    def late(*args):
        if not mine:
            monkeypatch.setattr(lease_module, "_withdraw", withdraw)
            mine.append(take(path))
        return withdraw(*args)

    monkeypatch.setattr(lease_module, "_withdraw", late)
    assert take(path) is None
    assert mine[0].is_held
    mine[0].release()
    assert list(path.parent.iterdir()) == []


def test_one_that_is_renewed_at_the_last_moment_is_kept(path, monkeypatch):
    of_another_machine(path, age=61.0)
    withdraw = lease_module._withdraw

    def late(*args):
        os.utime(path)
        return withdraw(*args)

    monkeypatch.setattr(lease_module, "_withdraw", late)
    assert take(path) is None
    assert json.loads(path.read_text())["token"] == "theirs"


def test_one_alone_of_many_takes_an_expired_lease(path):
    for number in range(20):
        # a file of its own: the thread that renews may still be at the one before
        mine = path.with_name(f"lease-{number}")
        of_another_machine(mine, age=61.0)
        taken, start = [], threading.Barrier(8)

        def race(mine=mine, taken=taken, start=start):
            start.wait()
            taken.append(take(mine))

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = [lease for lease in taken if lease is not None and lease.is_held]
        assert len(held) == 1
        held[0].release()


def test_a_full_disk_leaves_no_lease(path, monkeypatch):
    class Full:
        def __init__(self, handle, mode):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *error):
            os.close(self.handle)

        def write(self, text):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lease_module.os, "fdopen", Full)
        with pytest.raises(OSError, match="No space left"):
            take(path)
    assert not path.exists()
