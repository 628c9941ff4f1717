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
        for name, implementation in op.implementations.items():
            obstacle = implementation.obstacle(platform)
            if name == op.default(platform):
                verdict = f"runs by default on {platform}"
            elif obstacle is not None:
                verdict = f"cannot run: {obstacle}"
            elif name == "reference":
                verdict = "runs where asked for: the definition, dense, for tests"
            else:
                verdict = (
                    "runs where asked for: no recorded benchmark puts it before "
                    f"{op.default(platform)}"
                )
            lines.append(f"{op.name:<14}{name:<11}{verdict}")
    (file or sys.stdout).write("\n".join(lines) + "\n")
