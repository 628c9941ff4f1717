"""What a loss returns, found by abstract evaluation and held to the forms that it may have."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage]

from fastvi._errors import DataError, ErrorNote
from fastvi._typing import Given, PyTree, Vector
from fastvi.target.losses import LossForm, describe_arrays, map_examples, num_examples
from fastvi.target.objective import FlatObjective

AUXILIARY_FIX = (
    "if the second value is auxiliary, return the loss alone: "
    "lambda params, batch: loss(params, batch)[0]"
)


class Signature(NamedTuple):
    """What abstract evaluation says of a loss.

    Attributes:
        form: What it returns.
        bytes_per_example: All that a forward pass computes for one example: about what a
            forward-backward pass keeps of it.
    """

    form: LossForm
    bytes_per_example: float


def check_loss(
    objective: Given[FlatObjective], w: Vector, batch: PyTree, name: str = "loss_fn"
) -> Signature:
    """Find what the loss returns and computes, and that its gradient has the shape of `w`.

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
    # of two sizes, so that an axis of the batch can be told from one of the same length
    sizes = (length, max(1, length // 2))
    outputs = getattr(objective, "outputs", objective.loss)
    traced = [_trace(outputs, w, leading(batch, size), name) for size in sizes]
    values = tuple(shapes for _, shapes in traced)
    form = classify_loss(values, sizes, name)
    own_gradient = getattr(objective, "has_own_gradient", False)
    if form is not LossForm.MEAN and (
        not hasattr(objective, "outputs") or (own_gradient and form is LossForm.WEIGHTED)
    ):
        raise DataError(
            f"{name} with a gradient of its own must return the mean loss as one scalar; got "
            f"{describe_value(values[0])}. Leave the gradient out (autodiff), or return the mean."
        )
    # autodiff gives the shape of w, and the gradient of (losses, weights) is taken once weighed
    if own_gradient or not hasattr(objective, "outputs"):
        grad = _trace(objective.grad, w, batch, f"the gradient of {name}")[1]
        if getattr(grad, "shape", None) != w.shape:
            raise DataError(
                f"the gradient of {name} must have shape {w.shape}; got "
                f"{getattr(grad, 'shape', grad)}."
            )
    most, least = (computed_bytes(jaxpr.jaxpr) for jaxpr, _ in traced)
    # what grows with the batch; of one example alone nothing can be told apart, so all counts
    grown = (most - least) / (sizes[0] - sizes[1]) if sizes[0] > sizes[1] else most
    return Signature(form, max(grown, 0.0))


PROGRAM = (ClosedJaxpr, Jaxpr)  # what calls, loops and branches hold


def _trace(function: Callable[..., Any], w: Vector, batch: PyTree, name: str) -> tuple[Any, Any]:
    """Trace a person's function; return its jaxpr and the shapes that it returns.

    Whatever it raises gets a note and passes.
    """
    with error_note(name, batch):
        return jax.make_jaxpr(function, return_shape=True)(w, batch)


def leading(batch: PyTree, size: int) -> PyTree:
    """Return the shapes of the first examples of a batch, of which nothing is computed."""
    return map_examples(
        lambda leaf: jax.ShapeDtypeStruct((min(size, leaf.shape[0]), *leaf.shape[1:]), leaf.dtype),
        batch,
    )


def error_note(name: str, batch: PyTree) -> ErrorNote:
    """Return a block that says of what is raised in it by whom, on what batch."""
    return ErrorNote(f"fastvi: raised by {name} on a batch of shapes {describe_arrays(batch)}.")


def computed_bytes(jaxpr: Any) -> float:
    """Count the bytes of all that a program computes, loops as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        parameters = jax.tree_util.tree_leaves(list(equation.params.values()))
        inner = [getattr(one, "jaxpr", one) for one in parameters if isinstance(one, PROGRAM)]
        if inner:  # a call, a loop or a branch: what it returns is computed inside
            # Of the branches of a condition one runs, at worst the largest.
            repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            total += repeats * max(map(computed_bytes, inner))
        else:
            total += sum(_bytes(variable.aval) for variable in equation.outvars)
    return total


def _bytes(value: Any) -> float:
    # tokens of effects have no shape, and keys of random numbers no size in bytes
    shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 4)


def classify_loss(shapes: Any, sizes: tuple[int, int], name: str) -> LossForm:
    """Say which form a loss function returns, from its abstract results on batches of two sizes.

    Args:
        shapes: What it returns on each of the two, as trees of shapes and dtypes.
        sizes: Examples of the two batches.
        name: Of the function, for the error.

    Raises:
        DataError: If it is none of the forms.
    """
    value, other = shapes
    if _is_pair(value):
        return _classify_pair(value, other, sizes, name)
    if not _is_array(value):
        raise _refusal(name, f"got {describe_value(value)}. Average over the batch with .mean().")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise _refusal(name, f"got {describe_value(value)}. A loss is floating-point, in nats.")
    if value.shape == () and value.dtype.itemsize < 4:
        raise _refusal(
            name,
            f"got {describe_value(value)}, too coarse for the differences that make up llc. "
            "Take the mean in float32: losses.astype(jnp.float32).mean().",
        )
    if value.shape == ():
        return LossForm.MEAN
    if not _leads_with_batch((value, other), sizes):
        sizes_text = " and ".join(
            f"{describe_value(v)} for {s} examples" for v, s in zip(shapes, sizes, strict=True)
        )
        raise _refusal(
            name,
            f"got {sizes_text}, whose first axis is not that of the batch. Average it with "
            ".mean().",
        )
    return LossForm.EXAMPLES


def _classify_pair(value: Any, other: Any, sizes: tuple[int, int], name: str) -> LossForm:
    losses, weights = value
    came = f"got a pair of {describe_value(value)}"
    if _is_array(losses) and losses.shape == ():
        kind = (
            "scalars"
            if _is_array(weights) and weights.shape == ()
            else "a scalar and something else"
        )
        raise _refusal(
            name,
            f"{came}: a pair of {kind}, as of has_aux, is no (losses, weights); {AUXILIARY_FIX}.",
        )
    if not (_is_array(losses) and _is_array(weights) and losses.shape == weights.shape):
        raise _refusal(
            name, f"{came}; losses and weights need one shape, batch axis first; {AUXILIARY_FIX}."
        )
    pairs = zip(value, other, strict=True)
    if not jnp.issubdtype(losses.dtype, jnp.floating) or not all(
        _leads_with_batch(pair, sizes) for pair in pairs
    ):
        raise _refusal(
            name,
            f"{came} for {sizes[0]} examples; both need the batch axis first; {AUXILIARY_FIX}.",
        )
    real = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(weights.dtype, kind) for kind in real):
        raise _refusal(name, f"{came}; weights are numbers of at least 0.")
    return LossForm.WEIGHTED


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _leads_with_batch(pair: Any, sizes: tuple[int, int]) -> bool:
    return all(
        _is_array(value) and value.shape[:1] == (size,) and value.shape[1:] == pair[0].shape[1:]
        for value, size in zip(pair, sizes, strict=True)
    )


def _refusal(name: str, came: str) -> DataError:
    return DataError(
        f"{name} must return the mean loss of the batch as one floating-point scalar, an array "
        "with one loss for each "
        f"example (batch axis first), or (losses, weights) of one such shape; {came}"
    )


def describe_value(value: Any) -> str:
    """Name the arrays that a function returned, by dtype and shape."""
    leaves = jax.tree_util.tree_leaves(value)
    return (
        ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves if _is_array(leaf))
        or "nothing"
    )
