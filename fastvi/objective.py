"""Losses on a flat parameter vector: the only place that ravels or unravels a model.

Everything below this file sees `w`, a vector of shape (dim,), and a batch (a pytree of arrays with a common
leading axis), and nothing of the model.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Array, Batch, Float, PyTree, Scalar

LossFn = Callable[..., Any]


@runtime_checkable
class FlatObjective(Protocol):
    """Mean loss per example, in nats, on a flat parameter vector and a batch."""

    def loss(self, w: Float[Array, " dim"], batch: Batch, /) -> Scalar:
        """Evaluate the mean loss of the batch."""
        ...

    def grad(self, w: Float[Array, " dim"], batch: Batch, /) -> Float[Array, " dim"]:
        """Differentiate `loss` with respect to `w`."""
        ...

    def value_and_grad(self, w: Float[Array, " dim"], batch: Batch, /) -> tuple[Scalar, Float[Array, " dim"]]:
        """Evaluate the loss and its gradient in one pass."""
        ...


@dataclasses.dataclass(frozen=True)
class CallableObjective:
    """A `FlatObjective` made of plain functions; equal functions make equal (and cached) objectives."""

    loss_fn: LossFn
    grad_fn: LossFn | None = None

    def loss(self, w, batch):
        """Evaluate the mean loss of the batch."""
        return self.loss_fn(w, batch)

    def grad(self, w, batch):
        """Differentiate the loss: by the given function if there is one, else by autodiff."""
        return jax.grad(self.loss_fn)(w, batch) if self.grad_fn is None else self.grad_fn(w, batch)

    def value_and_grad(self, w, batch):
        """Evaluate loss and gradient in one pass."""
        if self.grad_fn is None:
            return jax.value_and_grad(self.loss_fn)(w, batch)
        return self.loss_fn(w, batch), self.grad_fn(w, batch)


def make_flat_objective(loss_minibatch_flat: LossFn, grad_loss_minibatch: LossFn | None = None) -> CallableObjective:
    """Build a `FlatObjective` from a flat loss and, optionally, its own gradient.

    Args:
        loss_minibatch_flat: `(w, batch) -> mean loss per example` with `w` of shape (dim,).
        grad_loss_minibatch: `(w, batch) -> gradient` of shape (dim,); autodiff when left out.

    Returns:
        The objective; its `value_and_grad` uses `grad_loss_minibatch` when given.

    Raises:
        DataError: If an argument cannot be called.
    """
    for name, value in (
        ("loss_minibatch_flat", loss_minibatch_flat),
        ("grad_loss_minibatch", grad_loss_minibatch),
    ):
        if not callable(value) and not (value is None and name == "grad_loss_minibatch"):
            raise DataError(f"{name} must be a function (w, batch) -> array; got {type(value).__name__}.")
    return CallableObjective(loss_minibatch_flat, grad_loss_minibatch)


@dataclasses.dataclass(frozen=True)
class TreeStructure:
    """How a parameter pytree lies in a flat vector: array leaves in order, everything else kept as it is."""

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

    def unravel(self, w: Float[Array, " dim"]) -> PyTree:
        """Rebuild the pytree; half-precision leaves keep their dtype, the others take that of `w`."""
        leaves, start, static = [], 0, iter(self.static_leaves)
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            if shape is None:
                leaves.append(next(static))
                continue
            stop = start + math.prod(shape)
            leaf_dtype = dtype if dtype.itemsize == 2 else w.dtype
            leaves.append(w[start:stop].reshape(shape).astype(leaf_dtype))
            start = stop
        return jax.tree_util.tree_unflatten(self.treedef, leaves)


@dataclasses.dataclass(frozen=True)
class TreeObjective:
    """A `FlatObjective` around `loss_fn(params, batch)`; equal function and structure compare equal."""

    loss_fn: LossFn
    structure: TreeStructure

    def loss(self, w, batch):
        """Evaluate the mean loss of the batch."""
        return self.loss_fn(self.structure.unravel(w), batch)

    def grad(self, w, batch):
        """Differentiate the loss with respect to `w`."""
        return jax.grad(self.loss)(w, batch)

    def value_and_grad(self, w, batch):
        """Evaluate loss and gradient in one pass."""
        return jax.value_and_grad(self.loss)(w, batch)


def ravel_loss(loss_fn: LossFn, params: PyTree, dtype: Any = jnp.float32) -> tuple[TreeObjective, Float[Array, " dim"]]:
    """Flatten a loss on a parameter pytree.

    Floating-point array leaves become coordinates of `w`. Callables, strings and Python scalars (activation
    functions and settings inside an equinox module) are carried along unchanged and not varied.

    Args:
        loss_fn: `(params, batch) -> mean loss per example`, in nats.
        params: Any pytree: a haiku or flax dict, an equinox module, an array.
        dtype: Floating dtype of the flat vector.

    Returns:
        The flat objective and the flattened parameters.

    Raises:
        DataError: If a leaf is neither a floating array nor carried along, is not finite, or there is none.
    """
    if not callable(loss_fn):
        raise DataError(f"loss_fn must be a function (params, batch) -> scalar; got {type(loss_fn).__name__}.")
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    arrays, shapes, dtypes, static = [], [], [], []
    for path, leaf in paths:
        name = "params" + jax.tree_util.keystr(path)
        if _is_carried(leaf, name):
            static.append(leaf)
            shapes.append(None)
            dtypes.append(None)
            continue
        array = _float_leaf(leaf, name)
        arrays.append(jnp.ravel(array).astype(dtype))
        shapes.append(tuple(array.shape))
        dtypes.append(array.dtype)
    if not arrays:
        raise DataError("params holds no floating-point array, so there is nothing to vary; pass the trained weights.")
    structure = TreeStructure(treedef, tuple(shapes), tuple(dtypes), tuple(static))
    return TreeObjective(loss_fn, structure), jnp.concatenate(arrays)


def _is_carried(leaf: Any, name: str) -> bool:
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return False
    if callable(leaf) or isinstance(leaf, (bool, int, float, complex, str, bytes)):
        return True
    raise DataError(
        f"{name} is an object of type {type(leaf).__name__}; leaves must be floating-point arrays, functions or "
        "Python scalars. Close over it in loss_fn, or register its type as a pytree."
    )


def _float_leaf(leaf: Any, name: str) -> Array:
    dtype = leaf.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise DataError(
            f"{name} has dtype {dtype}; only floating-point parameters can be varied. Cast it to float32 if it is a "
            "weight; close over it in loss_fn if it is not."
        )
    if not np.all(np.isfinite(np.asarray(leaf, dtype=np.float64))):
        raise DataError(f"{name} holds NaN or infinity; the trained parameters must be finite. Did training diverge?")
    return jnp.asarray(leaf)


def check_data(data: Batch, n_data: int | None = None) -> tuple[Batch, int]:
    """Check a data set and put it on the device.

    Args:
        data: Pytree of numeric arrays with a common, non-empty leading axis.
        n_data: Expected number of examples, if known.

    Returns:
        The data as jax arrays and the number of examples.

    Raises:
        DataError: If a leaf is not numeric, holds NaN, is a scalar, or the lengths differ.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(data)
    if not paths:
        raise DataError("data is empty: pass a pytree of arrays with a common leading axis, such as (X, Y).")
    lengths, leaves = {}, []
    for path, leaf in paths:
        name = "data" + jax.tree_util.keystr(path)
        leaves.append(_numeric_leaf(leaf, name))
        lengths[name] = leaves[-1].shape[0]
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise DataError(f"all data arrays need the same leading axis (examples); got {listed}.")
    length = next(iter(lengths.values()))
    if length == 0:
        raise DataError("data has no examples: its leading axis has length 0.")
    if n_data is not None and n_data != length:
        raise DataError(f"n_data must be the number of examples in data; got n_data={n_data} for {length} examples.")
    return jax.tree_util.tree_unflatten(treedef, leaves), length


