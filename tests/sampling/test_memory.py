"""The memory of a round of walkers, from the compiler: nothing runs, and no data are made."""

import jax
import jax.numpy as jnp
import pytest

from fastvi import LocalPosterior, make_flat_objective
from fastvi.families.base import LinearMap
from fastvi.sampling.dynamics import Walker, start_tuning
from fastvi.sampling.gradients import make_anchor
from fastvi.sampling.walkers import Walk, _build
from fastvi.target.data import Problem, hold

COUNT, INPUTS, HIDDEN, CLASSES, WALKERS = 60_000, 784, 64, 10, 8
DIM = (INPUTS + 1) * HIDDEN + (HIDDEN + 1) * CLASSES
MEBIBYTE = 2**20


def network(w, batch):
    """Cross entropy of a tanh net 784-64-10."""
    first, w = w[: INPUTS * HIDDEN].reshape(INPUTS, HIDDEN), w[INPUTS * HIDDEN :]
    hidden, w = jnp.tanh(batch[0] @ first + w[:HIDDEN]), w[HIDDEN:]
    logits = hidden @ w[:-CLASSES].reshape(HIDDEN, CLASSES) + w[-CLASSES:]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=-1)
    return -jnp.mean(chosen)


OBJECTIVE = make_flat_objective(network)


def round_of_walkers(num_blocks):
    """The arguments of a round."""
    point, number = jnp.zeros(DIM), jnp.zeros(())
    data = hold((jnp.zeros((COUNT, INPUTS)), jnp.zeros(COUNT, jnp.int32)))
    problem = Problem(LocalPosterior(point, number, number), data, 64)
    linear_map = LinearMap(point, point, point[None], jnp.zeros((1, 1)))
    many = jnp.zeros((WALKERS, DIM))
    walkers = Walker(many, many, many, many[:, 0], many[:, 0])
    keys = jax.random.split(jax.random.key(0), WALKERS)
    walk = Walk(linear_map, walkers, start_tuning(DIM, jnp.float32), keys)
    blocks = jnp.zeros((num_blocks, COUNT // num_blocks), jnp.int32)
    anchor = make_anchor(OBJECTIVE, problem, point, number, blocks)
    return problem, anchor, walk, number, number, number, jnp.int32(0)


@pytest.mark.usefixtures("fully_optimised")
@pytest.mark.parametrize("num_blocks", [1, 2, 8, 64])
def test_temporaries_of_a_round_are_bounded(num_blocks):
    """At most 64 MiB, and no copy of the 180 MiB of data, however large the blocks."""
    arguments = jax.eval_shape(lambda: round_of_walkers(num_blocks))
    advance = _build(OBJECTIVE, (DIM,)).advance
    memory = advance.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 64 * MEBIBYTE
