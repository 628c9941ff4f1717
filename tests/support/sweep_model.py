"""A target for processes that share a sweep, which notes what is published and moved away.

In its own process it replaces the estimate by one that is read from a folder, where FASTVI_STAND_IN
names one, and takes some time: sharing is tested at once, and without compiling.
"""

import os
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fastvi import LLCEstimate
from fastvi.cli import sweep_cells, sweep_round
from fastvi.demos.quadratic import make_regression, squared_error
from fastvi.results import runs

STAND_IN, LOG, SECONDS = "FASTVI_STAND_IN", "FASTVI_LOG", "FASTVI_SECONDS"


class Drawing:
    """A figure that takes no time."""

    def savefig(self, path, dpi):
        path.write_bytes(b"PNG")


def target():
    note_renames(Path(os.environ[LOG]))
    if STAND_IN in os.environ:
        stand_in(Path(os.environ[STAND_IN]), float(os.environ[SECONDS]))
        return (lambda w, batch: 0.5 * jnp.sum(w**2) * jnp.mean(batch)), jnp.zeros(2), jnp.ones(20)
    center, data = make_regression(0, np.geomspace(1.0, 0.1, 4), 50)
    return squared_error, center, data


def note_renames(log):
    """Append a line for each run that comes to its place, or leaves it."""
    rename = os.rename

    def noted(source, place):
        rename(source, place)
        verb = {("new", False): "publish", ("old", True): "remove"}.get(
            (Path(source).name if Path(place).name != "old" else "old", Path(place).name == "old")
        )
        if verb is not None:
            name = Path(place if verb == "publish" else source).name
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, f"{verb} {name} {os.getpid()}\n".encode())
            os.close(handle)

    os.rename = noted


def stand_in(folder, seconds):
    result = LLCEstimate.load(folder)

    def estimate(problem, origin, config, folder, **options):
        time.sleep(seconds)
        return result

    sweep_cells.estimate_origin = estimate
    sweep_cells.observe_problem = lambda problem, config: {"params": "stand-in"}
    sweep_round.draw_sweep = lambda *results: Drawing()
    runs.plot_traces = lambda result: Drawing()
    runs.write_report = lambda result, path: path.write_text("page") and path
