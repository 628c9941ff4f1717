"""Gradients on blocks of the data, corrected by what the same blocks say at an anchor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Int, Scalar
from fastvi.target.data import Problem
from fastvi.target.objective import FlatObjective, value_and_grad

MAX_BLOCKS = 64
MIN_BLOCK = 16  # examples
TABLE_FLOATS = 2**27  # bound on what the anchor keeps: a gradient for each block
TOLERANCE = (
    0.25  # how far the size of a block may be from the wanted one to leave few examples over
)


class Anchor(NamedTuple):
    """The loss about a fixed point: on all data, and on each block alone.

    `excess` is L - L_n(w*) and `gradient` that of L, in model coordinates; `block_*` have a leading
    axis of blocks. `index` lists the examples of each block. One block means all data, and then
    nothing of this is used.
    """

    displacement: Float[Array, " dim"]
    excess: Scalar
    gradient: Float[Array, " dim"]
    index: Int[Array, "blocks block_size"]
    block_loss: Float[Array, " blocks"]
    block_gradient: Float[Array, "blocks dim"]


def block_counts(num_data: int, dim: int) -> tuple[int, ...]:
    """Return the numbers of blocks to choose from, most first.

    Powers of two down to all data at once.
    """
    counts, count = [], MAX_BLOCKS
    while count > 1:
        if count * MIN_BLOCK <= num_data and count * dim <= TABLE_FLOATS:
            counts.append(count)
        count //= 2
    return (*counts, 1)


def block_size(num_data: int, count: int) -> int:
    """Return the size of each of about `count` blocks."""
    if count == 1:
        return num_data
    wanted = num_data / count
    sizes = range(max(1, int((1 - TOLERANCE) * wanted)), int((1 + TOLERANCE) * wanted) + 1)
    return min(sizes, key=lambda s: (num_data % s, abs(s - wanted)))


def split_data(num_data: int, count: int, seed: int = 0) -> Int[np.ndarray, "blocks block_size"]:
    """Split a random permutation of the examples into blocks of one size, near `count` of them.

    The size within `TOLERANCE` that leaves the fewest examples over is taken; what is left over is
    in no block.
    """
    if count == 1:
        return np.arange(num_data, dtype=np.int32)[None]
    size = block_size(num_data, count)
    blocks = num_data // size
    order = np.random.default_rng(seed).permutation(num_data)[: blocks * size]
    return order.reshape(blocks, size).astype(np.int32)


def excess_and_grad(
    objective: FlatObjective,
    problem: Problem,
    displacement: Float[Array, " dim"],
    reference_loss: Scalar | float = 0.0,
    rows: Int[Array, " block_size"] | None = None,
    copies: int = 1,
) -> tuple[Scalar, Float[Array, " dim"]]:
    """Evaluate the mean loss above `reference_loss`, and its gradient.

    Args:
        objective: The loss.
        problem: Target and data.
        displacement: The point, less w*.
        reference_loss: What is taken off each slice's mean, which keeps float32 accurate.
        rows: The examples; all when left out.
        copies: How many walkers a vmap runs side by side.
    """
    point = problem.posterior.center + displacement

    def of_slice(batch):
        loss, gradient = value_and_grad(objective, point, batch)
        return loss - reference_loss, gradient

    return problem.data.mean(of_slice, rows, copies)


def make_anchor(
    objective: FlatObjective, problem: Problem, displacement, reference_loss, index
) -> Anchor:
    """Evaluate the loss at the anchor, on all data and block by block.

    Cost:
        Two gradients on all data; none where there is one block.
    """
    if index.shape[0] == 1:
        zero = jnp.zeros_like(displacement)
        return Anchor(displacement, zero[0], zero, index[:, :0], zero[:1], zero[None])
    excess, gradient = excess_and_grad(objective, problem, displacement, reference_loss)
    losses, gradients = jax.lax.map(
        lambda rows: excess_and_grad(objective, problem, displacement, rows=rows), index
    )
    return Anchor(displacement, excess, gradient, index, losses, gradients)


def anchored_value_and_grad(
    objective: FlatObjective,
    problem: Problem,
    anchor: Anchor,
    reference_loss: Scalar,
    displacement: Float[Array, " dim"],
    block: Int[Array, ""],
    copies: int = 1,
) -> tuple[Scalar, Float[Array, " dim"], Scalar]:
    """Estimate `L_n(w) - L_n(w*)` and the gradient of L_n from one block.

    Both are what the block says, less what it says at the anchor, plus what all data say there:
    unbiased over the blocks (but for the few examples that are in none), exact where all examples
    are alike.

    Returns:
        The excess, the gradient, and the potential that this gradient is the exact gradient of as
        long as the block stays.
    """
    if anchor.block_loss.shape[0] == 1:
        excess, gradient = excess_and_grad(
            objective, problem, displacement, reference_loss, copies=copies
        )
        return excess, gradient, excess
    loss, gradient = excess_and_grad(
        objective, problem, displacement, rows=anchor.index[block], copies=copies
    )
    excess = anchor.excess + (loss - anchor.block_loss[block])
    tilt = anchor.gradient - anchor.block_gradient[block]
    surrogate = excess + tilt @ (displacement - anchor.displacement)
    return excess, gradient + tilt, surrogate


def gradient_noise(
    objective: FlatObjective,
    problem: Problem,
    anchor: Anchor,
    displacements: Float[Array, "points dim"],
    pull_back,
) -> Scalar:
    """Return the variance over blocks of `pull_back` of the anchored gradient of nbeta L, summed over coordinates.

    Averaged over the points; for `count` times fewer blocks it is about `count` times smaller.

    Cost:
        A gradient on all data for each point.
    """

    def one(displacement):
        def deviation(inputs):
            rows, at_anchor = inputs
            gradient = excess_and_grad(objective, problem, displacement, rows=rows)[1]
            return pull_back(problem.posterior.nbeta * (gradient - at_anchor))

        deviations = jax.lax.map(deviation, (anchor.index, anchor.block_gradient))
        return jnp.sum(jnp.var(deviations, axis=0, ddof=1))

    return jnp.mean(jax.lax.map(one, displacements))
