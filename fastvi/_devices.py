"""The devices that work is divided over: those of the mesh that a person has set, or one.

`with jax.set_mesh(mesh):` says which. The axis `data` divides the examples of a batch; the devices
along all other axes divide the walkers, or the chains of a fit. Without a mesh, work is done where
jax does it by itself: on the default device.

Parameters that come divided bring a mesh of their own, and work on them stays there.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fastvi._errors import ConfigError
from fastvi._modes import their_mesh
from fastvi._typing import Array
from fastvi._vectors import Leaves

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


class AbstractLayout(abc.ABC):
    """Where the arrays of a program lie, and what its devices divide."""

    mesh: Mesh | None

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """Count the devices, or groups of them, that walkers are divided over."""

    @property
    @abc.abstractmethod
    def share_of_parameters(self) -> float:
        """The part of a vector of parameters that each device holds."""

    @abc.abstractmethod
    def axes(self, num_walkers: int) -> Axes:
        """Return the axes that have more than one device.

        Walkers that do not divide evenly are moved by every device, all of them.
        """

    @abc.abstractmethod
    def share(self, tree: Any) -> Any:
        """Put arrays where every device has them."""

    @abc.abstractmethod
    def deal(self, tree: Any, num_walkers: int) -> Any:
        """Put arrays with a first axis of walkers on the devices, a part of the walkers on each."""

    @abc.abstractmethod
    def collect(self, tree: Any) -> Any:
        """Return arrays, at the end of a program, as any program takes them."""

    @abc.abstractmethod
    def hold(self, tree: Any, axes: Axes) -> Any:
        """Keep traced vectors where they lie, against what a compiler would choose."""

    @abc.abstractmethod
    def map(
        self, stage: Callable[..., Any], axes: Axes, in_specs: tuple[Any, ...], out_specs: Any
    ) -> Callable[..., Any]:
        """Return a function that calls a stage on every device, with its part of the arguments.

        Specs are of a mesh that divides walkers; they say nothing where `axes` does not.
        """

    def walkers_on_device(self, num_walkers: int) -> int:
        """Count the walkers that each device moves."""
        return num_walkers // (1 if self.axes(num_walkers).walkers is None else self.rows)

    def check(self, num_walkers: int, setting: str) -> None:
        """Refuse walkers that do not divide over the devices.

        Raises:
            ConfigError: If they do not.
        """
        rows = self.rows
        if num_walkers % rows:
            raise ConfigError(
                f"{setting} must be a multiple of the {rows} devices that the mesh has for "
                f"walkers; got {num_walkers}. Pass {rows * -(-num_walkers // rows)}, or set a mesh "
                f"of {math.gcd(rows, num_walkers)}."
            )


@dataclasses.dataclass(frozen=True)
class Layout(AbstractLayout):
    """Devices in rows of walkers and columns of data; no mesh where there is one device."""

    mesh: Mesh | None = None

    @property
    def rows(self) -> int:
        """Count the rows."""
        return 1 if self.mesh is None else self.mesh.shape[WALKERS]

    @property
    def share_of_parameters(self) -> float:
        """All of them."""
        return 1.0

    def axes(self, num_walkers: int) -> Axes:
        """Return the axes that have more than one device."""
        if self.mesh is None:
            return Axes()
        rows, columns = (self.mesh.shape[name] for name in (WALKERS, DATA))
        is_divided = rows > 1 and num_walkers % rows == 0
        return Axes(WALKERS if is_divided else None, DATA if columns > 1 else None)

    def share(self, tree: Any) -> Any:
        """Put arrays on every device, whole."""
        return self._put(tree, SHARED)

    def collect(self, tree: Any) -> Any:
        """Take arrays off several devices."""
        return jax.tree_util.tree_map(off_devices, tree)

    def hold(self, tree: Any, axes: Axes) -> Any:
        """Leave them: what is not divided has one place."""
        return tree

    def deal(self, tree: Any, num_walkers: int) -> Any:
        """Put arrays on the devices, a part of the walkers on each."""
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
        """Return a function that calls a stage on every device of the mesh."""
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


@dataclasses.dataclass(frozen=True)
class DividedLayout(AbstractLayout):
    """The mesh of parameters that came divided: their arrays stay as they are.

    A program divides along the mesh's axis `walkers`, if it has one, by hand; along all others as
    XLA does.

    Attributes:
        mesh: Theirs, all axes of which XLA divides along.
        shapes: Of the arrays.
        specs: Which of their axes are divided over which of the mesh, as long as the shapes.
        explicit: Axes of the mesh that are in the types of arrays inside of a person's function.
    """

    mesh: Mesh
    shapes: tuple[tuple[int, ...], ...]
    specs: tuple[PartitionSpec, ...]
    explicit: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Count the groups of devices, each of which has all parameters."""
        return 1 if WALKERS in _names_in(self.specs) else self.mesh.shape.get(WALKERS, 1)

    @property
    def share_of_parameters(self) -> float:
        """Numbers of a vector on a device, over all."""
        shardings = (NamedSharding(self.mesh, spec) for spec in self.specs)
        held = [
            math.prod(one.shard_shape(of)) for one, of in zip(shardings, self.shapes, strict=True)
        ]
        return sum(held) / sum(map(math.prod, self.shapes))

    def axes(self, num_walkers: int) -> Axes:
        """Return the axis that walkers are divided over."""
        return Axes(WALKERS if self.rows > 1 and num_walkers % self.rows == 0 else None)

    def share(self, tree: Any) -> Any:
        """Put vectors in their arrays' places, and all else on every device."""

        def put(node: Any) -> Any:
            if isinstance(node, Leaves):
                return Leaves(tuple(map(self._put_vector, node.arrays, self.shapes, self.specs)))
            return jax.device_put(node, NamedSharding(self.mesh, SHARED))

        return jax.tree_util.tree_map(put, tree, is_leaf=_is_vector)

    def _put_vector(self, array: Any, shape: tuple[int, ...], spec: PartitionSpec) -> Any:
        # a number for each array is on every device
        own = spec if jnp.shape(array) == shape else SHARED
        return jax.device_put(array, NamedSharding(self.mesh, own))

    def of_rows(self, num_walkers: int) -> tuple[tuple[tuple[int, ...], NamedSharding], ...]:
        """Return shape and place of each array of walkers' vectors."""
        walkers = self.axes(num_walkers).walkers
        return tuple(
            ((num_walkers, *shape), NamedSharding(self.mesh, PartitionSpec(walkers, *spec)))
            for shape, spec in zip(self.shapes, self.specs, strict=True)
        )

    def deal(self, tree: Any, num_walkers: int) -> Any:
        """Put walkers' vectors in their arrays' places, a part of the walkers in each group."""
        places = tuple(place for _, place in self.of_rows(num_walkers))
        other = NamedSharding(self.mesh, PartitionSpec(self.axes(num_walkers).walkers))

        def put(node: Any) -> Any:
            if isinstance(node, Leaves):
                return Leaves(tuple(map(jax.device_put, node.arrays, places)))
            return jax.device_put(node, other)

        return jax.tree_util.tree_map(put, tree, is_leaf=_is_vector)

    def collect(self, tree: Any) -> Any:
        """Leave them where they are."""
        return tree

    def hold(self, tree: Any, axes: Axes) -> Any:
        """Keep traced vectors divided as the parameters are."""

        def keep(array: Any, shape: tuple[int, ...], spec: PartitionSpec) -> Any:
            whole = spec if array.ndim == len(shape) else PartitionSpec(None, *spec)
            return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, whole))

        def held(node: Any) -> Any:
            # jax 0.7 takes no constraint inside of a program by hand, whose inputs say enough
            if axes.names or not isinstance(node, Leaves):
                return node
            return Leaves(tuple(map(keep, node.arrays, self.shapes, self.specs)))

        return jax.tree_util.tree_map(held, tree, is_leaf=_is_vector)

    def map(
        self, stage: Callable[..., Any], axes: Axes, in_specs: tuple[Any, ...], out_specs: Any
    ) -> Callable[..., Any]:
        """Return a function that calls a stage in every group of devices."""
        if axes.walkers is None:
            return stage
        return jax.shard_map(
            stage,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={WALKERS},
            check_vma=False,
        )

    def call(self, function: Callable[..., Any], arrays: tuple[Any, ...], batch: Any) -> Any:
        """Call a person's function of the arrays and a batch as under their mesh, with its types.

        Inside of a program that divides walkers by hand, it is under the axes that are left.
        """
        context = jax.sharding.get_abstract_mesh()
        if context.empty:
            context = self.mesh.abstract_mesh
        with jax.sharding.use_abstract_mesh(context):
            manual = {WALKERS} if WALKERS in getattr(context, "manual_axes", ()) else set()
            explicit = tuple(name for name in self.explicit if name not in manual)
            if not explicit:
                return function(arrays, batch)

            def typed(arrays: tuple[Any, ...], batch: Any) -> Any:
                outputs = function(arrays, batch)
                return jax.tree_util.tree_map(
                    lambda one: jax.sharding.reshard(one, _whole(jnp.asarray(one))), outputs
                )

            in_sharding = self.specs, jax.tree_util.tree_map(_whole, batch)
            explicitly = jax.sharding.explicit_axes(axes=explicit, in_sharding=in_sharding)
            return explicitly(typed)(arrays, batch)


