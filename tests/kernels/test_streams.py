"""No two purposes share a counter of a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvi.kernels.noise import normal, split_key, streams
from fastvi.kernels.noise.threefry import fold_in


def blocks_of_steps(steps):
    return {
        int(block): (name, step)
        for step in steps
        for name, first, count in (
            ("noise", streams.step_noise(step), streams.NOISE_BLOCKS),
            ("batch", streams.step_batch(step), 1),
        )
        for block in range(first, first + count)
    }


def test_blocks_of_a_chain_are_disjoint():
    steps = [*range(50), streams.MAX_STEPS - 1]
    used = blocks_of_steps(steps)
    assert len(used) == len(steps) * (streams.NOISE_BLOCKS + 1)
    assert max(used) < streams.START
    assert streams.START + streams.NOISE_BLOCKS <= streams.EVALUATION
    assert streams.EVALUATION + streams.NOISE_BLOCKS <= 2**32


@pytest.mark.parametrize("step", [0, 1, 7, streams.MAX_STEPS - 1])
def test_a_block_knows_its_step(step):
    for block in (streams.step_noise(step), streams.step_noise(step) + 1, streams.step_batch(step)):
        assert streams.step_of(jnp.uint32(block)) == step


KEYS = {
    "small": lambda: jax.random.key(3),
    "large": lambda: jax.random.wrap_key_data(np.array([2**32 - 1, 2**31 + 5], np.uint32)),
    "another kind": lambda: jax.random.key(3, impl="rbg"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_the_host_are_those_of_jax(name):
    """Compiled or traced, threefry or not: the same keys."""
    key, data = KEYS[name](), int(streams.Purpose.WALKERS)
    numbers = jax.random.key_data
    for num in (1, 5):
        expected = jax.random.split(key, num)
        for found in (
            split_key(key, num),
            jax.jit(split_key, static_argnums=1)(key, num),
            jax.jit(lambda num=num: split_key(key, num))(),
        ):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(numbers(found), numbers(expected))
    expected = jax.random.fold_in(key, data)
    for found in (
        fold_in(key, data),
        jax.jit(fold_in, static_argnums=1)(key, data),
        jax.jit(lambda: fold_in(key, data))(),
    ):
        assert (found.shape, found.dtype) == ((), expected.dtype)
        np.testing.assert_array_equal(numbers(found), numbers(expected))


def test_derived_keys_differ_from_each_other_and_from_every_seed():
    key = jax.random.key(3)
    made = [streams.derive(key, purpose) for purpose in streams.Purpose]
    data = {tuple(jax.random.key_data(one).tolist()) for one in [key, *made]}
    assert len(data) == 1 + len(streams.Purpose)
    shared = jax.random.key_data(streams.shared_key())
    # `jax.random.key(seed)` has the words (seed >> 32, seed)
    assert shared[0] != 0
    assert jax.random.key_data(jax.random.key(2**32 - 1))[0] == 0


def test_shared_key_is_the_same_under_every_default_generator():
    before = normal(streams.shared_key(), (4,))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(normal(streams.shared_key(), (4,)), before)


def test_blocks_of_a_walker_are_disjoint():
    steps = [*range(50), 2**31 - 2]
    noise = {int(streams.walker_noise(jnp.asarray(step))) for step in steps}
    data = {int(streams.walker_data(jnp.asarray(step))) for step in steps}
    assert len(noise) == len(data) == len(steps)
    assert streams.MOMENTUM not in noise
    assert max(noise) < min(data)
    assert max(data) < 2**32
