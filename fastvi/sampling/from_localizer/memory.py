"""What a walk from the localizer takes in memory, for each parameter."""

import jax

from fastvi._devices import AbstractLayout
from fastvi._errors import ConfigError
from fastvi.sampling.from_localizer.steps import LARGEST_SIDE_BY_SIDE

# Numbers for each parameter and walker: position, momentum and gradient. They are donated to each
# round, so that there is one set of them.
OF_WALKER = 3
# Numbers for each parameter beside them, in dimensions where walkers step one after another: w*,
# the scale and the given parameters; of the walker that steps its displaced parameters, gradient,
# noise, both halves of a step and what the loss makes; and on the host a row that is drawn.
# `python -m bench.walk_memory` measures them.
BESIDE = 15


def walk_bytes(dim: int, walkers: int, itemsize: int, is_anchored: bool = False) -> int:
    """Return the bytes of a walk of so many walkers on one device, beside model and data.

    Args:
        dim: Number of parameters, more than `LARGEST_SIDE_BY_SIDE`.
        walkers: Walkers on the device.
        itemsize: Bytes of a number.
        is_anchored: Whether batches are anchored at w*, by a gradient that is held.
    """
    return (OF_WALKER * walkers + BESIDE + is_anchored) * dim * itemsize


def check_memory(dim: int, walkers: int, itemsize: int, layout: AbstractLayout) -> None:
    """Refuse a walk that is larger than the device, where the device tells how large it is.

    Raises:
        ConfigError: If it is.
    """
    limit = memory_limit()
    if limit is None or dim <= LARGEST_SIDE_BY_SIDE:
        return
    on_device = layout.walkers_on_device(walkers)
    of_device = layout.share_of_parameters * walk_bytes(dim, on_device, itemsize)
    if of_device > limit:
        raise ConfigError(
            f"a walk of {on_device} walkers in {dim:,} dimensions takes "
            f"{of_device / 2**30:.1f} GiB on a device, which has {limit / 2**30:.1f}. Divide the "
            'walkers over more devices (jax.set_mesh), or take fewer: sampler={"walkers": '
            f"{max(1, walkers // 2)}}}."
        )


def memory_limit() -> int | None:
    """Return the bytes of the first device; None where it does not tell, as CPUs do not."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
