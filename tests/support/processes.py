"""One of two processes with two devices each: prints JSON. Arguments: its number, and a port."""

import functools
import json
import os
import sys
import types
from pathlib import Path

import jax

NUMBER, PORT, FOLDER = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{PORT}", 2, NUMBER)

import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import fastvi  # noqa: E402
from fastvi._errors import ConfigError, DataError  # noqa: E402
from tests.support.markdown import python_blocks  # noqa: E402
from tests.support.meshes import DATA, FROM_FIT, FROM_LOCALIZER, OPTIONS, WEIGHTS, loss  # noqa: E402

DEVICES = np.asarray(jax.devices())
ROOT = Path(__file__).resolve().parents[2]
LENGTH = 1000  # of a global array, which divides over the devices
PASSES = 20  # of an iterator that does not begin anew


class Part:
    """This process's batches: the first process has twice as many as the other."""

    def __init__(self, fails=False, is_shared=False):
        self.fails, self.is_shared = fails, is_shared

    def __iter__(self):
        first, last = ((0, 700), (700, 1003))[0 if self.is_shared else NUMBER]
        for start in range(first, last, 100):
            if self.fails and NUMBER == 1 and start > first:
                raise OSError("a disk has gone")
            rows = slice(start, min(start + 100, last))
            yield tuple(array[rows] for array in DATA)


def over_processes(array):
    mesh = Mesh(DEVICES, ("examples",))
    sharding = NamedSharding(mesh, PartitionSpec("examples"))
    return jax.make_array_from_callback((LENGTH, *array.shape[1:]), sharding, array.__getitem__)


def estimate(data, **options):
    return fastvi.estimate_llc(loss, WEIGHTS, data, **OPTIONS, **options)


def said(result):
    walk = result.walk_llc
    return {"llc": result.llc, "error": result.llc_sem, "n": result.n_data, "walk": walk.tolist()}


def error_of(data, **options):
    try:
        estimate(data, **options)
    except (ConfigError, DataError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def by_the_page():
    """What the page says of several processes, in this folder; jax has been started above."""
    begun = "jax.distributed.initialize()"
    _, block = python_blocks(ROOT / "docs" / "devices.md")
    assert begun in block
    quick = functools.partial(fastvi.estimate_llc, **OPTIONS, **FROM_LOCALIZER)
    namespace = {"loss_fn": loss, "params": WEIGHTS, "data": DATA}
    namespace["fastvi"] = types.SimpleNamespace(estimate_llc=quick)
    os.chdir(FOLDER)
    exec(compile(block.replace(begun, ""), "devices.md", "exec"), namespace)
    return namespace["result"]


def main():
    found = {"devices": jax.device_count(), "walk": said(by_the_page())}
    with jax.set_mesh(Mesh(DEVICES.reshape(4, 1), ("walkers", "data"))):
        found["fit"] = said(estimate(DATA, **FROM_FIT))
        found["parts"] = said(estimate(Part(), **FROM_LOCALIZER))
        once = (batch for _ in range(PASSES) for batch in Part())
        found["once"] = said(estimate(once, **FROM_LOCALIZER))
        found["broken"] = error_of(Part(fails=True), **FROM_LOCALIZER)
        found["same"] = error_of(Part(is_shared=True), **FROM_LOCALIZER)
        found["resumed"] = error_of(DATA, **FROM_FIT, resume_from=FOLDER / "progress")
    with jax.set_mesh(Mesh(DEVICES.reshape(2, 2), ("walkers", "data"))):
        whole = tuple(map(over_processes, DATA))
        found["global"] = said(estimate(whole, **FROM_LOCALIZER))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
