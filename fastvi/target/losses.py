"""What a loss function may return, and the mean over the data that each form stands for.

    scalar               the mean over the examples of the batch
    array                one loss for each example, or each of its tokens, batch axis first
    (losses, weights)    the same with weights: masked tokens, padding, class weights

In the last form `L_n = sum(weights * losses) / sum(weights)` over ALL data. A batch divides by the
mean weight of an example of all data, not by its own, so that every minibatch, slice and block is
an unbiased estimate.
"""

import enum
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Array, Batch, Float, PyTree, Scalar, Vector


class LossForm(enum.Enum):
    """What a loss function returns."""

    MEAN = "scalar"
    EXAMPLES = "losses"
    WEIGHTED = "(losses, weights)"


class WeightedBatch(NamedTuple):
    """Examples of a weighted loss, each with the reciprocal of all data's mean weight.

    As a leaf with the batch axis the reciprocal is sliced, shuffled and streamed like the data, and
    other data of the same shapes need no other program.
    """

    examples: Batch
    inverse_mean_weight: Float[Array, " batch"]


class Shared(NamedTuple):
    """Arrays beside the examples, which have no axis of them: all examples share these."""

    arrays: PyTree


class RestrictedBatch(NamedTuple):
    """Examples of a restricted loss, with the weights that do not vary.

    As inputs of a program, other weights of the same shapes need no other program.
    """

    examples: Batch
    shared: Shared


def map_examples(function: Callable[[Any], Any], batch: PyTree) -> PyTree:
    """Apply a function to each array that has an axis of examples; shared ones stay."""
    return jax.tree_util.tree_map(
        lambda leaf: leaf if _is_shared(leaf) else function(leaf), batch, is_leaf=_is_shared
    )


def by_kind(batch: PyTree, of_examples: Any, of_shared: Any) -> PyTree:
    """Return a prefix of a batch's tree: one value for each array of examples, one for shared."""
    return jax.tree_util.tree_map(
        lambda leaf: of_shared if _is_shared(leaf) else of_examples, batch, is_leaf=_is_shared
    )


def example_leaves(batch: PyTree) -> list[Any]:
    """Return the arrays that have an axis of examples."""
    leaves = jax.tree_util.tree_leaves(batch, is_leaf=_is_shared)
    return [leaf for leaf in leaves if not _is_shared(leaf)]


def _is_shared(node: Any) -> bool:
    return isinstance(node, Shared)


def num_examples(batch: PyTree) -> int:
    """Count the examples of a batch, of data, or of their shapes."""
    return example_leaves(batch)[0].shape[0]


def example_bytes(batch: PyTree) -> int:
    """Count the bytes of one example."""
    leaves = example_leaves(batch)
    return sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in leaves)


def describe_arrays(batch: PyTree, first_axis: int = 0) -> str:
    """Name the arrays of a batch by dtype and shape, from an axis on."""
    return str(
        jax.tree_util.tree_map(
            lambda leaf: f"{leaf.dtype}{list(leaf.shape[first_axis:])}", passed_examples(batch)
        )
    )


def take_examples(batch: Batch, rows: Any) -> Batch:
    """Return some examples: those in a slice, or with these numbers."""
    return map_examples(lambda leaf: leaf[rows], batch)


def raw_examples(batch: PyTree) -> PyTree:
    """Return the batch as the loss function takes it."""
    return batch.examples if isinstance(batch, WeightedBatch) else batch


def passed_examples(batch: PyTree) -> PyTree:
    """Return the batch in the structure of the data that a person passed."""
    raw = raw_examples(batch)
    return raw.examples if isinstance(raw, RestrictedBatch) else raw


def beside_same(like: Batch, examples: Batch) -> Batch:
    """Return other examples beside the weights that those of a batch are beside."""
    raw = raw_examples(like)
    return RestrictedBatch(examples, raw.shared) if isinstance(raw, RestrictedBatch) else examples


