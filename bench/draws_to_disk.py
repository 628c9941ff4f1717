"""Losses of 1e5 examples at 500 draws, streamed to disk: peak memory, and what a kill loses.

A process draws to the end; a second one is killed in the middle; a third one goes on from what that
has left, and ends with the same numbers. Each has an estimate of its own, a logistic regression of
20 weights.

python -m bench.draws_to_disk                       two minutes
"""

import hashlib
import json
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np

import fastvi
from bench import harness

TABLE = "draws_to_disk"
EXAMPLES, DIM, DRAWS = 100_000, 20, 63  # draws of each of 8 walkers: 504 in all
KILLED_AT = 45


def loss_fn(w, batch):
    """Return the loss of each example."""
    inputs, labels = batch
    return jnp.logaddexp(0.0, -labels * (inputs @ w))


def worker(folder: pathlib.Path) -> None:
    """Estimate, draw or go on drawing, and say each draw and how much memory that took."""
    random = np.random.default_rng(0)
    center = random.standard_normal(DIM).astype(np.float32)
    inputs = random.standard_normal((EXAMPLES, DIM), dtype=np.float32)
    labels = np.sign(inputs @ center + random.logistic(size=EXAMPLES)).astype(np.float32)
    data = inputs, labels
    sampler = {"start": "localizer"}
    result = fastvi.estimate_llc(loss_fn, center, data, sampler=sampler, progress=False)
    before = peak()
    began = time.perf_counter()
    draws = fastvi.sample_posterior(
        result, DRAWS, losses={"train": data}, store=folder, progress=lambda at: say(step=at.step)
    )
    seconds = time.perf_counter() - began
    drawn = peak()
    found = draws.susceptibility("train", "train").value
    digest = hashlib.sha256(np.asarray(draws.losses["train"][:, :, ::97]).tobytes())
    say(
        walkers=draws.num_walkers,
        estimate_mb=before,
        draws_mb=drawn,
        peak_mb=peak(),
        seconds=seconds,
        digest=digest.hexdigest(),
        susceptibility=float(found.mean()),
    )


def peak() -> float:
    """Return the most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def say(**values) -> None:
    print(json.dumps(values), flush=True)


def run(folder: pathlib.Path, killed_at: int | None = None) -> list[dict]:
    """Run a worker, to its end or until it has said so many draws, and return what it said."""
    command = [sys.executable, "-m", "bench.draws_to_disk", str(folder)]
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            said.append(json.loads(line))
            if killed_at and said[-1].get("step") == killed_at:
                process.send_signal(signal.SIGKILL)
                break
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the worker failed with {process.returncode}")
    return said


def main() -> None:
    """Run the three processes, and record a row."""
    with tempfile.TemporaryDirectory() as folder:
        whole, parted = (pathlib.Path(folder) / name for name in ("whole", "parted"))
        ended = run(whole)[-1]
        run(parted, KILLED_AT)
        resumed = run(parted)
        size = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
        row = {
            "examples": EXAMPLES,
            "draws": ended["walkers"] * DRAWS,
            "disk_mb": size / 1e6,
            "seconds": ended["seconds"],
            "estimate_mb": ended["estimate_mb"],
            "draws_mb": ended["draws_mb"],
            "peak_mb": max(ended["peak_mb"], resumed[-1]["peak_mb"]),
            "block": json.loads((whole / "draws.json").read_text())["block"],
            "killed_at": KILLED_AT,
            "resumed_at": resumed[0]["step"] - 1,
            "same_bits": ended["digest"] == resumed[-1]["digest"],
        }
    harness.record(TABLE, [row])
    print(harness.as_text([row]))


if __name__ == "__main__":
    worker(pathlib.Path(sys.argv[1])) if len(sys.argv) > 1 else main()