def _whole(array: Any) -> PartitionSpec:
    return PartitionSpec(*(None,) * array.ndim)


def divided_layout(arrays: Any) -> DividedLayout | None:
    """Return the layout of arrays of which some are divided over one mesh; None of others.

    Arrays that no process has whole are others: those of several processes.
    """
    found = [
        array.sharding
        for array in arrays
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    ]
    split = [one for one in found if not one.is_fully_replicated]
    divided = [one for one in split if isinstance(one, NamedSharding) and one.is_fully_addressable]
    if not divided or len(divided) < len(split):
        return None
    meshes = {_in_auto_mode(one.mesh) for one in divided}
    if len(meshes) > 1:
        return None
    mesh, theirs = meshes.pop(), divided[0].mesh
    pairs = zip(theirs.axis_names, theirs.axis_types, strict=True)
    return DividedLayout(
        mesh,
        tuple(tuple(array.shape) for array in arrays),
        tuple(_spec_of(array, mesh) for array in arrays),
        tuple(name for name, kind in pairs if kind == AxisType.Explicit),
    )


def _in_auto_mode(mesh: Any) -> Mesh:
    # an explicit mesh would hold this package's operations to its types
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _spec_of(array: Any, mesh: Mesh) -> PartitionSpec:
    sharding = getattr(array, "sharding", None)
    spec: Any = ()
    if isinstance(sharding, NamedSharding) and _in_auto_mode(sharding.mesh) == mesh:
        spec = sharding.spec
    return PartitionSpec(*spec, *(None,) * (len(array.shape) - len(spec)))


