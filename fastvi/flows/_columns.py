"""Arrays of columns.

Features lead and the batch is last, so that a loop over a batch is contiguous.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Array, Float

Order = tuple[int, ...]


class Condition(NamedTuple):
    """What a transform is conditioned on.

    `context` (context_dim, batch or 1) and `gate` (batch or 1,), or None.
    """

    context: Array | None = None
    gate: Array | None = None


def to_columns(x: Float[Array, "*batch dim"]) -> Float[Array, "dim size"]:
    """Flatten the batch and put it last."""
    return x.reshape(-1, x.shape[-1]).T


def from_columns(columns: Float[Array, "dim size"], batch: tuple[int, ...]) -> Float[Array, "..."]:
    """Undo `to_columns`."""
    return columns.T.reshape(*batch, columns.shape[0])


def rows_in_order(columns: Float[Array, "dim size"], order: Order) -> Float[Array, "dim size"]:
    """Return `columns[order]` for an order known at compile time.

    A few runs of rows are copied, not gathered.
    """
    breaks = [i for i in range(1, len(order)) if order[i] != order[i - 1] + 1]
    starts, ends = [0, *breaks], [*breaks, len(order)]
    if not breaks:  # the order as it is
        return columns
    if len(starts) <= 4:  # beyond, a gather is the shorter program
        return jnp.concatenate(
            [columns[order[a] : order[a] + b - a] for a, b in zip(starts, ends, strict=True)]
        )
    return columns[np.asarray(order)]


def inverse_order(order: Order) -> Order:
    """Return the order that undoes `order`."""
    return tuple(int(i) for i in np.argsort(np.asarray(order, int)))


def check_features(name: str, x: Array, dim: int) -> None:
    """Refuse an array whose last axis is not `dim`, or whose dtype is not floating.

    Raises:
        DataError: If so.
    """
    if jnp.ndim(x) == 0 or x.shape[-1] != dim:
        raise DataError(
            f"The last axis of {name} must have size {dim}; its shape is {jnp.shape(x)}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DataError(
            f"{name} must hold floating-point numbers, not {x.dtype}; convert it with "
            "astype(float)."
        )


def context_columns(
    context: Float[Array, "..."] | None, context_dim: int | None, batch: tuple[int, ...]
) -> Float[Array, "context size"] | None:
    """Check a context against the batch of x and turn it to columns.

    One column if all of the batch shares it.

    Args:
        context: One vector, or one for each element of the batch; batch axes broadcast.
        context_dim: Size that is needed; 0: no context is taken; None: any context is ignored.
        batch: Batch axes of x.

    Raises:
        DataError: If a context is missing, not expected or of another shape.
    """
    if context_dim is None:
        return None
    if context is None:
        if context_dim > 0:
            raise DataError(
                "This transform is conditional: pass context with a last axis of size "
                f"{context_dim}."
            )
        return None
    if context_dim == 0:
        raise DataError(
            "A context was passed but context_dim is 0; build with context_dim=<size of the "
            "context>."
        )
    # one vector stays one column, which the network then computes once for the batch
    context = jnp.asarray(context)
    check_features("context", context, context_dim)
    if context.ndim == 1:
        return context[:, None]
    _check_broadcast("context", context.shape[:-1], batch)
    return to_columns(jnp.broadcast_to(context, (*batch, context_dim)))


def gate_columns(gate: Array | None, batch: tuple[int, ...]) -> Float[Array, " size"] | None:
    """Flatten a gate to one number, or one for each element of the batch.

    Raises:
        DataError: If its shape does not broadcast to the batch.
    """
    if gate is None:
        return None
    gate = jnp.asarray(gate)
    if gate.ndim == 0:
        return gate[None]
    _check_broadcast("gate", gate.shape, batch)
    return jnp.broadcast_to(gate, batch).reshape(-1)


def _check_broadcast(name, own, batch):
    # As numpy broadcasts: axes are matched from the last, and may be missing in front.
    fits = len(own) <= len(batch) and all(
        a in (1, b) for a, b in zip(own[::-1], batch[::-1], strict=False)
    )
    if not fits:
        raise DataError(f"The batch axes of {name}, {own}, must broadcast to those of x, {batch}.")
