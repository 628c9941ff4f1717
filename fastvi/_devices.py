"""The devices that work is divided over: those of the mesh that a person has set, or one.

`with jax.set_mesh(mesh):` says which. The axis `data` divides the examples of a batch; the devices
along all other axes divide the walkers, or the chains of a fit. Without a mesh, work is done where
jax does it by itself: on the default device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fastvi._errors import ConfigError
from fastvi._modes import their_mesh
from fastvi._typing import Array

WALKERS, DATA = "walkers", "data"
SHARED, BY_WALKER = PartitionSpec(), PartitionSpec(WALKERS)


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of the mesh that a program divides its walkers and examples over.

    None, inside of the program and out, where it does not.
    """

    walkers: str | None = None
    data: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(name for name in (self.walkers, self.data) if name is not None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices in rows of walkers and columns of data; no mesh where there is one device."""

    mesh: Mesh | None = None

    def axes(self, num_walkers: int) -> Axes:
        """Return the axes that have more than one device.

        Walkers that do not divide evenly are moved by every device, all of them.
        """
        if self.mesh is None:
            return Axes()
        rows, columns = (self.mesh.shape[name] for name in (WALKERS, DATA))
        is_divided = rows > 1 and num_walkers % rows == 0
        return Axes(WALKERS if is_divided else None, DATA if columns > 1 else None)

    def walkers_on_device(self, num_walkers: int) -> int:
        """Count the walkers that each device moves."""
        if self.mesh is None or self.axes(num_walkers).walkers is None:
            return num_walkers
        return num_walkers // self.mesh.shape[WALKERS]

    def check(self, num_walkers: int, setting: str) -> None:
        """Refuse walkers that do not divide over the devices.

        Raises:
            ConfigError: If they do not.
        """
        rows = 1 if self.mesh is None else self.mesh.shape[WALKERS]
        if num_walkers % rows:
            raise ConfigError(
                f"{setting} must be a multiple of the {rows} devices that the mesh has for "
                f"walkers; got {num_walkers}. Pass {rows * -(-num_walkers // rows)}, or set a mesh "
                f"of {math.gcd(rows, num_walkers)}."
            )

    def share(self, tree: Any) -> Any:
        """Put arrays on every device, whole."""
        return self._put(tree, SHARED)

    def deal(self, tree: Any, num_walkers: int) -> Any:
        """Put arrays with a first axis of walkers on the devices, a part of the walkers on each."""
        is_divided = self.axes(num_walkers).walkers is not None
        return self._put(tree, BY_WALKER if is_divided else SHARED)

    def _put(self, tree: Any, spec: PartitionSpec) -> Any:
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, spec)
        if sharding.is_fully_addressable:
            return jax.device_put(tree, sharding)
        return jax.tree_util.tree_map(lambda leaf: _put_by_parts(leaf, sharding), tree)

    def map(
        self, stage: Callable[..., Any], axes: Axes, in_specs: tuple[Any, ...], out_specs: Any
    ) -> Callable[..., Any]:
        """Return a function that calls a stage on every device, with its part of the arguments.

        Specs are of a mesh that divides walkers; they say nothing where `axes` does not.
        """
        if self.mesh is None or not axes.names:
            return stage
        if axes.walkers is None:
            in_specs, out_specs = jax.tree_util.tree_map(
                lambda spec: SHARED, (in_specs, out_specs), is_leaf=_is_spec
            )
        # the sums of a stage are over the axes that it names, of which jax's check knows less
        return jax.shard_map(
            stage, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


def _put_by_parts(leaf: Any, sharding: NamedSharding) -> Any:
    """Put an array that every process has whole on devices of several processes."""
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if is_key(leaf):
        words = _put_by_parts(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    whole = on_host(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def layout_in_use() -> Layout:
    """Return the layout of the mesh that a person has set."""
    mesh = their_mesh()
    return Layout() if mesh is None or mesh.size < 2 else _layout_of(mesh)


@functools.lru_cache(maxsize=8)
def _layout_of(mesh: Mesh) -> Layout:
    others = [place for place, name in enumerate(mesh.axis_names) if name != DATA]
    columns = mesh.size // math.prod(mesh.devices.shape[place] for place in others)
    order = [*others, *(place for place in range(mesh.devices.ndim) if place not in others)]
    devices = mesh.devices.transpose(order).reshape(-1, columns)
    return Layout(Mesh(devices, (WALKERS, DATA), axis_types=(AxisType.Auto, AxisType.Auto)))


def gather(values: Array, axis_name: str | None, axis: int = 0) -> Array:
    """Return the values of all devices along an axis of the mesh, joined along one of their own."""
    if axis_name is None:
        return values
    return jax.lax.all_gather(values, axis_name, axis=axis, tiled=True)


def on_host(array: Any) -> np.ndarray:
    """Return an array as numpy has it, from all processes where no process has all of it."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    # jax's functions for several processes are of no use to one
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def off_devices(array: Any) -> Any:
    """Return an array that is on several devices as one that any program takes."""
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        return array
    return as_before(array, words_of(array))


def words_of(array: jax.Array) -> np.ndarray:
    """Return an array on the host, as numpy has it; of random keys their words."""
    return on_host(jax.random.key_data(array) if is_key(array) else array)


def as_before(array: jax.Array, words: np.ndarray) -> jax.Array:
    """Return what is on the host as an array of the kind that it was taken from."""
    if is_key(array):
        return jax.random.wrap_key_data(jnp.asarray(words), impl=jax.random.key_impl(array))
    return jnp.asarray(words)


def is_key(leaf: Any) -> bool:
    """Say whether an array is one of random keys, which numpy has not."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
