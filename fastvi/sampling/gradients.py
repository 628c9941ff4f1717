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
from fastvi.target.objective import FlatObjective, value_and_grad

# How far, relatively, the size of a block may be from the wanted one to leave few examples over.
# Half leaves up to twice as many over, double makes numbers of blocks less like those asked for.
TOLERANCE = 0.25


class Blocks(NamedTuple):
    """A split of the data into blocks of one size: their examples, and those that are in none."""

    rows: Int[Array | np.ndarray, "blocks block_size"]
    rest: Int[Array | np.ndarray, " rest"]


class Anchor(NamedTuple):
    """The loss about a fixed point: on all data, and on each block alone.

    `excess` is L_n - L_n(w*), and `gradient` that of L_n, in model coordinates. `rows` lists the
    examples of each block; `block_excess`, less L_n(w*) too, and `block_gradient` are theirs.
    """

    displacement: Float[Array, " dim"]
    excess: Scalar
    gradient: Float[Array, " dim"]
    rows: Int[Array, "blocks block_size"]
    block_excess: Float[Array, " blocks"]
    block_gradient: Float[Array, "blocks dim"]


def block_counts(num_data: int, dim: int, settings: SamplerSettings) -> tuple[int, ...]:
    """Return the numbers of blocks to choose from, most first.

    They are powers of two times less than `settings.max_blocks`, down to all data at once. Where
    blocks are named, they are never all data, but where there is no other number.
    """
    if settings.gradients == "full":
        return (1,)
    halvings = range(settings.max_blocks.bit_length() - 1)
    possible = tuple(
        count
        for count in (settings.max_blocks >> halving for halving in halvings)
        if count * settings.min_block <= num_data and count * dim <= settings.table_floats
    )
    return possible if settings.gradients == "blocks" and possible else (*possible, 1)


def block_size(num_data: int, count: int) -> int:
    """Return the size of each of about `count` blocks, which leaves the fewest examples over."""
    if count == 1:
        return num_data
    wanted = num_data / count
    sizes = range(max(1, int((1 - TOLERANCE) * wanted)), int((1 + TOLERANCE) * wanted) + 1)
    # An example that is left over is in no block, so that only the anchor knows it.
    return min(sizes, key=lambda size: (num_data % size, abs(size - wanted)))


def split_data(num_data: int, count: int, seed: int = 0) -> Blocks:
    """Split a random permutation of the examples into blocks of one size, near `count` of them."""
    size = block_size(num_data, count)
    # a permutation, since data are often sorted by class or by length
    order = np.random.default_rng(seed).permutation(num_data).astype(np.int32)
    covered = num_data - num_data % size
    return Blocks(order[:covered].reshape(-1, size), order[covered:])


def excess_and_grad(
    objective: FlatObjective,
    problem: Problem,
    displacement: Float[Array, " dim"],
    reference_loss: Scalar | float = 0.0,
    rows: Int[Array, " rows"] | None = None,
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
    objective: FlatObjective, problem: Problem, displacement, reference_loss, blocks: Blocks
) -> Anchor:
    """Evaluate the loss at the anchor block by block, and so on all data.

    Cost:
        One gradient on all data; `blocks * dim` numbers.
    """
    rows, rest = map(jnp.asarray, blocks)
    # one block after the other: side by side they would take the memory of all data at once
    losses, gradients = jax.lax.map(
        lambda block: excess_and_grad(objective, problem, displacement, reference_loss, block), rows
    )
    excess, gradient = jnp.mean(losses), jnp.mean(gradients, axis=0)
    if rest.size:  # a second trace of the model, where no block size divides the data
        loss, slope = excess_and_grad(objective, problem, displacement, reference_loss, rest)
        share = rest.size / problem.num_data
        excess, gradient = excess + share * (loss - excess), gradient + share * (slope - gradient)
    return Anchor(displacement, excess, gradient, rows, losses, gradients)


def estimate_value_and_grad(
    objective: FlatObjective,
    problem: Problem,
    anchor: Anchor | None,
    reference_loss: Scalar,
    displacement: Float[Array, " dim"],
    block: Int[Array, ""],
    copies: int = 1,
) -> tuple[Scalar, Float[Array, " dim"], Scalar]:
    """Estimate `L_n(w) - L_n(w*)` and the gradient of L_n from one block.

    Without an anchor both are evaluated on all data. With one, both are what the block says, less
    what it says at the anchor, plus what all data say there. That is unbiased over the blocks, but
    for the few examples that are in none, and exact where all examples are alike.

    Args:
        objective: The loss.
        problem: Target and data.
        anchor: Where the blocks are known; None for all data.
        reference_loss: L_n(w*).
        displacement: The point, less w*.
        block: The block to estimate from.
        copies: How many walkers a vmap runs side by side.

    Returns:
        The excess, the gradient, and the potential that this gradient is the exact gradient of as
        long as the block stays.

    References:
        Baker et al., Control variates for stochastic gradient MCMC (2019).
    """
    rows = None if anchor is None else anchor.rows[block]
    excess, gradient = excess_and_grad(
        objective, problem, displacement, reference_loss, rows, copies
    )
    if anchor is None:
        return excess, gradient, excess
    excess += anchor.excess - anchor.block_excess[block]
    # constant while the block stays, so the corrected gradient is that of a linearly tilted loss
    tilt = anchor.gradient - anchor.block_gradient[block]
    surrogate = excess + tilt @ (displacement - anchor.displacement)
    return excess, gradient + tilt, surrogate


def gradient_noise(
    linear_map: LinearMap,
    nbeta: Scalar,
    at_anchor: Float[Array, "blocks dim"],
    at_point: Float[Array, "blocks dim"],
) -> Float[Array, " dim"]:
    """Return the variance over blocks of the anchored gradient of nbeta L, in each direction.

    It is taken in round coordinates. For `count` times fewer blocks it is about `count` times
    smaller.

    Args:
        linear_map: The round coordinates.
        nbeta: n times the inverse temperature.
        at_anchor: Block gradients of L at the anchor.
        at_point: Block gradients of L at the point where the noise is asked for.
    """
    forces = linear_map.pull_back(nbeta * (at_point - at_anchor))
    return jnp.var(forces, axis=0, ddof=1)
