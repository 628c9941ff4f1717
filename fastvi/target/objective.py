"""Losses on a flat parameter vector: the only place that ravels or unravels a model.

Everything below this file sees `w`, a vector of shape (dim,), and a batch (a pytree of arrays with
a common leading axis), and nothing of the model.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Hashable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError, ErrorNote
from fastvi._typing import Array, Batch, Float, Given, PyTree, Scalar
from fastvi.target.inputs import is_finite
from fastvi.target.losses import (
    LossForm,
    classify_loss,
    describe_value,
    example_losses,
    first_rows,
    mean_loss,
    num_examples,
    raw_examples,
)
from fastvi.target.modes import call_in_their_modes, in_own_modes

LossFn = Callable[..., Any]


@runtime_checkable
class FlatObjective(Protocol):
    """Mean loss per example, in nats, on a flat parameter vector and a batch.

    It may also have `value_and_grad(w, batch)`, which returns both at the price of the gradient.
    """

    def loss(self, w: Float[Array, " dim"], batch: Batch, /) -> Scalar:
        """Evaluate the mean loss of the batch."""
        ...

    def grad(self, w: Float[Array, " dim"], batch: Batch, /) -> Float[Array, " dim"]:
        """Differentiate `loss` with respect to `w`."""
        ...


def value_and_grad(
    objective: FlatObjective, w: Float[Array, " dim"], batch: Batch
) -> tuple[Scalar, Array]:
    """Evaluate the loss and its gradient, in one pass where the objective can."""
    both = getattr(objective, "value_and_grad", None)
    return (objective.loss(w, batch), objective.grad(w, batch)) if both is None else both(w, batch)


@dataclasses.dataclass(frozen=True)
class CallableObjective:
    """A `FlatObjective` made of plain functions.

    Equal functions make equal (and cached) objectives.
    """

    loss_fn: LossFn
    grad_fn: LossFn | None = None

    def outputs(self, w, batch):
        """Return what the function returns on the batch."""
        return call_in_their_modes(self.loss_fn, w, raw_examples(batch))

    def loss(self, w, batch):
        """Evaluate the mean loss of the batch."""
        return mean_loss(self.outputs(w, batch), batch, w.dtype)

    def grad(self, w, batch):
        """Differentiate the loss: by the given function if there is one, else by autodiff."""
        if self.grad_fn is None:
            return jax.grad(self.loss)(w, batch)
        return call_in_their_modes(self.grad_fn, w, batch)

    def value_and_grad(self, w, batch):
        """Evaluate loss and gradient in one pass."""
        if self.grad_fn is None:
            return jax.value_and_grad(self.loss)(w, batch)
        return self.loss(w, batch), self.grad(w, batch)


def make_flat_objective(
    loss_minibatch_flat: Given[LossFn], grad_loss_minibatch: Given[LossFn | None] = None
) -> CallableObjective:
    """Build a `FlatObjective` from a flat loss and, optionally, its own gradient.

    Args:
        loss_minibatch_flat: `(w, batch) -> mean loss per example` with `w` of shape (dim,); or one
            loss for each example, or (losses, weights), as `estimate_llc` takes them.
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
            raise DataError(
                f"{name} must be a function (w, batch) -> array; got {type(value).__name__}."
            )
    return CallableObjective(loss_minibatch_flat, grad_loss_minibatch)


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

    def unravel(self, w: Float[Array, " dim"]) -> PyTree:
        """Rebuild the pytree.

        Half-precision leaves keep their dtype, the others take that of `w`.
        """
        return self._rebuilt(w, lambda dtype: dtype if dtype.itemsize == 2 else w.dtype)

    def unravel_as_given(self, w: Float[Array, "*axes dim"]) -> PyTree:
        """Rebuild the pytree in the dtypes that it came with.

        Axes before the last lead every array.
        """
        return self._rebuilt(w, lambda dtype: dtype)

    def _rebuilt(self, w: Float[Array, "*axes dim"], leaf_dtype: Callable[[Any], Any]) -> PyTree:
        leaves, start, static = [], 0, iter(self.static_leaves)
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            if shape is None:
                leaves.append(next(static))
                continue
            stop = start + math.prod(shape)
            leaves.append(
                w[..., start:stop].reshape(*w.shape[:-1], *shape).astype(leaf_dtype(dtype))
            )
            start = stop
        return jax.tree_util.tree_unflatten(self.treedef, leaves)

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
class TreeObjective:
    """A `FlatObjective` around `loss_fn(params, batch)`.

    Equal function and structure compare equal.
    """

    loss_fn: LossFn
    structure: TreeStructure

    def outputs(self, w, batch):
        """Return what the function returns on the batch."""
        return call_in_their_modes(self.loss_fn, self.structure.unravel(w), raw_examples(batch))

    def loss(self, w, batch):
        """Evaluate the mean loss of the batch."""
        return mean_loss(self.outputs(w, batch), batch, w.dtype)

    def example_losses(self, w, batch):
        """Return the share of each example in the mean, None where the function returns the mean itself."""
        return example_losses(self.outputs(w, batch), batch, w.dtype)

    def grad(self, w, batch):
        """Differentiate the loss with respect to `w`."""
        return jax.grad(self.loss)(w, batch)

    def value_and_grad(self, w, batch):
        """Evaluate loss and gradient in one pass."""
        return jax.value_and_grad(self.loss)(w, batch)


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
            is none.
    """
    if not callable(loss_fn):
        raise DataError(
            f"loss_fn must be a function (params, batch) -> scalar; got {type(loss_fn).__name__}."
        )
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    settings = _settings_of_modules(params)
    arrays, shapes, dtypes, static = [], [], [], []
    for path, leaf in paths:
        name = "params" + jax.tree_util.keystr(path)
        if _is_carried(leaf, name, path in settings):
            static.append(leaf)
            shapes.append(None)
            dtypes.append(None)
            continue
        array = _float_leaf(leaf, name, dtype)
        arrays.append(array.ravel())
        shapes.append(tuple(leaf.shape))
        dtypes.append(leaf.dtype)
    if not sum(array.size for array in arrays):
        found = f"{len(arrays)} empty arrays" if arrays else "no floating-point array"
        raise DataError(
            f"params holds {found}, so there is nothing to vary; pass the trained weights."
        )
    structure = TreeStructure(treedef, tuple(shapes), tuple(dtypes), tuple(static))
    return TreeObjective(loss_fn, structure), jnp.concatenate(arrays)


def _settings_of_modules(params: PyTree) -> set[Any]:
    """Return the paths of what lies inside equinox modules, which hold settings beside their weights."""
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
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return False
    if isinstance(leaf, (float, complex)) and not is_setting:
        refuse_python_float(leaf, name)
    if callable(leaf) or isinstance(leaf, (bool, int, float, complex, str, bytes)):
        return True
    raise DataError(
        f"{name} is an object of type {type(leaf).__name__}; leaves must be floating-point "
        "arrays, functions or "
        "Python scalars. Close over it in loss_fn, or register its type as a pytree."
    )


def refuse_python_float(leaf: Any, name: str) -> None:
    """Refuse a Python number that may be meant as a parameter or as a setting."""
    raise DataError(
        f"{name} is the Python {type(leaf).__name__} {leaf!r}, which may be a parameter or a "
        "setting. Make it "
        "jnp.asarray(...) to vary it, or close over it in loss_fn to keep it."
    )


def _float_leaf(leaf: Any, name: str, dtype: Any) -> Array:
    """Return a leaf in the dtype of the flat vector."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise DataError(
            f"{name} has dtype {leaf.dtype}; only floating-point parameters can be varied. Cast "
            "it to float32 if it is "
            "a weight; close over it in loss_fn if it is not."
        )
    if leaf.dtype.itemsize < 2:
        raise DataError(
            f"{name} has dtype {leaf.dtype}, too coarse for a posterior to be seen. Cast it to "
            "float32."
        )
    if isinstance(leaf, jax.core.Tracer):
        return leaf.astype(dtype)
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
    return jax.device_put(cast)


