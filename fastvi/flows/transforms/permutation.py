"""A fixed permutation of the features."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._typing import Any, Key
from fastvi.flows._columns import Condition, Order, inverse_order, rows_in_order
from fastvi.flows.transforms.base import AbstractFixed


def _as_order(perm: Any) -> Order:
    array = np.asarray(perm)
    if array.ndim != 1 or not np.array_equal(np.sort(array), np.arange(array.size)):
        raise ConfigError(f"perm must hold each of 0 .. dim-1 once, not {array!r}.")
    return tuple(int(i) for i in array)


class Permutation(AbstractFixed):
    """y_i = x_perm[i].

    Attributes:
        perm: Index of the feature that comes to each place.
    """

    perm: Order = eqx.field(static=True, converter=_as_order)

    @property
    def dim(self) -> int:
        """Count the features."""
        return len(self.perm)

    def push(self, params, columns, condition):
        """Permute the rows."""
        refuse_gate(condition)
        return rows_in_order(columns, self.perm), jnp.zeros(columns.shape[1], columns.dtype)

    def pull(self, params, columns, condition):
        """Permute the rows back."""
        refuse_gate(condition)
        return rows_in_order(columns, inverse_order(self.perm)), jnp.zeros(
            columns.shape[1], columns.dtype
        )

    @classmethod
    def create(cls, key: Key | None, perm: Any) -> tuple["Permutation", dict[str, Any]]:
        """Return the permutation and its parameters, {}."""
        return cls(perm), {}


def refuse_gate(condition: Condition) -> None:
    """Raise DataError if a gate is given."""
    if condition.gate is not None:
        raise DataError(
            "A permutation cannot be gated: nothing lies between it and the identity. Leave it out."
        )
