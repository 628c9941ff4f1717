"""Walkers around models in half precision: what they hold, and how losses are paired."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

from fastvi import LocalPosterior
from fastvi.evaluation.llc import losses_at
from fastvi.families.moments import LinearMap
from fastvi.sampling.from_localizer.batches import DrawnReader
from fastvi.sampling.from_localizer.steps import RoundInputs, blank_state, minibatch_programs
from fastvi.sampling.gradients import Blocks, make_anchor, split_data
from fastvi.sampling.programs import _build, blank_evaluation
from fastvi.sampling.tuning import first_step_size
from fastvi.sampling.walkers import Walkers
from fastvi.target.data import Problem, hold
from fastvi.target.fingerprint import fingerprint_loss
from fastvi.target.ravel import ravel_loss

COUNT, DIM, WALKERS, STEPS = 64, 6, 4, 8
RNG = np.random.default_rng(0)
X = RNG.normal(size=(COUNT, DIM)).astype(np.float32)
DATA = tuple(jnp.asarray(array) for array in (X, np.float32(RNG.normal(size=COUNT))))
PARAMS = {"w": jnp.asarray(RNG.normal(size=DIM), jnp.float32)}
NARROW = {"w": PARAMS["w"].astype(jnp.bfloat16)}


def squares(params, batch):
    return 0.5 * (batch[0].astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16) - batch[1]) ** 2


LOSSES = {
    "casts inside": (lambda p, b: jnp.mean(squares(p, b)), PARAMS),
    "one for each example in bfloat16": (lambda p, b: squares(p, b).astype(jnp.bfloat16), PARAMS),
    "parameters in bfloat16": (lambda p, b: jnp.mean(squares(p, b)), NARROW),
}


def target(loss, params):
    objective, center = ravel_loss(loss, params)
    posterior = LocalPosterior(center, jnp.float32(20), jnp.float32(1))
    return objective, Problem(posterior, hold(DATA), 8)


def floats_of(shapes):
    """Return the floating dtypes of a tree."""
    dtypes = (leaf.dtype for leaf in jax.tree_util.tree_leaves(shapes))
    return {str(dtype) for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}


def from_a_fit(objective, problem):
    """Return the shapes of all that a round of walkers on blocks holds and hands on."""
    point, number = problem.posterior.center, jnp.zeros(())
    many = jnp.zeros((WALKERS, DIM))
    linear_map = LinearMap(point, jnp.ones(DIM), point[None], jnp.zeros((1, 1)))
    keys = jax.random.split(jax.random.key(0), WALKERS)
    step_size = first_step_size(DIM, jnp.float32)
    walkers = Walkers(linear_map, many, many, many[:, 0], step_size, keys, many[:, 0])
    programs = _build(objective, 0.0, 0.0, (DIM,), 4, 4)
    blocks = Blocks(*map(jnp.asarray, split_data(COUNT, 4)))
    anchor = jax.eval_shape(lambda: make_anchor(objective, problem, point, number, blocks))
    here = blank_evaluation(walkers, programs.columns, is_noisy=True)
    steps = map(jnp.int32, (0, 0, STEPS))
    rest = number, number, number, *steps
    return anchor, jax.eval_shape(programs.advance, problem, anchor, walkers, here, *rest)


def from_the_localizer(objective, problem):
    """Return the same of walkers on fresh minibatches."""
    source = DrawnReader(problem.data.examples, 8).first
    loss, posterior = fingerprint_loss(objective, problem), problem.posterior
    programs = minibatch_programs(objective, loss, posterior, source, STEPS)
    keys = jax.random.split(jax.random.key(0), WALKERS)
    anchor = jax.eval_shape(programs.full_gradient, problem)
    inputs = RoundInputs(posterior, jnp.ones(DIM), source, anchor, keys, jnp.int32(1))
    sizes = jnp.float32(0.1), jnp.float32(2.0), jnp.int32(0), jnp.int32(0), jnp.int32(STEPS)
    state = blank_state((WALKERS, DIM), np.dtype(np.float32))
    return anchor, jax.eval_shape(programs.advance, inputs, state, *sizes)


@pytest.mark.parametrize("walk", [from_a_fit, from_the_localizer])
@pytest.mark.parametrize("name", LOSSES)
def test_walkers_are_in_single_precision(name, walk):
    objective, problem = target(*LOSSES[name])
    assert floats_of(walk(objective, problem)) == {"float32"}


@pytest.mark.parametrize("name", ["casts inside", "one for each example in bfloat16"])
def test_losses_are_summed_and_paired_in_single_precision(name):
    """All losses are multiples of 1/8 that bfloat16 holds; their sums and means it does not."""
    rng = np.random.default_rng(1)
    halves = rng.integers(-2, 3, size=(4, DIM)) / 2
    points = halves[0] + np.concatenate([np.zeros((1, DIM)), halves[1:]])
    inputs = np.eye(DIM)[rng.integers(DIM, size=COUNT)]
    outputs = rng.integers(-2, 3, size=COUNT) / 2
    means = (0.5 * (points @ inputs.T - outputs) ** 2).mean(axis=1)
    objective, _ = ravel_loss(LOSSES[name][0], PARAMS)
    center, *others = (jnp.asarray(point, jnp.float32) for point in points)
    batch = tuple(jnp.asarray(array, jnp.float32) for array in (inputs, outputs))
    v = jnp.stack(others) - center
    found = quick_jit(lambda v: losses_at(objective, center, v, batch))(v)
    assert found.excess.dtype == found.slope.dtype == jnp.float32
    assert np.any(means != np.asarray(means, jnp.bfloat16))
    np.testing.assert_allclose(found.excess, means[1:] - means[0], rtol=1e-6)


def test_parameters_in_half_precision_are_raised_without_being_moved():
    objective, problem = target(*LOSSES["parameters in bfloat16"])
    center = problem.posterior.center
    assert center.dtype == jnp.float32
    np.testing.assert_array_equal(center, np.asarray(NARROW["w"], np.float32))
    assert objective.structure.unravel(center)["w"].dtype == jnp.bfloat16
    # a step that bfloat16 does not resolve is a step of the walkers, and none of the model
    short = center * (1 + 2.0**-12)
    assert np.all(np.asarray(short) != np.asarray(center))
    np.testing.assert_array_equal(objective.structure.unravel(short)["w"], NARROW["w"])
