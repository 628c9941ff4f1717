"""Parameter pytrees as vectors: the only place that takes a model apart and puts it together."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._devices import DividedLayout, divided_layout, off_devices
from fastvi._errors import DataError
from fastvi._modes import call_in_their_modes, in_own_modes
from fastvi._typing import Array, Float, Given, PyTree, Vector
from fastvi._vectors import Leaves
from fastvi.target.inputs import is_array, is_finite
from fastvi.target.losses import raw_examples
from fastvi.target.objective import AbstractObjective, LossFn
from fastvi.target.training_state import refuse_training_state


@dataclasses.dataclass(frozen=True)
class TreeStructure:
    """How a parameter pytree lies in a flat vector.

    Array leaves in order, everything else kept as it is.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...] | None, ...]
    dtypes: tuple[Any, ...]
    static_leaves: tuple[Hashable, ...]

    @property
    def num_parameters(self) -> int:
        """Count the parameters."""
        return sum(self.leaf_sizes)

    @property
    def leaf_sizes(self) -> tuple[int, ...]:
        """Lengths of the array leaves' stretches of the flat vector, in order."""
        return tuple(math.prod(shape) for shape in self.shapes if shape is not None)

    def unravel(self, w: Vector) -> PyTree:
        """Rebuild the pytree.

        Half-precision leaves keep their dtype, the others take that of `w`.
        """
        # a float64 fit of float32 weights computes in float64; half precision is the model's choice
        return self._rebuilt(w, lambda dtype: dtype if dtype.itemsize == 2 else w.dtype)

    def unravel_as_given(self, w: Float[Array, "*axes dim"]) -> PyTree:
        """Rebuild the pytree in the dtypes that it came with.

        Axes before the last lead every array.
        """
        return self._rebuilt(w, lambda dtype: dtype)

    def _rebuilt(self, w: Any, leaf_dtype: Callable[[Any], Any]) -> PyTree:
        parts, static = iter(self._arrays(w)), iter(self.static_leaves)
        leaves = [
            next(static) if shape is None else next(parts).astype(leaf_dtype(dtype))
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        return jax.tree_util.tree_unflatten(self.treedef, leaves)

    def _arrays(self, w: Any) -> Iterator[Any]:
        """Return the array of each array leaf."""
        if isinstance(w, Leaves):
            return iter(w.arrays)
        shapes = (shape for shape in self.shapes if shape is not None)
        pairs = zip(self._stretches(w), shapes, strict=True)
        return (part.reshape(*w.shape[:-1], *shape) for part, shape in pairs)

    def _stretches(self, w: Float[Array, "*axes dim"]) -> Sequence[Any]:
        """Return the stretch of each array leaf."""
        if isinstance(w, jax.Array):
            # its derivative joins the leaves' gradients; slices would add as many padded vectors
            return jax.lax.split(w, self.leaf_sizes, axis=w.ndim - 1)
        return np.split(w, list(itertools.accumulate(self.leaf_sizes))[:-1], axis=-1)

    def ravel(self, params: PyTree, dtype: Any) -> Float[Array, "*axes dim"]:
        """Flatten what `unravel_as_given` rebuilds.

        Raises:
            DataError: If the structure differs, or a shape does not end in that of the parameter.
        """
        leaves, treedef = jax.tree_util.tree_flatten(params)
        if treedef != self.treedef:
            raise DataError(
                f"w must have the structure of the parameters, {self.treedef}; got {treedef}."
            )
        parts, all_axes = [], set()
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if shape is None:
                continue
            axes = np.shape(leaf)[: np.ndim(leaf) - len(shape)]
            if np.shape(leaf) != (*axes, *shape):
                raise DataError(
                    f"an array of w must have a shape that ends in {shape}; got {np.shape(leaf)}."
                )
            parts.append(jnp.asarray(leaf, dtype).reshape(*axes, math.prod(shape)))
            all_axes.add(axes)
        if len(all_axes) > 1:
            raise DataError(
                f"all arrays of w must have the same leading axes; got {sorted(all_axes)}."
            )
        return jnp.concatenate(parts, axis=-1)


@dataclasses.dataclass(frozen=True)
class TreeObjective(AbstractObjective):
    """A `FlatObjective` around `loss_fn(params, batch)`, of vectors that are `Leaves` too.

    Equal function and structure compare equal.
    """

    loss_fn: LossFn
    structure: TreeStructure
    layout: DividedLayout | None = None

    def outputs(self, w, batch):
        """Return what the function returns on the batch."""
        if self.layout is None:
            return call_in_their_modes(self.loss_fn, self.structure.unravel(w), raw_examples(batch))
        arrays, call = w.arrays, functools.partial(self.layout.call, self._of_arrays)
        return call_in_their_modes(call, arrays, raw_examples(batch))

    def _of_arrays(self, arrays, batch):
        return self.loss_fn(self.structure.unravel(Leaves(arrays)), batch)


@in_own_modes
def ravel_loss(
    loss_fn: Given[LossFn], params: PyTree, dtype: Any = jnp.float32
) -> tuple[TreeObjective, Float[Array, " dim"]]:
    """Flatten a loss on a parameter pytree.

    Floating-point array leaves become coordinates of `w`. Callables, strings, Python ints and
    bools, and Python floats inside an equinox module (activation functions and settings) are
    carried along unchanged and not varied; any other Python float is refused.

    Args:
        loss_fn: `(params, batch) -> mean loss per example`, in nats.
        params: Any pytree: a haiku or flax dict, an equinox module, an array.
        dtype: Floating dtype of the flat vector.

    Returns:
        The flat objective and the flattened parameters.

    Raises:
        DataError: If a leaf is neither a floating array nor carried along, is not finite, or there
            is none; or if they hold a train state, or the state of an optimiser.
    """
    objective, arrays = _take_apart(
        loss_fn, params, lambda leaf, name: _float_leaf(leaf, name, dtype)
    )
    return objective, _joined(arrays)


def split_loss(
    loss_fn: Given[LossFn], params: PyTree, dtype: Any
) -> tuple[TreeObjective, Leaves] | None:
    """Return the objective and the parameters in arrays that stay where they are divided.

    None where none is divided, or not in a way that a program keeps.

    Args:
        loss_fn: As for `ravel_loss`.
        params: As for `ravel_loss`.
        dtype: Floating dtype of the arrays.

    Raises:
        DataError: As `ravel_loss` does.
    """
    layout = divided_layout([leaf for leaf in jax.tree_util.tree_leaves(params) if is_array(leaf)])
    if layout is None:
        return None
    objective, arrays = _take_apart(loss_fn, params, lambda leaf, name: _cast(leaf, name, dtype))
    objective = dataclasses.replace(objective, layout=layout)
    return objective, layout.share(Leaves(tuple(arrays)))


def _take_apart(
    loss_fn: Given[LossFn], params: PyTree, read: Callable[[Any, str], Any]
) -> tuple[TreeObjective, list[Any]]:
    """Return the objective, and the array leaves as they are read."""
    if not callable(loss_fn):
        raise DataError(
            f"loss_fn must be a function (params, batch) -> scalar; got {type(loss_fn).__name__}."
        )
    refuse_training_state(params)
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    settings = _settings_of_modules(params)  # Python floats there are settings, elsewhere unclear
    arrays, shapes, dtypes, static = [], [], [], []
    for path, leaf in paths:
        name = "params" + jax.tree_util.keystr(path)
        if _is_carried(leaf, name, path in settings):
            static.append(leaf)
            shapes.append(None)
            dtypes.append(None)
            continue
        _check_float(leaf, name)
        arrays.append(read(leaf, name))
        shapes.append(tuple(leaf.shape))
        dtypes.append(leaf.dtype)
    if not sum(array.size for array in arrays):
        found = f"{len(arrays)} empty arrays" if arrays else "no floating-point array"
        raise DataError(
            f"params holds {found}, so there is nothing to vary; pass the trained weights."
        )
    structure = TreeStructure(treedef, tuple(shapes), tuple(dtypes), tuple(static))
    return TreeObjective(loss_fn, structure), arrays


def _joined(arrays: list[Array | np.ndarray]) -> Array:
    """Return one vector, joined on the host, so that nothing is compiled for it.

    Arrays that are traced, or that somebody has put on a device, are joined where they are.
    """
    # An array that is not committed lies where jax puts new ones, so copying it moves nothing.
    if any(isinstance(array, jax.Array) and getattr(array, "committed", True) for array in arrays):
        return jnp.concatenate([jnp.ravel(array) for array in arrays])
    return jax.device_put(np.concatenate([np.ravel(array) for array in arrays]))


def _settings_of_modules(params: PyTree) -> set[Any]:
    """Return the paths inside equinox modules, which hold settings beside their weights."""
    outer = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_module)[0]
    return {
        (*path, *inner)
        for path, node in outer
        if _is_module(node)
        for inner, _ in jax.tree_util.tree_flatten_with_path(node)[0]
    }


