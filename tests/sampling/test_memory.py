"""The programs of a run, from the compiler: nothing runs, and no data are made."""

import jax
import jax.numpy as jnp
import pytest

from fastvi import LocalPosterior, make_flat_objective
from fastvi.families.moments import LinearMap
from fastvi.sampling.gradients import Blocks, make_anchor, split_data
from fastvi.sampling.programs import _build, blank_evaluation
from fastvi.sampling.tuning import first_step_size
from fastvi.sampling.walkers import Walkers
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
    keys = jax.random.split(jax.random.key(0), WALKERS)
    step_size = first_step_size(DIM, jnp.float32)
    walkers = Walkers(linear_map, many, many, many[:, 0], step_size, keys, many[:, 0])
    blocks = Blocks(*map(jnp.asarray, split_data(COUNT, num_blocks)))
    anchor = make_anchor(OBJECTIVE, problem, point, number, blocks) if num_blocks > 1 else None
    steps = map(jnp.int32, (0, 0, 16))
    here = blank_evaluation(walkers, PROGRAMS.columns, is_noisy=anchor is not None)
    return problem, anchor, walkers, here, number, number, number, *steps


PROGRAMS = _build(OBJECTIVE, 0.0, 0.0, (DIM,), 4, 4)


@pytest.mark.usefixtures("fully_optimised")
@pytest.mark.parametrize("num_blocks", [1, 4, 8, 64])
def test_temporaries_of_a_round_are_bounded(num_blocks):
    """At most 64 MiB, and no copy of the 180 MiB of data, however large the blocks."""
    arguments = jax.eval_shape(lambda: round_of_walkers(num_blocks))
    memory = PROGRAMS.advance.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 64 * MEBIBYTE


@pytest.mark.parametrize("num_blocks", [1, 4, 64])
def test_each_program_holds_the_model_once(num_blocks):
    """The net has one layer of tanh, and so has a program."""
    arguments = jax.eval_shape(lambda: round_of_walkers(num_blocks))
    assert PROGRAMS.advance.lower(*arguments).as_text().count("stablehlo.tanh") == 1
    problem, linear_map = arguments[0], arguments[2].linear_map
    blocks = split_data(COUNT, num_blocks)
    lowered = PROGRAMS.anchor.lower(problem, linear_map, linear_map.center, arguments[4], blocks)
    assert lowered.as_text().count("stablehlo.tanh") == 1
