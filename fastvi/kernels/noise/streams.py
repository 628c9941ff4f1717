"""The one map of what the counters of a random key are for.

A threefry key has 2^32 blocks of 2^32 counters each. Whoever draws from a chain's key takes the
blocks that are named here, or a key that `derive` makes for a named purpose. Blocks are used where
a key would be derived again and again, because XLA compiles the hash of each derivation anew.

| blocks of a chain's key | what they hold |
|---|---|
| 3 s, 3 s + 1 | the noise of step s, at most `NOISE_BLOCKS` blocks |
| 3 s + 2 | the minibatch of step s |
| `START` and the next | the start of the family's parameters |
| `EVALUATION` and the next | the draws of the final estimate |

| blocks of a walker's key | what they hold |
|---|---|
| `MOMENTUM` | the momentum that it begins with |
| i + 1 | the noise of step i, of parameters beyond 2^32 in blocks of keys of `LATER_PAGES` |
| 2^31 + j | its block of data, drawn for the j-th time |

A derived key is the hash of one counter of block 0, beyond the `2^31` that the noise of step 0 may
take.
"""

import enum
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Key
from fastvi.kernels.noise.threefry import LATER_PAGES, PAGE, fold_in

NOISE_BLOCKS = 2  # blocks of normals and of labels; a family that needs more raises the period
STEP_PERIOD = NOISE_BLOCKS + 1  # blocks of a step: its noise, and its minibatch
MAX_STEPS = 2**31 // STEP_PERIOD  # their blocks end where those of the start begin
# Blocks of a fit's start and of its evaluation, which never meet those of a step.
START = 2**31
EVALUATION = 2**31 + 2**16
# "fastvi: " in ASCII. The seeds of `jax.random.key` below 2^32 have a first word of zero, and the
# words of a split key are a hash.
SHARED_WORDS = (0x66617374, 0x76693A20)


def step_noise(step: Array | int) -> Array | int:
    """Return the first block of the noise of a step."""
    return STEP_PERIOD * step


def step_batch(step: Array | int) -> Array | int:
    """Return the block of the minibatch of a step."""
    return STEP_PERIOD * step + NOISE_BLOCKS


def step_of(block: Array) -> Array:
    """Return the step to which a block belongs."""
    return block // STEP_PERIOD


MOMENTUM = 0  # block of a walker's first momentum; its steps have those from 1 on


def walker_noise(step: Array) -> Array:
    """Return the block of a walker's noise in a step."""
    return step + 1


def walker_data(number: Array) -> Array:
    """Return the block of the words by which a walker draws its block of data."""
    return jnp.uint32(2**31) + number.astype(jnp.uint32)


class Purpose(enum.IntEnum):
    """What a derived key is for."""

    FLOW_START = 2**31
    PROBES = 2**31 + 1
    RESAMPLING = 2**31 + 2
    WALKERS = 2**31 + 3
    SUBSET = 2**31 + 4
    CURVATURE = 2**31 + 5
    FRAME = 2**31 + 6
    MOMENTS = 2**31 + 7
    CALIBRATION = 2**31 + 8
    DRAWS = 2**31 + 9
    LATER_PAGES = LATER_PAGES


def stretches(sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Return page and counter at which each of several stretches of numbers begins.

    One follows the other, but that each lies in one page.
    """
    found, page, start = [], 0, 0
    for size in sizes:
        if start + size > PAGE:
            page, start = page + 1, 0
        found.append((page, start))
        start += size
    return found


def derive(key: Key, purpose: Purpose) -> Key:
    """Return the key of a purpose, independent of the key's noise and of other purposes."""
    return fold_in(key, int(purpose))


def shared_key() -> Key:
    """Return the key of what all fits share, which no seed of a user gives."""
    words = jax.device_put(np.asarray(SHARED_WORDS, np.uint32))
    return jax.random.wrap_key_data(words, impl="threefry2x32")