def _numeric_leaf(leaf: Any, name: str) -> Array:
    if isinstance(leaf, jax.core.Tracer):
        return leaf
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if array.dtype == object or not (jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.bool_)):
        raise DataError(
            f"{name} has dtype {array.dtype}; data must be numeric arrays. Encode strings and objects first."
        )
    if array.ndim == 0:
        raise DataError(f"{name} is a scalar; every data array needs a leading axis of examples.")
    if jnp.issubdtype(array.dtype, jnp.inexact) and not bool(np.all(np.isfinite(np.asarray(array)))):
        raise DataError(f"{name} holds NaN or infinity; clean the data first (rows with missing values?).")
    return jnp.asarray(array)


def check_loss(objective: FlatObjective, w: Float[Array, " dim"], batch: Batch, name: str = "loss_fn") -> None:
    """Check by abstract evaluation that the loss is a real scalar and its gradient has the shape of `w`.

    Raises:
        DataError: If the loss cannot be evaluated on the batch, or returns anything but a floating scalar.
    """
    try:
        loss = jax.eval_shape(objective.loss, w, batch)
    except Exception as error:  # the user's function may raise anything; the cause is kept
        raise DataError(f"{name} failed on a batch of shapes {_shapes(batch)}: {_first_line(error)}") from error
    leaves = jax.tree_util.tree_leaves(loss)
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        came = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves) or "nothing"
        raise DataError(
            f"{name} must return one floating-point scalar, the mean loss per example; got {came}. "
            "Average over the batch with .mean(), and return the loss alone."
        )
    try:
        grad = jax.eval_shape(objective.grad, w, batch)
    except Exception as error:
        raise DataError(f"the gradient of {name} failed: {_first_line(error)}") from error
    if getattr(grad, "shape", None) != w.shape:
        raise DataError(f"the gradient of {name} must have shape {w.shape}; got {getattr(grad, 'shape', grad)}.")


