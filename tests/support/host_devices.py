"""Processes with so many devices of the host, whose number is fixed when jax starts."""

import os
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