def check_loss(
    objective: Given[FlatObjective], w: Float[Array, " dim"], batch: Batch, name: str = "loss_fn"
) -> LossForm:
    """Find by abstract evaluation what form the loss returns, and that its gradient has the shape of `w`.

    An error that the function itself raises passes through, with a note of what it was called on.

    Raises:
        DataError: If the loss returns none of the forms, or its gradient has another shape.
    """
    for method in ("loss", "grad"):
        if not callable(getattr(objective, method, None)):
            raise DataError(
                f"{name} must have the methods loss(w, batch) and grad(w, batch); "
                f"{type(objective).__name__} has no "
                f"{method}. make_flat_objective(loss) makes one of a function."
            )
    length = num_examples(batch)
    sizes = (length, max(1, length // 2))
    outputs = getattr(objective, "outputs", objective.loss)
    values = tuple(_abstract(outputs, w, first_rows(batch, size), name) for size in sizes)
    form = classify_loss(values, sizes, name)
    own_gradient = getattr(objective, "grad_fn", None) is not None
    if form is not LossForm.MEAN and (
        outputs is objective.loss or (own_gradient and form is LossForm.WEIGHTED)
    ):
        raise DataError(
            f"{name} with a gradient of its own must return the mean loss as one scalar; got "
            f"{describe_value(values[0])}. Leave the gradient out (autodiff), or return the mean."
        )
    if form is not LossForm.WEIGHTED:  # whose gradient is that of a sum over weighted examples
        grad = _abstract(objective.grad, w, batch, f"the gradient of {name}")
        if getattr(grad, "shape", None) != w.shape:
            raise DataError(
                f"the gradient of {name} must have shape {w.shape}; got "
                f"{getattr(grad, 'shape', grad)}."
            )
    return form


def _abstract(
    function: Callable[..., Any], w: Float[Array, " dim"], batch: Batch, name: str
) -> Any:
    """Return the shapes that a person's function returns.

    Whatever it raises gets a note and passes.
    """
    with ErrorNote(f"fastvi: raised by {name} on a batch of shapes {_shapes(batch)}."):
        return jax.eval_shape(function, w, batch)


def _shapes(batch: Batch) -> str:
    return str(jax.tree_util.tree_map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", batch))


def hvp_operator(
    objective: FlatObjective, w: Float[Array, " dim"], batch: Batch
) -> Callable[[Float[Array, " dim"]], Float[Array, " dim"]]:
    """Return `tangent -> H tangent` with H the Hessian of the batch's mean loss at `w`.

    Forward over reverse where the gradient allows it; reverse over reverse, as for losses with a
    custom VJP; where jax knows no second derivative, central differences of the gradient. An
    abstract evaluation tells which. The gradient is linearised once, so many tangents share one
    primal evaluation.

    Cost:
        2 gradients of the batch per tangent.
    """

    def gradient(point):
        return objective.grad(point, batch)

    jax.eval_shape(gradient, w)  # what the loss itself raises is not ours to catch
    try:
        push = jax.linearize(gradient, w)[1]
        jax.eval_shape(
            jax.vmap(push), w[None]
        )  # only a batch of tangents finds a function with a VJP alone
    except NO_DERIVATIVE:
        pass
    else:
        return push
    try:
        pull = jax.vjp(gradient, w)[1]
        jax.eval_shape(jax.vmap(pull), w[None])
    except NO_DERIVATIVE:
        return lambda tangent: _gradient_difference(gradient, w, tangent)
    return lambda tangent: pull(tangent)[0]


NO_DERIVATIVE = (
    TypeError,
    ValueError,
    NotImplementedError,
)  # what jax raises where it has no rule for one


def _gradient_difference(
    gradient: Callable, w: Float[Array, " dim"], tangent: Float[Array, " dim"]
):
    """Return `H tangent` by a central difference, over the cube root of the precision of each coordinate it moves."""
    relative = jnp.linalg.norm(tangent / jnp.maximum(jnp.abs(w), 1.0))
    step = jnp.cbrt(jnp.finfo(w.dtype).eps).astype(w.dtype) / jnp.where(relative > 0, relative, 1.0)
    return (gradient(w + step * tangent) - gradient(w - step * tangent)) / (2 * step)


def call_full_loss(loss_full_flat: Given[LossFn], w: Float[Array, " dim"], data: Batch) -> Scalar:
    """Evaluate a full-data loss of either form, `(w) -> L_n(w)` or `(w, data) -> L_n(w)`.

    Raises:
        DataError: If it can be called in neither way.
    """
    takes_one, takes_two = (_takes(loss_full_flat, count) for count in (1, 2))
    if takes_one is None and takes_two is None:  # *args, or no signature: the arguments tell
        try:
            jax.eval_shape(loss_full_flat, w)
        except (TypeError, ValueError, IndexError):  # too few of them
            takes_one = False
    if takes_one is False and takes_two is False:
        raise DataError(
            "loss_full_flat must be a function (w) -> loss or (w, data) -> loss; it takes neither."
        )
    arguments = (w, raw_examples(data)) if takes_one is False else (w,)
    return call_in_their_modes(loss_full_flat, *arguments)


def _takes(function: Given[LossFn], count: int) -> bool | None:
    """Say whether a function can be called with so many arguments, None where it takes any number."""
    try:
        signature = inspect.signature(function)
        signature.bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return None
    anything = any(
        p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values()
    )
    return None if anything else True


EVALUATION_CHUNK = 4096  # examples per evaluation of the full-data loss: bounds activation memory


def full_data_loss(objective: FlatObjective, w: Float[Array, " dim"], data: Batch) -> Scalar:
    """Evaluate the mean loss on all data in chunks of at most `EVALUATION_CHUNK` examples."""
    return _chunked_mean(lambda chunk: objective.loss(w, chunk), data)


def excess_loss(
    objective: FlatObjective, w: Float[Array, " dim"], reference: Float[Array, " dim"], data: Batch
) -> Scalar:
    """Evaluate `L_n(w) - L_n(reference)` paired chunk by chunk, which keeps float32 accurate."""
    return _chunked_mean(
        lambda chunk: objective.loss(w, chunk) - objective.loss(reference, chunk), data
    )


def full_data_value_and_grad(
    objective: FlatObjective,
    w: Float[Array, " dim"],
    data: Batch,
    reference_loss: Scalar | float = 0.0,
) -> tuple[Scalar, Float[Array, " dim"]]:
    """Evaluate `L_n(w) - reference_loss` and the gradient of L_n on all data, chunk by chunk."""

    def chunk_statistic(chunk):
        value, grad = value_and_grad(objective, w, chunk)
        return value - reference_loss, grad

    return _chunked_mean(chunk_statistic, data)


def full_data_hvp(
    objective: FlatObjective, w: Float[Array, " dim"], data: Batch
) -> Callable[[Float[Array, " dim"]], Float[Array, " dim"]]:
    """Return the Hessian-vector product of the mean loss on all data, chunk by chunk."""
    if num_examples(data) <= EVALUATION_CHUNK:
        return hvp_operator(objective, w, data)
    return lambda tangent: _chunked_mean(
        lambda chunk: hvp_operator(objective, w, chunk)(tangent), data
    )


def _chunked_mean(statistic: Callable[[Batch], Any], data: Batch) -> Any:
    """Average a mean-per-example statistic, an array or a tree of them, over chunks weighted by their sizes."""
    length = num_examples(data)
    if length <= EVALUATION_CHUNK:
        return statistic(data)
    num_chunks = length // EVALUATION_CHUNK
    covered = num_chunks * EVALUATION_CHUNK
    stacked = jax.tree_util.tree_map(
        lambda leaf: leaf[:covered].reshape(num_chunks, EVALUATION_CHUNK, *leaf.shape[1:]), data
    )
    zero = jax.tree_util.tree_map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(statistic, data)
    )

    def add(total, chunk):
        return jax.tree_util.tree_map(jnp.add, total, statistic(chunk)), None

    total, _ = jax.lax.scan(add, zero, stacked)
    mean = jax.tree_util.tree_map(lambda leaf: leaf / num_chunks, total)
    if covered == length:
        return mean
    rest = statistic(jax.tree_util.tree_map(lambda leaf: leaf[covered:], data))
    share = covered / length
    return jax.tree_util.tree_map(lambda a, b: a * share + b * (1 - share), mean, rest)
