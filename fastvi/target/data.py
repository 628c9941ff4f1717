"""The target with its data, and what is read of both."""

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._typing import Array, Batch, Float, Key
from fastvi.kernels.noise import NOISE_BLOCKS, words
from fastvi.target.objective import FlatObjective, value_and_grad
from fastvi.target.posterior import LocalPosterior


class Problem(eqx.Module):
    """The target and the data that minibatches come from.

    All of it or, of a stream, a window of uniform draws.
    """

    posterior: LocalPosterior
    data: Batch
    num_data: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)

    @property
    def num_rows(self) -> int:
        """Count the examples at hand."""
        return jax.tree_util.tree_leaves(self.data)[0].shape[0]

    @property
    def holds_all(self) -> bool:
        """Whether all data are at hand."""
        return self.num_rows == self.num_data

    def next_batch(self, key: Key, block: Array | int = 0) -> Batch:
        """Draw a minibatch with replacement, or return all data when the batch is that large.

        A window is used up from a place of the key's own on: its examples are independent draws
        already, and reusing them would draw q towards the minimum of the window's loss.
        """
        if self.batch_size >= self.num_data:
            return self.data
        if not self.holds_all:
            first = words(key, 1)[0] % jnp.uint32(self.num_rows)
            used = jnp.asarray(block, jnp.uint32) // (NOISE_BLOCKS + 1) * self.batch_size
            index = (
                first + (used + jnp.arange(self.batch_size, dtype=jnp.uint32)) % self.num_rows
            ) % self.num_rows
            return jax.tree_util.tree_map(lambda leaf: leaf[index.astype(jnp.int32)], self.data)
        # uneven by at most num_data / 2^32, and a third of the work of randint
        index = (words(key, self.batch_size, block=block) % jnp.uint32(self.num_data)).astype(
            jnp.int32
        )
        return jax.tree_util.tree_map(lambda leaf: leaf[index], self.data)


def evaluate_target(
    objective: FlatObjective,
    posterior: LocalPosterior,
    displacement: Float[Array, "draws dim"],
    batch: Batch,
) -> tuple[Float[Array, " draws"], Float[Array, "draws dim"]]:
    """Evaluate log p and its gradient at every draw, on one batch."""

    def one(v):
        loss, grad = value_and_grad(objective, posterior.center + v, batch)
        value, slope = posterior.log_density(v, loss), posterior.log_density_grad(v, grad)
        return value.astype(v.dtype), slope.astype(v.dtype)  # the loss may know float64 alone

    if displacement.shape[0] == 1:
        value, grad = one(displacement[0])
        return value[None], grad[None]
    return jax.vmap(one)(displacement)
