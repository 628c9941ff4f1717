"""Chains over several devices.

Each runs its share of them, and nothing passes between devices in a step.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from fastvi._devices import layout_in_use
from fastvi.target.data import AbstractData, Data, shared_mean
from fastvi.target.losses import by_kind, take_examples

CHAINS, SHARED = PartitionSpec("devices"), PartitionSpec()


def device_mesh(count: int) -> Mesh | None:
    """Return the most devices that share `count` equal parts evenly; None where it is one.

    They are of the mesh that is set. Where it spans several processes, each fits for itself.
    """
    mesh = layout_in_use().mesh
    if mesh is None or jax.process_count() > 1:
        return None
    devices = mesh.devices.ravel()
    used = max(number for number in range(1, devices.size + 1) if count % number == 0)
    return Mesh(devices[:used], ("devices",)) if used > 1 else None


def over_devices(stage: Callable[[Any, Any], Any], shared: Any, stacked: Any) -> Any:
    """Call a stage, whose results are stacked over chains, spread over the devices.

    Args:
        stage: `(shared, stacked) -> results`.
        shared: Arguments of all chains.
        stacked: Arguments with a first axis of chains.
    """
    mesh = device_mesh(jax.tree_util.tree_leaves(stacked)[0].shape[0])
    if mesh is None:
        return stage(shared, stacked)
    spread: Any = jax.shard_map(
        stage, mesh=mesh, in_specs=(SHARED, CHAINS), out_specs=CHAINS, check_vma=False
    )
    return spread(shared, stacked)


def data_parallel_mean(
    statistic: Callable[..., Any], data: AbstractData, shared: tuple[Any, ...], copies: int = 1
) -> Any:
    """Average over all examples as `shared_mean` does, each device on its share of them.

    Cost:
        The examples divided by the devices; what does not divide is done by all of them.
    """
    size, whole_mesh = data.num_examples, layout_in_use().mesh
    devices = 1 if whole_mesh is None else whole_mesh.size
    mesh = device_mesh(devices * (size // devices)) if size >= devices else None
    if mesh is None:
        return shared_mean(statistic, data, shared, copies)
    whole = mesh.size * (size // mesh.size)
    parts, rest = (
        Data(take_examples(data.examples, rows), data.max_batch)
        for rows in (slice(whole), slice(whole, None))
    )

    def part_mean(part: Data, shared):
        return jax.lax.pmean(shared_mean(statistic, part, shared, copies), "devices")

    in_specs = by_kind(parts, CHAINS, SHARED), SHARED
    spread: Any = jax.shard_map(
        part_mean, mesh=mesh, in_specs=in_specs, out_specs=SHARED, check_vma=False
    )
    mean = spread(parts, shared)
    if whole == size:
        return mean
    left, portion = shared_mean(statistic, rest, shared, copies), whole / size
    return jax.tree_util.tree_map(lambda a, b: portion * a + (1 - portion) * b, mean, left)
