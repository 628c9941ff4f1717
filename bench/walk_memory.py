"""Peak memory of a walk from the localizer against its plan, in processes of their own.

python -m bench.walk_memory              d = 1e6 and 1e7, some minutes; BENCH_KEEP=1 keeps the rows
python -m bench.walk_memory 1000000      one of them
"""

import json
import resource
import subprocess
import sys
import time

from bench import harness

TABLE, DIMS = "walk_memory", (1_000_000, 10_000_000)
INPUTS, CLASSES, COUNT = 16, 10, 64
WALKERS, BUDGET = 8, 800  # measurements and a few steps, of which each takes the same memory
OPTIONS = {"nbeta": 10.0, "localization": 100.0, "throw": False, "progress": False, "key": 0}


def megabytes() -> float:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(dim: int, gradients: str) -> None:
    """Estimate in so many dimensions, and print what it took."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import fastvi
    from fastvi.sampling.from_localizer.memory import walk_bytes

    def loss_fn(weights, batch):
        logits = jnp.tanh(batch[0] @ weights[0]) @ weights[1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=-1)
        return -jnp.mean(chosen)

    def estimate(hidden: int) -> float:
        rng = np.random.default_rng(0)
        shapes = ((INPUTS, hidden), (hidden, CLASSES))
        weights = [rng.standard_normal(shape, np.float32) / 4 for shape in shapes]
        inputs = rng.standard_normal((COUNT, INPUTS), np.float32)
        data = inputs, rng.integers(0, CLASSES, COUNT).astype(np.int32)
        sampler = {"gradients": gradients, "walkers": WALKERS}
        return fastvi.estimate_llc(
            loss_fn, weights, data, budget=BUDGET, sampler=sampler, **OPTIONS
        ).llc

    small = 530_000 // (INPUTS + CLASSES)  # steps one walker after another, as larger ones do
    estimate(small)
    before, began = megabytes(), time.perf_counter()
    of_small = walk_bytes(small * (INPUTS + CLASSES), WALKERS, 4, gradients == "anchored") / 2**20
    hidden = dim // (INPUTS + CLASSES)
    llc = estimate(hidden)
    planned = walk_bytes(hidden * (INPUTS + CLASSES), WALKERS, 4, gradients == "anchored") / 2**20
    row = {
        "dim": hidden * (INPUTS + CLASSES),
        "gradients": gradients,
        "walkers": WALKERS,
        "planned_mb": planned,
        # the process itself, without the small walk that has compiled and warmed it up
        "process_mb": before - of_small,
        "measured_mb": megabytes() - (before - of_small),
        "seconds": time.perf_counter() - began,
        "llc": llc,
    }
    print(json.dumps(row | {"ratio": row["measured_mb"] / planned}))


def main(arguments: list[str]) -> None:
    """Measure each dimension in a process of its own, and print all."""
    if len(arguments) == 2:
        measure(int(arguments[0]), arguments[1])
        return
    rows = []
    for dim in map(int, arguments or DIMS):
        for gradients in ("fresh", "anchored"):
            command = [sys.executable, "-m", "bench.walk_memory", str(dim), gradients]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    harness.record(TABLE, rows)
    print(harness.as_text(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
