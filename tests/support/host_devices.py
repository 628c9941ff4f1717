"""Processes with so many devices of the host, whose number is fixed when jax starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment_with(devices, **more):
    """Return the environment of such a process, which finds the package and the tests."""
    own = f"--xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {own}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        **more,
    }


def say_in_double_precision(module, devices, *arguments):
    """Run a module beside so many devices, in float64, and return what its last line says."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment_with(devices, JAX_ENABLE_X64="1", JAX_DISABLE_MOST_OPTIMIZATIONS="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
