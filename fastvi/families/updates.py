"""What a family tells the optimiser: sparse gradients and the treatment of each parameter."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Int, PyTree, Scalar


class Outer(NamedTuple):
    """Matrices of low rank, `sum_t left[b, t] right[b, t]^T` for block b.

    Their norms need no array of a matrix's size.
    """

    left: Float[Array, "blocks terms rank"]
    right: Float[Array, "blocks terms dim"]

    def row_squares(self) -> Float[Array, "blocks rank"]:
        """Return the squared norm of every row."""
        inner = jnp.einsum("btd,bsd->bts", self.right, self.right)
        squares = jnp.einsum("btr,bsr,bts->br", self.left, self.left, inner)
        return jnp.maximum(squares, 0.0)  # where the terms cancel, rounding goes below zero


class Blocks(NamedTuple):
    """A sparse gradient: nonzero only in the slices `index` of axis 0.

    `values` holds one slice for each independent draw. The true gradient is the mean over those
    slices.
    """

    index: Int[Array, " blocks"]
    values: Float[Array, "blocks ..."] | Outer

    @property
    def dtype(self):
        """Return the floating dtype."""
        return jax.tree_util.tree_leaves(self.values)[0].dtype

    def scaled(self, factor: Array | float) -> "Blocks":
        """Multiply by a number, or an `Outer` by one for each entry of its left vectors."""
        if isinstance(self.values, Outer):
            return self._replace(values=self.values._replace(left=self.values.left * factor))
        return self._replace(values=self.values * factor)

    def square_norm(self) -> Scalar:
        """Sum the squares of all entries."""
        squares = self.values.row_squares() if isinstance(self.values, Outer) else self.values**2
        return jnp.sum(squares)


class UpdateRules(NamedTuple):
    """How the optimiser treats each parameter: pytrees in the structure of the parameters.

    Attributes:
        rates: Factor on the learning rate.
        shared_rows: Whether a row (the last axis) shares one second moment.
        blocked: Whether `ascent` gives the gradient as `Blocks`, worth it while a step has few
            independent draws.
        damping: Size of a gradient below which steps shrink with it.
        per_component: Whether the first axis counts the components of a mixture, which pruning
            resets one by one.
    """

    rates: PyTree
    shared_rows: PyTree
    blocked: PyTree
    damping: PyTree
    per_component: PyTree

    @classmethod
    def plain(cls, params: PyTree, rate: float = 1.0, damping: float = 1e-8) -> "UpdateRules":
        """Return the rules of plain Adam, the same for every parameter of `params`."""

        def each(value):
            return jax.tree_util.tree_map(lambda _: value, params)

        return cls(each(rate), each(False), each(False), each(damping), each(False))
