"""One estimate compiled for another set of instructions and another number of threads.

Other roundings, one llc.
"""

import itertools
import json
import math
import os
import platform
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core"
    ),
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86 processors"
    ),
]
SETTINGS = {
    "as it comes": ("", None),
    "one thread": ("--xla_cpu_multi_thread_eigen=false", 1),
    "AVX2": ("--xla_cpu_max_isa=AVX2", None),
    "AVX": (
        "--xla_cpu_max_isa=AVX",
        None,
    ),  # no fused multiply-add: other bits, where AVX-512 and AVX2 share theirs
}


def digits(folder, flags, cores):
    """Return llc and error of `fastvi demo digits` in a process of its own."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    allowed = sorted(os.sched_getaffinity(0))

    def bind():
        os.sched_setaffinity(0, allowed[:cores])

    command = [sys.executable, "-m", "fastvi", "demo", "digits", "--out", str(folder)]
    done = subprocess.run(
        command,
        env={**variables, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        preexec_fn=bind,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result["llc"], result["llc_sem"]


def test_the_digits_llc_is_that_of_other_processors(tmp_path):
    pytest.importorskip("sklearn")
    found = {
        name: digits(tmp_path / name.replace(" ", "-"), *setting)
        for name, setting in SETTINGS.items()
    }
    sys.stdout.write(
        "".join(f"{name}: llc {llc:.4f} +- {sem:.4f}\n" for name, (llc, sem) in found.items())
    )
    assert all(math.isfinite(number) for pair in found.values() for number in pair)
    for (one, (llc, sem)), (other, (other_llc, other_sem)) in itertools.combinations(
        found.items(), 2
    ):
        assert 0 < sem < 0.05 * llc, one
        assert abs(llc - other_llc) < 4 * math.hypot(sem, other_sem), (one, other)
