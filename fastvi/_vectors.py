"""A vector in the arrays of a model, where these are divided over devices.

Elsewhere a vector of parameters is one flat array. Formulas are written once: arithmetic and the
functions of this file take either.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Leaves:
    """The arrays of one vector, or of one vector for each walker, then with an axis of walkers.

    Arithmetic is array by array; other numbers, and vectors of one number for each array, are
    broadcast.
    """

    arrays: tuple[Any, ...]
    __array_ufunc__ = None  # numpy leaves arithmetic to this class

    @property
    def size(self) -> int:
        """Count the numbers."""
        return sum(math.prod(array.shape) for array in self.arrays)

    @property
    def dtype(self) -> Any:
        """Return the type that all arrays have."""
        return self.arrays[0].dtype

    def __add__(self, other: Any) -> "Leaves":
        return self._with(operator.add, other)

    def __radd__(self, other: Any) -> "Leaves":
        return self._with(operator.add, other)

    def __sub__(self, other: Any) -> "Leaves":
        return self._with(operator.sub, other)

    def __mul__(self, other: Any) -> "Leaves":
        return self._with(operator.mul, other)

    def __rmul__(self, other: Any) -> "Leaves":
        return self._with(operator.mul, other)

    def __truediv__(self, other: Any) -> "Leaves":
        return self._with(operator.truediv, other)

    def __rtruediv__(self, other: Any) -> "Leaves":
        return self._with(lambda mine, number: number / mine, other)

    def __pow__(self, other: Any) -> "Leaves":
        return self._with(operator.pow, other)

    def __neg__(self) -> "Leaves":
        return jax.tree_util.tree_map(operator.neg, self)

    def __abs__(self) -> "Leaves":
        return jax.tree_util.tree_map(abs, self)

    def __matmul__(self, other: "Leaves") -> Any:
        # sums of products: an array that is joined to a vector for a dot would be gathered
        return sum_entries(self * other)

    def _with(self, function: Callable[[Any, Any], Any], other: Any) -> "Leaves":
        if isinstance(other, Leaves):
            return Leaves(tuple(map(function, self.arrays, other.arrays)))
        return Leaves(tuple(function(array, other) for array in self.arrays))


def sum_entries(vector: Any) -> Any:
    """Return the sum of the numbers of a vector."""
    if isinstance(vector, Leaves):
        return functools.reduce(operator.add, map(jnp.sum, vector.arrays))
    return jnp.sum(vector)


def sum_rows(vectors: Any) -> Any:
    """Return the sum of each walker's vector."""
    if isinstance(vectors, Leaves):
        return jax.vmap(sum_entries)(vectors)
    return jnp.sum(vectors, axis=-1)


def scale_rows(factors: Any, vectors: Any) -> Any:
    """Multiply each walker's vector by a number of its own."""
    if isinstance(vectors, Leaves):
        return jax.vmap(operator.mul)(factors, vectors)
    return factors[:, None] * vectors


def shape_of(vectors: Any) -> tuple[int, int]:
    """Return the number of walkers, and of the parameters of each."""
    if isinstance(vectors, Leaves):
        walkers = vectors.arrays[0].shape[0]
        return walkers, vectors.size // walkers
    return vectors.shape