def _names_in(specs: tuple[PartitionSpec, ...]) -> set[str]:
    entries = (entry for spec in specs for entry in spec)
    return {name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,))}


def _is_vector(node: Any) -> bool:
    return isinstance(node, Leaves)


def layout_for(vector: Any) -> AbstractLayout:
    """Return the layout of a program on a vector of parameters."""
    if isinstance(vector, Leaves):
        layout = divided_layout(vector.arrays)
        assert layout is not None, "parameters that are not divided are flat"
        return layout
    return layout_in_use()


def host_vector(vector: Any) -> np.ndarray:
    """Return a vector of parameters as one array on the host."""
    if isinstance(vector, Leaves):
        return np.concatenate([on_host(array).ravel() for array in vector.arrays])
    return np.asarray(jax.device_get(vector))


def place_like(vector: Any, values: np.ndarray) -> Any:
    """Return numbers of the host as a vector that lies as another does, array by array."""
    if not isinstance(vector, Leaves):
        return values
    ends = np.cumsum([array.size for array in vector.arrays])[:-1]
    pieces = zip(np.split(values, ends), vector.arrays, strict=True)
    return Leaves(
        tuple(jax.device_put(piece.reshape(one.shape), one.sharding) for piece, one in pieces)
    )


def host_row(vectors: Any, walker: int) -> Any:
    """Return one walker's vector on the host."""
    if isinstance(vectors, Leaves):
        return Leaves(tuple(_row_on_host(array, walker) for array in vectors.arrays))
    return on_host(vectors)[walker]


def host_rows(vectors: Any) -> Iterator[Any]:
    """Yield each walker's vector on the host."""
    if isinstance(vectors, Leaves):
        return (host_row(vectors, walker) for walker in range(vectors.arrays[0].shape[0]))
    return iter(on_host(vectors))


def _row_on_host(array: jax.Array, walker: int) -> np.ndarray:
    row = np.empty(array.shape[1:], array.dtype)
    for shard in array.addressable_shards:
        rows, *index = shard.index
        first, last, _ = rows.indices(array.shape[0])
        if first <= walker < last:
            row[tuple(index)] = np.asarray(shard.data)[walker - first]
    return row


def host_blocks(*vectors: Any) -> Iterator[list[np.ndarray]]:
    """Yield some columns of all walkers after others, of vectors that lie alike, on the host.

    A vector of no walker's own is one row for all; one of a number for each array repeats it.
    """
    if not isinstance(vectors[0], Leaves):
        yield [np.atleast_2d(on_host(vector)) for vector in vectors]
        return
    for arrays in zip(*(vector.arrays for vector in vectors), strict=True):
        blocks = _blocks_of(arrays[0])
        numbers = (np.broadcast_to(np.asarray(one), (1, 1)) for one in arrays if one.ndim == 0)
        others = [_blocks_of(one) for one in arrays[1:] if one.ndim]
        repeated = [[np.broadcast_to(one, (1, b.shape[1])) for b in blocks] for one in numbers]
        yield from map(list, zip(blocks, *others, *repeated, strict=True))


def _blocks_of(array: jax.Array) -> list[np.ndarray]:
    """Return walkers' arrays as they are divided by columns, each block with all walkers."""
    places: dict[tuple, dict[int, np.ndarray]] = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            pairs = zip(shard.index, array.shape, strict=True)
            first, *columns = (one.indices(size) for one, size in pairs)
            places.setdefault(tuple(columns), {})[first[0]] = np.asarray(shard.data)
    parts = ([found[first] for first in sorted(found)] for found in places.values())
    return [np.concatenate(part).reshape(array.shape[0], -1) for part in parts]


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
