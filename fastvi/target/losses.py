"""What a loss function may return, and the mean over the data that each form stands for.

    scalar                 the mean over the examples of the batch
    array                  one loss for each example, or each token of each example: batch axis
    first (losses, weights)      the same with weights; masked tokens, padding and class weights
    weigh 0 or little

In the last form `L_n = sum(weights * losses) / sum(weights)` over ALL data. A batch divides by the
mean weight of an example of all data, not by its own, so that every minibatch, chunk and block is
an unbiased estimate.
"""

import enum
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Array, Batch, Float, Scalar

AUXILIARY_FIX = "if the second value is auxiliary, return the loss alone: lambda params, batch: loss(params, batch)[0]"


class LossForm(enum.Enum):
    """What a loss function returns."""

    MEAN = "scalar"
    EXAMPLES = "losses"
    WEIGHTED = "(losses, weights)"


class WeightedBatch(NamedTuple):
    """Examples of a weighted loss.

    Each carries the reciprocal of the mean weight of an example of all data.

    As a leaf with the batch axis it is sliced, shuffled and streamed like the data, and other data
    of the same shapes need no other program.
    """

    examples: Batch
    inverse_mean_weight: Float[Array, " batch"]


def num_examples(batch: Batch) -> int:
    """Count the examples of a batch or of data."""
    return jax.tree_util.tree_leaves(batch)[0].shape[0]


def first_rows(batch: Batch, count: int) -> Batch:
    """Return the first examples."""
    return jax.tree_util.tree_map(lambda leaf: leaf[:count], batch)


def raw_examples(batch: Batch) -> Batch:
    """Return the batch as the person's function takes it."""
    return batch.examples if isinstance(batch, WeightedBatch) else batch


def mean_loss(value: Any, batch: Batch, dtype: Any) -> Scalar:
    """Reduce what a loss function returned on a batch to its estimate of the mean over the data."""
    losses = example_losses(value, batch, dtype)
    return value if losses is None else jnp.mean(losses)


def example_losses(value: Any, batch: Batch, dtype: Any) -> Float[Array, " batch"] | None:
    """Return each example's share of the mean, None where the function returned the mean itself.

    The mean of the shares over all examples is `L_n`: an example of weight zero has none.
    """
    if isinstance(batch, WeightedBatch):
        losses, weights = (jnp.asarray(part, dtype) for part in value)
        return _per_example(losses * weights, jnp.sum) * batch.inverse_mean_weight.astype(dtype)
    if getattr(value, "ndim", 0) == 0:
        return None
    return _per_example(jnp.asarray(value, dtype), jnp.mean)


def _per_example(values: Float[Array, "batch ..."], reduce: Any) -> Float[Array, " batch"]:
    return reduce(values.reshape(values.shape[0], -1), axis=1)


def weigh_batch(batch: Batch, mean_weight: float, dtype: Any) -> WeightedBatch:
    """Attach the data's mean weight to every example of a batch."""
    return WeightedBatch(batch, jnp.full(num_examples(batch), 1 / mean_weight, dtype))


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
        fix = "Take the mean in float32: losses.astype(jnp.float32).mean()."
        raise _refusal(
            name,
            f"got {describe_value(value)}, too coarse for the differences that make up llc. {fix}",
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
    if not (
        jnp.issubdtype(weights.dtype, jnp.floating) or weights.dtype == bool or _is_integer(weights)
    ):
        raise _refusal(name, f"{came}; weights are numbers of at least 0.")
    return LossForm.WEIGHTED


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _is_integer(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.integer)


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


def weigh_data(
    outputs: Callable[..., Any],
    center: Float[Array, " dim"],
    batches: Iterable[tuple[Batch, int]],
    name: str,
) -> float:
    """Return the mean weight of an example over all data, by one pass in which XLA leaves out the losses.

    Args:
        outputs: `(w, batch) -> (losses, weights)`.
        center: w*.
        batches: All data in pieces, each with its number of examples.
        name: Of the function, for errors.

    Raises:
        DataError: If a weight is negative or not finite, all are zero, or they depend on the
            parameters.
    """

    @jax.jit
    def weights(w: Array, batch: Batch) -> tuple[Array, Array]:
        found = jnp.asarray(outputs(w, batch)[1], w.dtype)
        return _per_example(found, jnp.sum), jnp.min(found, initial=jnp.inf)

    total, count, least = 0.0, 0, np.inf
    for batch, size in batches:
        found, smallest = jax.device_get(weights(center, batch))
        if count == 0 and not np.array_equal(
            found, jax.device_get(weights(_nudged(center), batch))[0], True
        ):
            raise DataError(
                f"the weights of {name} change with the parameters; they must depend on the data "
                "alone."
            )
        total, count, least = (
            total + found.astype(np.float64).sum(),
            count + size,
            min(least, float(smallest)),
        )
    return _check_weights(float(total) / max(count, 1), least, name)


def _nudged(center: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """Return a point near w*, at which weights of the data alone are the same."""
    return center + 0.01 * (1 + jnp.abs(center))


def _check_weights(mean_weight: float, least: float, name: str) -> float:
    if not np.isfinite(mean_weight) or least < 0:
        raise DataError(
            f"the weights of {name} must be finite and at least 0; the least is {least:g}, their "
            f"mean {mean_weight:g}."
        )
    if mean_weight == 0:
        raise DataError(
            f"the weights of {name} are all 0, so there is nothing to average. Is the mask "
            "inverted?"
        )
    return mean_weight
