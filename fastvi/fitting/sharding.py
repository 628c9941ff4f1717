"""Chains over several devices.

Each runs its share of them, and nothing passes between devices in a step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fastvi._typing import Array, Batch, Float, Scalar
from fastvi.target.objective import FlatObjective, full_data_value_and_grad

CHAINS, SHARED = PartitionSpec("devices"), PartitionSpec()


def device_mesh(count: int) -> Mesh | None:
    """Return the most devices that share `count` equal parts evenly, None where one would do them all."""
    devices = jax.devices()
    used = max(number for number in range(1, len(devices) + 1) if count % number == 0)
    return Mesh(np.asarray(devices[:used]), ("devices",)) if used > 1 else None


def over_devices(stage: Callable[..., Any], of_chain: tuple[bool, ...]) -> Callable[..., Any]:
    """Spread a stage whose arguments and results are stacked over chains.

    Args:
        stage: Takes as many positional arguments as `of_chain` has entries; all that it returns is
            stacked.
        of_chain: Which arguments are stacked over chains; the others are shared.
    """

    def run(*args, **static):
        mesh = device_mesh(_length(args[of_chain.index(True)]))
        body = functools.partial(stage, **static)
        if mesh is None:
            return body(*args)
        specs = tuple(CHAINS if stacked else SHARED for stacked in of_chain)
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=CHAINS, check_vma=False)(
            *args
        )

    return run


def data_parallel_value_and_grad(
    objective: FlatObjective, w: Float[Array, " dim"], data: Batch
) -> tuple[Scalar, Float[Array, " dim"]]:
    """Evaluate the mean loss on all data and its gradient, each device on its share of the examples.

    Cost:
        The examples divided by the devices; what does not divide is done by all of them.
    """
    size, devices = _length(data), jax.device_count()
    share = size // devices
    mesh = device_mesh(devices * share) if share else None
    if mesh is None:
        return full_data_value_and_grad(objective, w, data)
    whole = mesh.size * (size // mesh.size)
    parts, rest = (
        jax.tree_util.tree_map(lambda leaf, s=s: leaf[s], data)
        for s in (slice(whole), slice(whole, None))
    )

    def part_mean(w, part):
        return jax.lax.pmean(full_data_value_and_grad(objective, w, part), "devices")

    mean = jax.shard_map(
        part_mean, mesh=mesh, in_specs=(SHARED, CHAINS), out_specs=SHARED, check_vma=False
    )(w, parts)
    if whole == size:
        return mean
    left = full_data_value_and_grad(objective, w, rest)
    return jax.tree_util.tree_map(
        lambda a, b: (whole * a + (size - whole) * b) / jnp.asarray(size, a.dtype), mean, left
    )


def _length(tree: Any) -> int:
    return jax.tree_util.tree_leaves(tree)[0].shape[0]
