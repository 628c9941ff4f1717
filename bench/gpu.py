"""What runs on a GPU, numbers and speed: python -m bench.gpu.

python -m bench.gpu                          all stages, at most ten minutes; rows to bench/results
python -m bench.gpu numbers kernels          these
python -m bench.gpu --seconds 300            at most so long
python -m bench.gpu --device cpu             the same in a short form, where there is no GPU

The stages, in the order of their importance:

- numbers: every kernel and implementation against float64 on the CPU. Rows of gpu_numbers.csv.
- kernels: each implementation in a loop of one program. `ratio` is its time over that of a pass
  that reads and writes the bytes that the kernel must move, `error` the largest difference from
  float64 on the CPU in units of the largest entry. docs/kernels.md says which implementation is
  chosen by these. Rows of gpu.csv.
- copies: to the device, from it, and on it. Rows of gpu_copies.csv.
- steps: the steps of a fit, and of walkers on blocks and from the localizer, beside the gradients
  that they contain, a copy of what they move, and the step by XLA. Rows of gpu_steps.csv.
- precision: whole estimates whose llc is known, with all digits, with products of 11 bits, and of
  models in bfloat16. Rows of gpu_precision.csv.
- estimates: the demos, the first key of each cold. Rows of gpu_estimates.csv.

A stage is a process of its own: what fails, or breaks the device, takes no other stage with it. A
piece that no longer fits into the time is left out, and said so; a process that outlasts it is
ended. Rows are written as they are measured. The exit status is 0 where all was measured, 1 where a
number was wrong or a stage failed, and 2 where time ran out. On a CPU no row is written without
--append, and then to bench/runs.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import jax

from bench import harness
from bench.gpu_stages import FULL, SHORT, STAGES, pieces
from bench.harness import KEEP, as_text, record
from fastvi.kernels import show

SECONDS = 600.0
# kept for a process to start and find the device
START = 20.0
MEASURED, FAILED, PARTLY, NO_GPU = 0, 1, 2, 3
WORDS = {MEASURED: "measured", FAILED: "FAILED", PARTLY: "partly: out of time"}


def run_stage(stage: str, device: str, until: float, append: bool) -> int:
    """Measure the pieces of a stage that still fit; return its status."""
    form = SHORT if device == "cpu" else FULL
    status = MEASURED
    for piece in pieces(stage, form):
        left = until - time.time()
        if left < piece.seconds:
            print(
                f"left out: {piece.name} is kept {piece.seconds:.0f} s, and {left:.0f} s are left",
                flush=True,
            )
            status = status or PARTLY
            continue
        began = time.perf_counter()
        rows = piece.measure()
        print(f"{piece.name}, {time.perf_counter() - began:.0f} s\n{as_text(rows)}", flush=True)
        if append:
            record(piece.table, rows)
        if not all(row.get("is_right", True) for row in rows):
            print("WRONG NUMBERS: see is_right", flush=True)
            status = FAILED
    return status


def describe_device(device: str) -> int:
    """Print what this machine runs on; say whether it is the device that was asked for."""
    if jax.default_backend() != device:
        print(
            f"no {device.upper()}: jax sees {jax.devices()}. Nothing was measured and no row "
            "written. --device cpu runs the same in a short form."
        )
        return NO_GPU
    environment = harness.environment()
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    if device == "cpu":
        print("These are rows of a CPU in a short form: they say nothing of a GPU.")
    show()
    return MEASURED


def launch(stage: str, device: str, seconds: float, append: bool) -> int:
    """Run a stage in a process of its own; return its status."""
    command = [sys.executable, "-m", "bench.gpu", "--device", device, "--stage", stage]
    command += ["--seconds", str(seconds)] + (["--append"] if append else [])
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {})
    if device == "gpu":
        environment = {KEEP: "1"} | environment
    try:
        done = subprocess.run(command, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        print(f"{stage}: ended after {seconds:.0f} s", flush=True)
        return PARTLY
    return done.returncode if done.returncode in (MEASURED, PARTLY, NO_GPU) else FAILED


def run_stages(
    stages: Sequence[str],
    limit: float,
    launch: Callable[[str, float], int],
    clock: Callable[[], float] = time.time,
) -> int:
    """Launch one stage after another in the order of importance; return the status of all."""
    end = clock() + limit
    found: dict[str, int] = {}
    for stage in (name for name in STAGES if name in stages):
        left = end - clock()
        if left < START:
            print(f"{stage}: left out, {left:.0f} s are left", flush=True)
            found[stage] = PARTLY
            continue
        print(f"== {stage}, {left:.0f} s left", flush=True)
        found[stage] = launch(stage, left)
    print("\n".join(["==", *(f"{stage}: {WORDS[status]}" for stage, status in found.items())]))
    return FAILED if FAILED in found.values() else max(found.values(), default=MEASURED)


def main(arguments: list[str]) -> int:
    """Measure; in the process of a stage, that stage alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="at most so long")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--append", action="store_true", help="write rows of a CPU too")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    unknown = set(settings.stages) - set(STAGES)
    if unknown:
        parser.error(f"stages are {', '.join(STAGES)}; got {', '.join(sorted(unknown))}")
    append = settings.append or settings.device == "gpu"
    if settings.stage == "device":
        return describe_device(settings.device)
    if settings.stage is not None:
        until = time.time() + settings.seconds
        return run_stage(settings.stage, settings.device, until, append)
    began = time.time()
    status = launch("device", settings.device, settings.seconds, append)
    if status != MEASURED:
        return FAILED
    left = settings.seconds - (time.time() - began)
    return run_stages(
        settings.stages or list(STAGES),
        left,
        lambda stage, seconds: launch(stage, settings.device, seconds, append),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
