"""`--mesh` and `--distributed`: what is refused, and which devices are taken."""

import json
import subprocess
import sys

import jax
import pytest

from fastvi import ConfigError
from fastvi.cli.devices import devices_of, make_mesh, read_mesh
from tests.support.host_devices import environment_with

PROGRAM = """
import json
from fastvi.cli.devices import make_mesh
shapes = [make_mesh(None, walkers).shape for walkers in (8, 6, 5)]
print(json.dumps([dict(shape) for shape in shapes + [make_mesh((2, 2), 8).shape]]))
"""


def test_meshes_are_read():
    assert [read_mesh(text) for text in ("8", "4x2")] == [(8, 1), (4, 2)]
    for text in ("", "0", "x2", "4x", "4x0", "-1", "4x2x1", "all"):
        with pytest.raises(ConfigError, match="--mesh must be W or WxD"):
            read_mesh(text)


def test_more_devices_than_there_are_are_refused():
    count = jax.device_count() + 1
    with pytest.raises(ConfigError, match=f"--mesh {count}x1 takes {count} devices, and jax has"):
        make_mesh((count, 1), 8)


def test_without_options_nothing_is_divided():
    with devices_of(None, None, 8) as is_first:
        assert is_first
    assert not jax.distributed.is_initialized()


def test_places_of_processes_are_checked():
    for text in ("host:1", "host,1/2", "host:1,3/2", "host:1,0/2", "1/2"):
        with (
            pytest.raises(ConfigError, match='--distributed must be "auto"'),
            devices_of(None, text, 8),
        ):
            pass


def test_all_devices_are_divided_by_the_walkers():
    environment = environment_with(8)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    found = [(one["walkers"], one["data"]) for one in json.loads(done.stdout.splitlines()[-1])]
    assert found == [(8, 1), (2, 4), (1, 8), (2, 2)]
