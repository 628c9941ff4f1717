"""What a family tells the optimiser: sparse gradients and the treatment of each parameter."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Int, PyTree, Scalar


class Blocks(NamedTuple):
    """A sparse gradient of low rank: nonzero only in the slices `index` of axis 0.

    Slice b is the matrix `sum_t left[b, t] right[b, t]^T`, one for each independent draw. The true
    gradient is the mean over those slices. Norms and steps need no array of a matrix's size.
    """

    index: Int[Array, " blocks"]
    left: Float[Array, "blocks terms rank"]
    right: Float[Array, "blocks terms dim"]

    @property
    def dtype(self):
        """Return the floating dtype."""
        return self.left.dtype

    def scaled(self, factor: Array | float) -> "Blocks":
        """Multiply by a number, or by one for each row of each matrix, shape (blocks, 1, rank)."""
        # A factor on the left side is one on the products, and that side is the short one.
        return self._replace(left=self.left * factor)

    def row_squares(self) -> Float[Array, "blocks rank"]:
        """Return the squared norm of every row."""
        # |sum_t l_t r_t|^2 = sum_ts l_t l_s (r_t . r_s), so no matrix is written out.
        inner = jnp.einsum("btd,bsd->bts", self.right, self.right)
        squares = jnp.einsum("btr,bsr,bts->br", self.left, self.left, inner)
        return jnp.maximum(squares, 0.0)  # where the terms cancel, rounding goes below zero

    def square_norm(self) -> Scalar:
        """Sum the squares of all entries."""
        return jnp.sum(self.row_squares())


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
