"""The kernels by name, and what of them would run on this machine."""

import io
import sys

from fastvi.kernels._dispatch import current_platform
from fastvi.kernels.hutchinson import api as hutchinson
from fastvi.kernels.mixture_grad import api as mixture_grad
from fastvi.kernels.woodbury import api as woodbury

OPS = {module.OP.name: module.OP for module in (woodbury, mixture_grad, hutchinson)}


def show(file: io.TextIOBase | None = None) -> None:
    """Print which implementation of each kernel runs on this machine, and why no other does.

    Args:
        file: Where to write; the terminal when left out.
    """
    platform = current_platform()
    lines = [f"platform {platform}"]
    for op in OPS.values():
        default = op.default(platform)
        verdicts = {
            "reference": "runs where asked for: the definition, dense, for tests",
            default: f"runs by default on {platform}",
        }
        other = f"runs where asked for: no recorded benchmark puts it before {default}"
        for name, implementation in op.implementations.items():
            obstacle = None if name == default else implementation.obstacle(platform)
            verdict = f"cannot run: {obstacle}" if obstacle else verdicts.get(name, other)
            lines.append(f"{op.name:<14}{name:<11}{verdict}")
    (file or sys.stdout).write("\n".join(lines) + "\n")
