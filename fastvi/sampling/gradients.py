"""Estimates of the gradient of L_n: from all data, or from pairs of blocks of the data.

The *anchor* is a fixed point at which the gradient of every block is known. A gradient on one block
is corrected by what the same block says at the anchor, which takes most of its noise off. A step
takes the mean of two blocks, whose difference shows the noise that is left.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._devices import Axes, gather
from fastvi._typing import Array, Float, Int, Key, Scalar
from fastvi.families.moments import LinearMap
from fastvi.kernels.noise import words
from fastvi.sampling.settings import SamplerSettings
from fastvi.target.data import Problem
from fastvi.target.objective import FlatObjective, value_and_grad

# Blocks that a step takes the mean of: two show the noise. With more, the noise would be known
# better, for as many more rows of a gradient on fewer examples each.
PAIR = 2
NONE = np.zeros(0, np.int32)  # of the examples
# How far, relatively, the size of a block may be from the wanted one to leave few examples over.
# Half leaves up to twice as many over, double makes numbers of blocks less like those asked for.
TOLERANCE = 0.25


class Blocks(NamedTuple):
    """A split of the data.

    Attributes:
        rows: Examples of each block; all blocks have one size.
        rest: Examples that are in no block, and known at the anchor alone.
        kept: Examples that every gradient has, beside its blocks.
    """

    rows: Int[Array | np.ndarray, "blocks block_size"]
    rest: Int[Array | np.ndarray, " rest"]
    kept: Int[Array | np.ndarray, " kept"]


class Anchor(NamedTuple):
    """The loss about a fixed point: on all data but those that are kept, and on each block alone.

    `excess` is that of all blocks and the rest, less L_n(w*), and `gradient` its gradient, in model
    coordinates. `rows` lists the examples of each block; `block_excess`, less L_n(w*) too, and
    `block_gradient` are theirs. `kept` lists the examples that every gradient has.
    """

    displacement: Float[Array, " dim"]
    excess: Scalar
    gradient: Float[Array, " dim"]
    rows: Int[Array, "blocks block_size"]
    block_excess: Float[Array, " blocks"]
    block_gradient: Float[Array, "blocks dim"]
    kept: Int[Array, " kept"]


class GradientEstimate(NamedTuple):
    """What a step is told of the loss at a point, in model coordinates.

    Attributes:
        excess: An estimate of `L_n(w) - L_n(w*)`.
        gradient: An estimate of the gradient of L_n.
        surrogate: The excess that this gradient is the exact gradient of, as long as the data stay.
        spread: A draw of the noise of the gradient, independent of the noise that it has; None
            where it has none.
    """

    excess: Scalar
    gradient: Float[Array, " dim"]
    surrogate: Scalar
    spread: Float[Array, " dim"] | None


def block_counts(num_data: int, dim: int, settings: SamplerSettings) -> tuple[int, ...]:
    """Return the numbers of blocks to choose from, most first.

    They are powers of two times less than `settings.max_blocks`, down to all data at once. Where
    blocks are named, they are never all data, but where there is no other number.
    """
    if settings.gradients == "full":
        return (1,)
    # a pair of fewer than four blocks is more than half of the data
    halvings = range(settings.max_blocks.bit_length() - 2)
    possible = tuple(
        count
        for count in (settings.max_blocks >> halving for halving in halvings)
        if count * settings.min_block <= num_data and count * dim <= settings.table_floats
    )
    return possible if settings.gradients == "blocks" and possible else (*possible, 1)


def draw_pair(key: Key, num_blocks: int, counter: Array | int) -> Int[Array, " pair"]:
    """Draw two different blocks; block 0 alone where all data are one block.

    Uneven by at most blocks / 2^32.

    Args:
        key: Random key.
        num_blocks: The number of blocks.
        counter: Counter of the key: another one gives other blocks.
    """
    if num_blocks == 1:
        return jnp.zeros(1, jnp.int32)
    first, further = words(key, PAIR, block=counter)
    first = first % num_blocks
    second = (first + 1 + further % (num_blocks - 1)) % num_blocks
    return jnp.stack([first, second]).astype(jnp.int32)


def blocks_left_out(num_blocks: int) -> int:
    """Count the blocks that a step does not see, to which the noise of its pair is proportional."""
    return max(num_blocks - PAIR, 0)


def block_size(num_data: int, count: int) -> int:
    """Return the size of each of about `count` blocks, which leaves the fewest examples over."""
    if count == 1:
        return num_data
    wanted = num_data / count
    sizes = range(max(1, int((1 - TOLERANCE) * wanted)), int((1 + TOLERANCE) * wanted) + 1)
    # An example that is left over is in no block, so that only the anchor knows it.
    return min(sizes, key=lambda size: (num_data % size, abs(size - wanted)))


def split_data(
    num_data: int, count: int, kept: Int[np.ndarray, " kept"] = NONE, seed: int = 0
) -> Blocks:
    """Split a random permutation of the examples into blocks of one size, near `count` of them.

    Those that are kept are in none.
    """
    # a permutation, since data are often sorted by class or by length
    order = np.random.default_rng(seed).permutation(num_data).astype(np.int32)
    order = order[~np.isin(order, kept)]
    size = block_size(order.size, count)
    covered = order.size - order.size % size
    return Blocks(order[:covered].reshape(-1, size), order[covered:], kept)


def excess_and_grad(
    objective: FlatObjective,
    problem: Problem,
    displacement: Float[Array, " dim"],
    reference_loss: Scalar | float = 0.0,
    rows: Int[Array, " rows"] | None = None,
    copies: int = 1,
    axis: str | None = None,
) -> tuple[Scalar, Float[Array, " dim"]]:
    """Evaluate the mean loss above `reference_loss`, and its gradient.

    Args:
        objective: The loss.
        problem: Target and data.
        displacement: The point, less w*.
        reference_loss: What is taken off each slice's mean, which keeps float32 accurate.
        rows: The examples; all when left out.
        copies: How many walkers a vmap runs side by side.
        axis: As in `AbstractData.mean`.
    """
    point = problem.posterior.center + displacement

    def of_slice(batch):
        loss, gradient = value_and_grad(objective, point, batch)
        return loss - reference_loss, gradient

    return problem.data.mean(of_slice, rows, copies, axis)


def make_anchor(
    objective: FlatObjective,
    problem: Problem,
    displacement,
    reference_loss,
    blocks: Blocks,
    axes: Axes = Axes(),
) -> Anchor:
    """Evaluate the loss at the anchor block by block, and so on all data.

    Devices along `axes` divide the blocks, and each holds the whole anchor.

    Cost:
        One gradient on all data; `blocks * dim` numbers.
    """
    rows, rest, kept = map(jnp.asarray, blocks)
    # one block after the other: side by side they would take the memory of all data at once
    losses, gradients = jax.lax.map(
        lambda block: excess_and_grad(objective, problem, displacement, reference_loss, block),
        _own_part(rows, axes),
    )
    for name in reversed(axes.names):  # parts lie as devices do, the first axis slowest
        losses, gradients = gather(losses, name), gather(gradients, name)
    losses, gradients = losses[: rows.shape[0]], gradients[: rows.shape[0]]
    excess, gradient = jnp.mean(losses), jnp.mean(gradients, axis=0)
    if rest.size:  # a second trace of the model, where no block size divides the data
        loss, slope = excess_and_grad(objective, problem, displacement, reference_loss, rest)
        share = rest.size / (rows.size + rest.size)
        excess, gradient = excess + share * (loss - excess), gradient + share * (slope - gradient)
    return Anchor(displacement, excess, gradient, rows, losses, gradients, kept)


def _own_part(rows: Int[Array, "blocks size"], axes: Axes) -> Int[Array, "some size"]:
    """Return this device's part of the blocks; the last parts are filled up with the first."""
    place, devices = jnp.int32(0), 1
    for name in axes.names:
        size = jax.lax.axis_size(name)
        place, devices = place * size + jax.lax.axis_index(name), devices * size
    share = -(-rows.shape[0] // devices)
    return rows[(place * share + jnp.arange(share)) % rows.shape[0]]


def estimate_gradient(
    objective: FlatObjective,
    problem: Problem,
    anchor: Anchor | None,
    reference_loss: Scalar,
    displacement: Float[Array, " dim"],
    blocks: Int[Array, " pair"],
    copies: int = 1,
    axis: str | None = None,
) -> GradientEstimate:
    """Estimate `L_n(w) - L_n(w*)` and the gradient of L_n from a pair of blocks.

    Without an anchor both are evaluated on all data. With one, both are the mean of what the two
    blocks say, less what they say at the anchor, plus what all data say there. That is unbiased
    over the blocks, but for the few examples that are in none, and exact where all examples are
    alike. Examples that are kept are evaluated beside them, and weigh what they do in all data.

    Args:
        objective: The loss.
        problem: Target and data.
        anchor: Where the blocks are known; None for all data.
        reference_loss: L_n(w*).
        displacement: The point, less w*.
        blocks: The blocks to estimate from.
        copies: How many evaluations run side by side: those of all walkers on all their blocks.
        axis: As in `AbstractData.mean`: its devices divide the examples of each block.

    References:
        Baker et al., Control variates for stochastic gradient MCMC (2019).
    """
    if anchor is None:
        excess, gradient = excess_and_grad(
            objective, problem, displacement, reference_loss, None, copies, axis
        )
        return GradientEstimate(excess, gradient, excess, None)

    def on_block(block):
        excess, gradient = excess_and_grad(
            objective, problem, displacement, reference_loss, anchor.rows[block], copies, axis
        )
        excess += anchor.excess - anchor.block_excess[block]
        # constant while the block stays, so the corrected gradient is that of a tilted loss
        tilt = anchor.gradient - anchor.block_gradient[block]
        return excess, gradient + tilt, excess + tilt @ (displacement - anchor.displacement)

    excess, gradients, surrogate = jax.vmap(on_block)(blocks)
    # blocks of a pair differ, so that its mean has less noise than their difference shows
    unseen = 1 - PAIR / anchor.rows.shape[0]
    spread = jnp.sqrt(unseen).astype(gradients.dtype) * 0.5 * (gradients[0] - gradients[1])
    estimate = GradientEstimate(
        jnp.mean(excess), jnp.mean(gradients, 0), jnp.mean(surrogate), spread
    )
    if not anchor.kept.size:
        return estimate
    # too few to be divided
    share = anchor.kept.size / problem.num_data
    of_blocks = jax.tree_util.tree_map(lambda leaf: (1 - share) * leaf, estimate)
    excess, gradient = excess_and_grad(
        objective, problem, displacement, reference_loss, anchor.kept, copies
    )
    return of_blocks._replace(
        excess=of_blocks.excess + share * excess,
        gradient=of_blocks.gradient + share * gradient,
        surrogate=of_blocks.surrogate + share * excess,
    )


def block_variances(
    linear_map: LinearMap,
    nbeta: Scalar,
    at_anchor: Float[Array, "blocks dim"],
    at_point: Float[Array, "blocks dim"],
    is_about_mean: bool = True,
) -> Float[Array, " blocks"]:
    """Return each block's part in the variance of the anchored gradient of nbeta L.

    The variance is over blocks and all directions, in round coordinates, and the sum of the parts.
    For `count` times fewer blocks it is about `count` times smaller, and that of the mean of two
    blocks is half.

    Args:
        linear_map: The round coordinates.
        nbeta: n times the inverse temperature.
        at_anchor: Block gradients of L at the anchor.
        at_point: Block gradients of L at the point where the noise is asked for.
        is_about_mean: Whether the mean of the blocks is taken off. One that is far off would move
            the mean of few.
    """
    forces = linear_map.pull_back(nbeta * (at_point - at_anchor))
    mean = jnp.mean(forces, axis=0) if is_about_mean else 0.0
    return jnp.sum((forces - mean) ** 2, axis=1) / (forces.shape[0] - 1)
