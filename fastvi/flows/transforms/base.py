"""The contract of an invertible transform."""

import abc
import functools
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._errors import ConfigError
from fastvi._typing import Any, Array, Float, Given, Key
from fastvi.flows._columns import (
    Condition,
    Order,
    check_features,
    context_columns,
    from_columns,
    gate_columns,
    inverse_order,
    rows_in_order,
    to_columns,
)


class AbstractTransform(eqx.Module):
    """An invertible map y = T(x; params, context) of vectors, with its log-determinant.

    Laws, tested for every transform: `inverse` undoes `forward`; the second value is log |det| of
    the Jacobian of the first in its argument; with the parameters of `init_params`, or a gate of 0,
    the map is the identity.

    An object holds static structure only, so it is hashable and a pytree without leaves. A final
    class gives `push` and `pull`, on columns whose rows come in `order`.

    Attributes:
        dim: Features.
        context_dim: Size of the context; 0: none is taken; None: any context is ignored.
    """

    # to a type checker an AbstractVar is an argument of __init__, even where a property meets it
    if TYPE_CHECKING:

        @property
        def dim(self) -> int:
            """Count the features."""
            ...

        @property
        def context_dim(self) -> int | None:
            """Return the size of the context."""
            ...

    else:
        dim: eqx.AbstractVar[int]
        context_dim: eqx.AbstractVar[int | None]

    @abc.abstractmethod
    def init_params(self, key: Key, context_dim: int = 0) -> Any:
        """Return parameters of the identity. `context_dim` must be that of the object, or 0."""

    @abc.abstractmethod
    def push(
        self, params: Any, columns: Float[Array, "dim size"], condition: Condition
    ) -> tuple[Float[Array, "dim size"], Float[Array, " size"]]:
        """Map columns forward."""

    @abc.abstractmethod
    def pull(
        self, params: Any, columns: Float[Array, "dim size"], condition: Condition
    ) -> tuple[Float[Array, "dim size"], Float[Array, " size"]]:
        """Map columns back."""

    def check_context_dim(self, context_dim: int) -> None:
        """Raise ConfigError unless a context's size is that of the object, or 0."""
        if context_dim not in (0, self.context_dim or 0):
            raise ConfigError(f"context_dim must be {self.context_dim or 0}, not {context_dim}.")

    @property
    def order(self) -> Order:
        """Return the order in which `push` and `pull` want the features."""
        return tuple(range(self.dim))

    def core(self) -> "AbstractTransform":
        """Return the transform that acts as `push` does on features in natural order."""
        return self

    def forward(
        self,
        params: Any,
        x: Given[Float[Array, "*batch dim"]],
        context: Given[Float[Array, "..."] | None] = None,
        g_value: Given[Float[Array, "..."] | None] = None,
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Map x to y.

        Args:
            params: Parameters.
            x: Vectors.
            context: What the map is conditioned on: one vector, or one for each x.
            g_value: Gate in [0, 1], one or one for each x: 0 gives the identity, 1 (or None) the
                full map.

        Returns:
            y and log |det dy/dx|.

        Raises:
            DataError: If a shape or dtype does not fit.
        """
        return _on_batch(self, params, jnp.asarray(x), context, g_value, "push")

    def inverse(
        self,
        params: Any,
        y: Given[Float[Array, "*batch dim"]],
        context: Given[Float[Array, "..."] | None] = None,
        g_value: Given[Float[Array, "..."] | None] = None,
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Map y back to x; arguments as in `forward`.

        Returns:
            x and log |det dx/dy|.

        Raises:
            DataError: If a shape or dtype does not fit.
        """
        return _on_batch(self, params, jnp.asarray(y), context, g_value, "pull")


class AbstractFixed(AbstractTransform):
    """A transform that learns nothing and ignores any context."""

    @property
    def context_dim(self) -> None:
        """Ignore any context."""
        return

    def init_params(self, key: Key | None = None, context_dim: int = 0) -> dict[str, Any]:
        """Return {}."""
        return {}


@functools.partial(jax.jit, static_argnames="move")
def _on_batch(transform, params, x, context, gate, move):
    """Move a batch.

    Compiled, because the loops inside are traced anew by every call that is not.
    """
    check_features("x", x, transform.dim)
    batch, order = x.shape[:-1], transform.order
    condition = Condition(
        context_columns(context, transform.context_dim, batch), gate_columns(gate, batch)
    )
    columns = rows_in_order(to_columns(x), order)
    columns, log_det = getattr(transform, move)(params, columns, condition)
    y = from_columns(rows_in_order(columns, inverse_order(order)), batch)
    return y, jnp.broadcast_to(log_det, columns.shape[1:]).reshape(batch)