def mean_loss(value: Any, batch: Batch, dtype: Any) -> Scalar:
    """Reduce what a loss function returned on a batch to its estimate of the mean over the data."""
    losses = example_losses(value, batch, dtype)
    # a Python number has no axes, which draws side by side need
    return jnp.asarray(value) if losses is None else jnp.mean(losses)


def example_losses(value: Any, batch: Batch, dtype: Any) -> Float[Array, " batch"] | None:
    """Return each example's share of the mean, None where the function returned the mean itself.

    The mean of the shares over all examples is `L_n`: an example of weight zero has none.
    """
    if isinstance(batch, WeightedBatch):
        # losses are cast before they are summed: half precision would round the small differences
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


class Weighing(NamedTuple):
    """What the weights of a loss are on data.

    Attributes:
        mean: Mean weight of an example.
        error: Its relative error, were the data a sample.
        effective_share: `mean^2` over the mean square: that of so many examples with equal weights
            and all others without, over all examples (Kish's effective sample size).
    """

    mean: float = 1.0
    error: float = 0.0
    effective_share: float = 1.0


def weight_statistics(outputs: Any, dtype: Any) -> tuple[Scalar, Scalar, Scalar]:
    """Return the mean weight of an example, its mean square, and the share of impossible ones."""
    weights = jnp.asarray(outputs[1], dtype)
    of_example = _per_example(weights, jnp.sum)
    # NaN is not >= 0 either; an infinite weight shows in the mean
    invalid = jnp.mean(~(weights >= 0), dtype=dtype)
    return jnp.mean(of_example), jnp.mean(of_example**2), invalid


def find_mean_weight(
    weigh: Callable[[Vector, Any], tuple[Scalar, Scalar, Scalar]],
    center: Vector,
    pieces: Iterable[Any],
    name: str,
) -> Weighing:
    """Return what the weights of an example are over the pieces.

    The first piece is read twice, at two points, where the weights must be the same.

    Args:
        weigh: `(w, piece) -> weight_statistics`, a mean over the piece, which XLA finds without
            the losses.
        center: w*.
        pieces: All data in pieces.
        name: Of the loss function, for errors.

    Raises:
        DataError: If a weight is negative or not finite, all are zero, or they depend on the
            parameters.
    """
    # Every parameter moves, those at zero among them.
    found, sizes, nudged = [], [], center + 0.01 * (1 + abs(center))
    for piece in pieces:
        # sums over pieces are taken on the host in float64
        here = np.asarray(jax.device_get(weigh(center, piece)), float)
        # one program at two points gives equal bits unless a weight reads the parameters
        if not found and not np.array_equal(here, jax.device_get(weigh(nudged, piece)), True):
            raise DataError(
                f"the weights of {name} change with the parameters; they must depend on the data "
                "alone."
            )
        found.append(here)
        sizes.append(piece.num_examples)
    mean_weight, mean_square, invalid = np.average(found, axis=0, weights=sizes)
    check_weights(mean_weight, invalid, name)
    if mean_weight == 0:
        raise DataError(
            f"the weights of {name} are all 0 on {sum(sizes)} examples, so there is nothing to "
            "average. Is the mask inverted, or are data that are read once sorted? Then shuffle "
            "them."
        )
    spread = np.std(found, axis=0, ddof=1)[0] if len(found) > 1 else 0.0
    return Weighing(
        float(mean_weight),
        float(spread / np.sqrt(len(found)) / mean_weight),
        # squares of weights may leave the range of their type, and then say nothing
        float(mean_weight**2 / mean_square) if 0 < mean_square < np.inf else 1.0,
    )


def check_weights(mean: float, invalid: float, name: str) -> None:
    """Raise DataError where some weights are negative or not finite."""
    if invalid > 0 or not np.isfinite(mean):
        raise DataError(
            f"the weights of {name} must be finite and at least 0; {invalid:.2g} of them are not, "
            f"and their mean is {mean:g}."
        )