def _is_module(node: Any) -> bool:
    return isinstance(node, eqx.Module)


def _is_carried(leaf: Any, name: str, is_setting: bool) -> bool:
    """Say whether a leaf is no parameter.

    Whether a Python float is one, only a module that holds it says.
    """
    if is_array(leaf):
        return False
    if isinstance(leaf, (float, complex)) and not is_setting:
        refuse_python_float(leaf, name)
    if callable(leaf) or isinstance(leaf, (bool, int, float, complex, str, bytes)):
        return True
    raise DataError(
        f"{name} is an object of type {type(leaf).__name__}; leaves must be floating-point arrays, "
        "functions or Python scalars. Close over it in loss_fn, or register its type as a pytree."
    )


def refuse_python_float(leaf: Any, name: str) -> None:
    """Refuse a Python number that may be meant as a parameter or as a setting."""
    raise DataError(
        f"{name} is the Python {type(leaf).__name__} {leaf!r}, which may be a parameter or a "
        "setting. Make it jnp.asarray(...) to vary it, or close over it in loss_fn to keep it."
    )


def _check_float(leaf: Any, name: str) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise DataError(
            f"{name} has dtype {leaf.dtype}; only floating-point parameters can be varied. Cast it "
            "to float32 if it is a weight; close over it in loss_fn if it is not."
        )
    if leaf.dtype.itemsize < 2:
        raise DataError(
            f"{name} has dtype {leaf.dtype}, too coarse for a posterior to be seen. Cast it to "
            "float32."
        )


def _float_leaf(leaf: Any, name: str, dtype: Any) -> Array | np.ndarray:
    """Return a leaf in the dtype of the flat vector, off several devices."""
    return (
        leaf.astype(dtype)
        if isinstance(leaf, jax.core.Tracer)
        else _cast(off_devices(leaf), name, dtype)
    )


def _cast(leaf: Any, name: str, dtype: Any) -> Array | np.ndarray:
    """Return a finite leaf in the dtype of the vector."""
    if not is_finite(leaf):
        raise DataError(
            f"{name} holds NaN or infinity; the trained parameters must be finite. Did training "
            "diverge?"
        )
    with np.errstate(over="ignore"):  # which is looked at next
        cast = leaf.astype(dtype)
    if not is_finite(cast):
        raise DataError(
            f'{name} holds numbers too large for {np.dtype(dtype)}. Use dtype="float64", or '
            "rescale."
        )
    return cast if isinstance(cast, jax.Array) else np.asarray(cast)  # a number of numpy's too
