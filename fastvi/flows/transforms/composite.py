"""Transforms one after the other."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._errors import ConfigError, DataError
from fastvi._typing import Any, Key
from fastvi.flows._columns import inverse_order, rows_in_order
from fastvi.flows.transforms._plan import make_plan
from fastvi.flows.transforms.base import AbstractTransform
from fastvi.flows.transforms.permutation import Permutation, refuse_gate


class CompositeTransform(AbstractTransform):
    """T_n(... T_1(x)); parameters are a list with an entry for each block.

    Runs of blocks with equal structure, up to the order of their features, are compiled once: their
    parameters are stacked inside the call and a loop goes over them.

    Attributes:
        blocks: The transforms, the first to act first.
    """

    blocks: tuple[AbstractTransform, ...] = eqx.field(converter=tuple)

    def __check_init__(self):
        if not self.blocks:
            raise ConfigError("A CompositeTransform needs at least one block.")
        dims = [block.dim for block in self.blocks]
        if len(set(dims)) > 1:
            raise ConfigError(f"All blocks must have the same dim; they have {dims}.")
        sizes = sorted({block.context_dim for block in self.blocks if block.context_dim})
        if len(sizes) > 1:
            raise ConfigError(
                f"All conditional blocks must have the same context_dim; they have {sizes}."
            )

    @property
    def dim(self) -> int:
        """Count the features."""
        return self.blocks[0].dim

    @property
    def context_dim(self) -> int | None:
        """Return the size of the context that the conditional blocks take."""
        # A block that ignores any context says None, and asks for nothing.
        sizes = (block.context_dim for block in self.blocks if block.context_dim is not None)
        return max(sizes, default=None)

    def init_params(self, key: Key, context_dim: int = 0) -> list[Any]:
        """Return a list with the parameters of each block, all identities."""
        self.check_context_dim(context_dim)
        keys = jax.random.split(key, len(self.blocks))
        return [
            block.init_params(block_key) for block, block_key in zip(self.blocks, keys, strict=True)
        ]

    def push(self, params, columns, condition):
        """Apply the blocks in turn."""
        plan = self._plan(params, condition)
        log_det = jnp.zeros(columns.shape[1], columns.dtype)
        # permutations cost nothing: they are folded into the order of rows between blocks
        columns = rows_in_order(columns, plan.before)
        for segment in plan.segments:

            def step(carry, series, segment=segment):
                columns, log_det = carry
                for core, order, values in zip(segment.cores, segment.orders, series, strict=True):
                    columns, more = core.push(values, columns, condition)
                    columns, log_det = rows_in_order(columns, order), log_det + more
                return columns, log_det

            columns, log_det = _repeat(step, (columns, log_det), segment, params, reverse=False)
            columns = rows_in_order(columns, segment.after)
        return columns, log_det

    def pull(self, params, columns, condition):
        """Undo the blocks, the last first."""
        plan = self._plan(params, condition)
        log_det = jnp.zeros(columns.shape[1], columns.dtype)
        for segment in reversed(plan.segments):

            def step(carry, series, segment=segment):
                columns, log_det = carry
                for core, order, values in reversed(
                    list(zip(segment.cores, segment.orders, series, strict=True))
                ):
                    columns, more = core.pull(
                        values, rows_in_order(columns, inverse_order(order)), condition
                    )
                    log_det = log_det + more
                return columns, log_det

            columns = rows_in_order(columns, inverse_order(segment.after))
            columns, log_det = _repeat(step, (columns, log_det), segment, params, reverse=True)
        return rows_in_order(columns, inverse_order(plan.before)), log_det

    def _plan(self, params: Sequence[Any], condition):
        if not isinstance(params, Sequence) or len(params) != len(self.blocks):
            found = (
                f"{len(params)} entries"
                if isinstance(params, Sequence)
                else f"a {type(params).__name__}"
            )
            raise DataError(
                f"The parameters must be a list with an entry for each of {len(self.blocks)} "
                f"blocks: {found}."
            )
        # A plan folds permutations away, so that they cannot refuse a gate themselves.
        if any(isinstance(block, Permutation) for block in self.blocks):
            refuse_gate(condition)
        return make_plan(self.blocks, params)


def _repeat(step, carry, segment, params, *, reverse):
    """Apply `step` once, or in a loop over the parameters of each core's blocks."""
    series = [[params[index] for index in indices] for indices in segment.indices]
    if len(series[0]) == 1:
        return step(carry, [values[0] for values in series])
    rows = [_rows(values) for values in series]

    def body(carry, row):
        return step(
            carry, [_unpack(part, values[0]) for part, values in zip(row, series, strict=True)]
        ), None

    return jax.lax.scan(body, carry, rows, reverse=reverse)[0]


def _rows(values):
    """Write the parameters of equal blocks in the rows of one array for each dtype.

    One concatenation: XLA compiles one for each leaf, as stacking them needs, for longer than all
    of a layer.
    """
    blocks = [jax.tree_util.tree_leaves(block) for block in values]
    rows = {}
    for dtype in dict.fromkeys(jnp.result_type(leaf) for leaf in blocks[0]):
        flat = [
            jnp.ravel(leaf)
            for leaves in blocks
            for leaf in leaves
            if jnp.result_type(leaf) == dtype
        ]
        rows[dtype.name] = jnp.concatenate(flat).reshape(len(blocks), -1)
    return rows


def _unpack(row, like):
    """Undo `_rows` for one row, with the structure and shapes of `like`."""
    leaves, structure = jax.tree_util.tree_flatten(like)
    read, found = dict.fromkeys(row, 0), []
    for leaf in leaves:
        name = jnp.result_type(leaf).name
        end = read[name] + jnp.size(leaf)
        found.append(row[name][read[name] : end].reshape(jnp.shape(leaf)))
        read[name] = end
    return jax.tree_util.tree_unflatten(structure, found)
