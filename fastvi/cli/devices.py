"""The devices of a command: `--mesh` and `--distributed`."""

import contextlib
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from fastvi._devices import DATA, WALKERS
from fastvi._errors import ConfigError
from fastvi._processes import is_first

MESH_RULE = "--mesh must be W or WxD: devices for walkers, and for the examples of a batch"
DISTRIBUTED_RULE = (
    '--distributed must be "auto" in a job of a cluster that jax knows, or HOST:PORT,I/N: where '
    "the first of N processes listens, and that this is the I-th"
)


@contextlib.contextmanager
def devices_of(mesh: str | None, distributed: str | None, walkers: int) -> Iterator[bool]:
    """Join the other processes, and divide the work of the block over devices.

    Args:
        mesh: `W` or `WxD`; where it is None, all devices of several processes, or one.
        distributed: "auto" or `HOST:PORT,I/N`; None for a process by itself.
        walkers: Walkers that are to be divided, by which the default mesh is chosen.

    Yields:
        Whether this process is the one that writes and tells.

    Raises:
        ConfigError: If a text is of another form, there are not so many devices, or the processes
            do not find each other.
    """
    shape = None if mesh is None else read_mesh(mesh)
    if distributed is not None:
        _join(distributed)
    try:
        if shape is None and distributed is None:
            yield True
            return
        with jax.set_mesh(make_mesh(shape, walkers)):
            yield is_first()
    finally:
        if distributed is not None:
            jax.distributed.shutdown()


def read_mesh(text: str) -> tuple[int, int]:
    """Return devices for walkers and for data.

    Raises:
        ConfigError: If the text is of another form.
    """
    rows, _, columns = text.partition("x")
    columns = columns if "x" in text else "1"
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise ConfigError(f"{MESH_RULE}; got {text!r}. Try --mesh 2.")
    return int(rows), int(columns)


def make_mesh(shape: tuple[int, int] | None, walkers: int) -> Mesh:
    """Return a mesh of the first devices, or of all of them where no shape is given.

    Raises:
        ConfigError: If there are fewer.
    """
    devices = jax.devices()
    if shape is None:  # as many rows as divide the walkers
        rows = math.gcd(walkers, len(devices))
        shape = rows, len(devices) // rows
    count = shape[0] * shape[1]
    if count > len(devices):
        raise ConfigError(
            f"--mesh {shape[0]}x{shape[1]} takes {count} devices, and jax has {len(devices)}. On "
            "CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of one."
        )
    return Mesh(np.asarray(devices[:count]).reshape(shape), (WALKERS, DATA))


def _join(distributed: str) -> None:
    """Begin `jax.distributed`."""
    address, comma, place = distributed.partition(",")
    number, _, count = place.partition("/")
    arguments = {}
    if distributed != "auto":
        is_place = number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)
        if not (comma and ":" in address and is_place):
            raise ConfigError(f"{DISTRIBUTED_RULE}; got {distributed!r}.")
        arguments = {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(number) - 1,
        }
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{DISTRIBUTED_RULE}; jax says: {said}") from error