def _shapes(batch: Batch) -> str:
    return str(jax.tree_util.tree_map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", batch))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def hvp_operator(
    objective: FlatObjective, w: Float[Array, " dim"], batch: Batch
) -> Callable[[Float[Array, " dim"]], Float[Array, " dim"]]:
    """Return `tangent -> H tangent` with H the Hessian of the batch's mean loss at `w`.

    Forward over reverse where the gradient allows it; reverse over reverse for losses with a custom VJP.
    The gradient is linearised once, so many tangents share one primal evaluation.

    Cost:
        2 gradients of the batch per tangent.
    """

    def gradient(point):
        return objective.grad(point, batch)

    try:
        return jax.linearize(gradient, w)[1]
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        _, pull = jax.vjp(gradient, w)
        return lambda tangent: pull(tangent)[0]


EVALUATION_CHUNK = 4096  # examples per evaluation of the full-data loss: bounds activation memory


def full_data_loss(objective: FlatObjective, w: Float[Array, " dim"], data: Batch) -> Scalar:
    """Evaluate the mean loss on all data in chunks of at most `EVALUATION_CHUNK` examples."""
    return _chunked_mean(lambda chunk: objective.loss(w, chunk), data)


def excess_loss(
    objective: FlatObjective, w: Float[Array, " dim"], reference: Float[Array, " dim"], data: Batch
) -> Scalar:
    """Evaluate `L_n(w) - L_n(reference)` paired chunk by chunk, which keeps float32 accurate."""
    return _chunked_mean(lambda chunk: objective.loss(w, chunk) - objective.loss(reference, chunk), data)


def full_data_value_and_grad(
    objective: FlatObjective, w: Float[Array, " dim"], data: Batch, reference_loss: Scalar | float = 0.0
) -> tuple[Scalar, Float[Array, " dim"]]:
    """Evaluate `L_n(w) - reference_loss` and the gradient of L_n on all data, chunk by chunk."""

    def chunk_statistic(chunk):
        value, grad = objective.value_and_grad(w, chunk)
        return value - reference_loss, grad

    return _chunked_mean(chunk_statistic, data)


def full_data_hvp(
    objective: FlatObjective, w: Float[Array, " dim"], data: Batch
) -> Callable[[Float[Array, " dim"]], Float[Array, " dim"]]:
    """Return the Hessian-vector product of the mean loss on all data, chunk by chunk."""
    if jax.tree_util.tree_leaves(data)[0].shape[0] <= EVALUATION_CHUNK:
        return hvp_operator(objective, w, data)
    return lambda tangent: _chunked_mean(lambda chunk: hvp_operator(objective, w, chunk)(tangent), data)


def _chunked_mean(statistic: Callable[[Batch], Any], data: Batch) -> Any:
    """Average a mean-per-example statistic, an array or a tree of them, over chunks weighted by their sizes."""
    length = jax.tree_util.tree_leaves(data)[0].shape[0]
    if length <= EVALUATION_CHUNK:
        return statistic(data)
    num_chunks = length // EVALUATION_CHUNK
    covered = num_chunks * EVALUATION_CHUNK
    stacked = jax.tree_util.tree_map(
        lambda leaf: leaf[:covered].reshape(num_chunks, EVALUATION_CHUNK, *leaf.shape[1:]), data
    )
    zero = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(statistic, data))

    def add(total, chunk):
        return jax.tree_util.tree_map(jnp.add, total, statistic(chunk)), None

    total, _ = jax.lax.scan(add, zero, stacked)
    mean = jax.tree_util.tree_map(lambda leaf: leaf / num_chunks, total)
    if covered == length:
        return mean
    rest = statistic(jax.tree_util.tree_map(lambda leaf: leaf[covered:], data))
    share = covered / length
    return jax.tree_util.tree_map(lambda a, b: a * share + b * (1 - share), mean, rest)
