"""Estimates of the gradient of L_n: from all data, or from blocks of the data with an anchor.

The *anchor* is a fixed point at which the gradient of every block is known. A gradient on one block
is corrected by what the same block says at the anchor, which takes most of its noise off.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Int, Scalar
from fastvi.families.moments import LinearMap
from fastvi.sampling.settings import SamplerSettings
from fastvi.target.data import Problem
from fastvi.target.objective import FlatObjective, full_data_value_and_grad, value_and_grad

# How far, relatively, the size of a block may be from the wanted one to leave few examples over.
# Half leaves up to twice as many over, double makes numbers of blocks less like those asked for.
TOLERANCE = 0.25


class Blocks(NamedTuple):
    """A split of the data into blocks of one size: their examples, and those that are in none."""

    rows: Int[Array | np.ndarray, "blocks block_size"]
    rest: Int[Array | np.ndarray, " rest"]


class Anchor(NamedTuple):
    """The loss about a fixed point: on all data, and on each block alone.

    `excess` is L_n less L_n(w*), and `gradient` that of L_n, in model coordinates. `rows` lists the
    examples of each block; `block_loss` and `block_gradient` are theirs.
    """

    displacement: Float[Array, " dim"]
    excess: Scalar
    gradient: Float[Array, " dim"]
    rows: Int[Array, "blocks block_size"]
    block_loss: Float[Array, " blocks"]
    block_gradient: Float[Array, "blocks dim"]


def block_counts(num_data: int, dim: int, settings: SamplerSettings) -> tuple[int, ...]:
    """Return the numbers of blocks to choose from, most first.

    They are powers of two times less than `settings.max_blocks`, down to all data at once.
    """
    halvings = range(settings.max_blocks.bit_length() - 1)
    counts = [settings.max_blocks >> halving for halving in halvings]
    return (
        *(
            count
            for count in counts
            if count * settings.min_block <= num_data and count * dim <= settings.table_floats
        ),
        1,
    )


def block_size(num_data: int, count: int) -> int:
    """Return the size of each of about `count` blocks: that which leaves the fewest examples over."""
    if count == 1:
        return num_data
    wanted = num_data / count
    sizes = range(max(1, int((1 - TOLERANCE) * wanted)), int((1 + TOLERANCE) * wanted) + 1)
    return min(sizes, key=lambda size: (num_data % size, abs(size - wanted)))


def split_data(num_data: int, count: int, seed: int = 0) -> Blocks:
    """Split a random permutation of the examples into blocks of one size, near `count` of them."""
    size = block_size(num_data, count)
    order = np.random.default_rng(seed).permutation(num_data).astype(np.int32)
    covered = num_data - num_data % size
    return Blocks(order[:covered].reshape(-1, size), order[covered:])


def rows_value_and_grad(
    objective: FlatObjective, problem: Problem, displacement, rows: Int[Array, " rows"]
) -> tuple[Scalar, Float[Array, " dim"]]:
    """Evaluate the mean loss of some examples and its gradient."""
    batch = jax.tree_util.tree_map(lambda leaf: leaf[rows], problem.data)
    return value_and_grad(objective, problem.posterior.center + displacement, batch)


def make_anchor(
    objective: FlatObjective, problem: Problem, displacement, reference_loss, blocks: Blocks
) -> Anchor:
    """Evaluate the loss at the anchor block by block, and so on all data.

    Cost:
        One gradient on all data; `blocks * dim` numbers.
    """
    rows, rest = map(jnp.asarray, blocks)
    losses, gradients = jax.lax.map(
        lambda block: rows_value_and_grad(objective, problem, displacement, block), rows
    )
    # differences to the reference are averaged, since the loss itself would cost their digits
    excess, gradient = jnp.mean(losses - reference_loss), jnp.mean(gradients, axis=0)
    if rest.size:
        loss, slope = rows_value_and_grad(objective, problem, displacement, rest)
        share = rest.size / problem.num_data
        excess += share * (loss - reference_loss - excess)
        gradient += share * (slope - gradient)
    return Anchor(displacement, excess, gradient, rows, losses, gradients)


def estimate_value_and_grad(
    objective: FlatObjective,
    problem: Problem,
    anchor: Anchor | None,
    reference_loss: Scalar,
    displacement: Float[Array, " dim"],
    block: Int[Array, ""],
) -> tuple[Scalar, Float[Array, " dim"], Scalar]:
    """Estimate `L_n(w) - L_n(w*)` and the gradient of L_n from one block, or without an anchor evaluate both.

    Both are what the block says, less what it says at the anchor, plus what all data say there:
    unbiased over the blocks (but for the few examples that are in none), exact where all examples
    are alike.

    Returns:
        The excess, the gradient, and the potential that this gradient is the exact gradient of as
        long as the block stays.

    References:
        Baker et al., Control variates for stochastic gradient MCMC (2019).
    """
    if anchor is None:
        point = problem.posterior.center + displacement
        excess, gradient = full_data_value_and_grad(objective, point, problem.data, reference_loss)
        return excess, gradient, excess
    loss, gradient = rows_value_and_grad(objective, problem, displacement, anchor.rows[block])
    excess = anchor.excess + (loss - anchor.block_loss[block])
    tilt = anchor.gradient - anchor.block_gradient[block]
    surrogate = excess + tilt @ (displacement - anchor.displacement)
    return excess, gradient + tilt, surrogate


def gradient_noise(
    linear_map: LinearMap,
    nbeta: Scalar,
    at_anchor: Float[Array, "blocks dim"],
    at_point: Float[Array, "blocks dim"],
) -> Scalar:
    """Return the variance over blocks of the anchored gradient of nbeta L, summed over directions.

    It is taken in round coordinates. For `count` times fewer blocks it is about `count` times
    smaller.

    Args:
        linear_map: The round coordinates.
        nbeta: n times the inverse temperature.
        at_anchor: Block gradients of L at the anchor.
        at_point: Block gradients of L at the point where the noise is asked for.
    """
    forces = linear_map.pull_back(nbeta * (at_point - at_anchor))
    return jnp.sum(jnp.var(forces, axis=0, ddof=1))
