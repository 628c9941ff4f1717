"""Inlined threefry: XLA fuses the counter hash with the inverse error function and its consumer.

Measured on CPU at 1e3 to 1e5 normals: 2 to 4 times as fast as jax.random.normal, whose hash is a
loop there.

A key has 2^32 blocks of 2^32 counters each. Block 0 holds the bits of jax.random; the others are
independent streams that need no `fold_in`, whose own hash would be compiled again wherever a key is
derived.
"""

import functools
import math

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Key, Keys, UInt32

# Rotation distances of Threefry-2x32 by Salmon et al.; four rounds take one row.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PAGE = 2**32  # counters of a block
# Counter of block 0 by which the keys of further pages are derived, in the map of `streams`.
LATER_PAGES = 2**31 + 10
# The parity word of Skein: no schedule is all zeros, whatever the key.
_PARITY = np.uint32(0x1BD11BDA)


def normal(
    key: Key, shape: tuple[int, ...], dtype=jnp.float32, *, block: Array | int = 0
) -> Float[Array, "..."]:
    """Draw standard normals.

    Those of block 0 have the bits of `jax.random.normal(key, shape, dtype)`.

    Falls back to jax.random unless the key is a single threefry2x32 key under partitionable
    counters (jax's default) and the dtype float32 or float64.

    References:
        Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """
    pair, size, dtype = _threefry_words(key), math.prod(shape), np.dtype(dtype)
    fits = 0 < size < 2**32 and dtype in (np.float32, np.float64)
    if pair is None or not fits:
        return jax.random.normal(_block_key(key, block), shape, dtype)
    # XLA vectorizes on CPUs only where their number is even, which saves six sevenths of the time:
    # the last of an odd number is computed apart
    even = size - size % 2
    stretches = [(start, end) for start, end in ((0, even), (even, size)) if start < end]
    found = [
        _inverse_cdf(_random_bits(pair, jnp.uint32(block), *one, dtype.itemsize), dtype)
        for one in stretches
    ]
    return jnp.concatenate(found).reshape(shape)


def normal_stretch(
    key: Key,
    shape: tuple[int, ...],
    dtype=jnp.float32,
    *,
    block: Array | int,
    page: int,
    start: Array | int,
) -> Float[Array, "..."]:
    """Draw the numbers that `normal` has from `start` on, in an array of this shape.

    Each number is computed from its place in the array, so that devices which divide the array draw
    their parts alone. Pages are of 2^32 counters each; those after the first are of keys that are
    derived for them.

    It falls back to jax.random where `normal` does.
    """
    pair, size, dtype = _threefry_words(key), math.prod(shape), np.dtype(dtype)
    if pair is None or size > PAGE or dtype not in (np.float32, np.float64):
        own = jax.random.fold_in(jax.random.fold_in(_block_key(key, block), page), start)
        return jax.random.normal(own, shape, dtype)
    if page:
        pair = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, LATER_PAGES), page))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    counters = jnp.broadcast_to(jnp.asarray(start, jnp.uint32), shape)
    for axis, stride in enumerate(strides):
        counters += np.uint32(stride) * jax.lax.broadcasted_iota(np.uint32, shape, axis)
    bits = _bits_of(pair, jnp.uint32(block), counters, dtype.itemsize)
    return jnp.asarray(_inverse_cdf(bits, dtype))


def words(key: Key, size: int, *, block: Array | int = 0) -> UInt32[Array, " size"]:
    """Draw uniform 32-bit words.

    Those of block 0 have the bits of `jax.random.bits(key, (size,), uint32)`.
    """
    pair = _threefry_words(key)
    if pair is None or not 0 < size < 2**32:
        return jax.random.bits(_block_key(key, block), (size,), jnp.uint32)
    return _random_bits(pair, jnp.uint32(block), 0, size, 4)


def split_key(key: Key, num: int) -> Keys:
    """Return `jax.random.split(key, num)`, hashed on the host where the key is there.

    `jax.random.split` would compile a program.
    """
    pair = _host_words(key)
    return jax.random.split(key, num) if pair is None else _hash_key(pair, np.arange(num))


def fold_in(key: Key, data: int) -> Key:
    """Return `jax.random.fold_in(key, data)`, hashed on the host where the key is there."""
    pair = _host_words(key)
    return jax.random.fold_in(key, data) if pair is None else _hash_key(pair, np.asarray(data))


def _host_words(key: Key) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the words of a threefry key on the host.

    None stands for a key that is traced, or of another kind.
    """
    pair = _threefry_words(key)
    # Where something is traced, the words of any key are tracers.
    if pair is None or isinstance(pair, jax.core.Tracer):
        return None
    first, second = np.asarray(pair)
    return np.atleast_1d(first), np.atleast_1d(second)  # scalars would warn where words wrap


def _hash_key(pair: tuple[np.ndarray, np.ndarray], counters: np.ndarray) -> Array:
    """Hash counters of block 0 to keys."""
    low = np.atleast_1d(counters).astype(np.uint32)
    hashed = np.stack(_threefry2x32(*pair, np.zeros_like(low), low), axis=-1)
    return jax.random.wrap_key_data(
        jax.device_put(hashed.reshape(*counters.shape, 2)), impl="threefry2x32"
    )


def _block_key(key: Key, block: Array | int) -> Key:
    return key if isinstance(block, int) and block == 0 else jax.random.fold_in(key, block)


def _threefry_words(key: Key) -> UInt32[Array, "2"] | None:
    """Return the two words of a single threefry2x32 key under partitionable counters.

    None stands for a key whose counters jax.random uses in another way.
    """
    is_known = (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and key.shape == ()
        and str(jax.random.key_impl(key)) in ("threefry2x32", "fry")
        and getattr(jax.config, "jax_threefry_partitionable", False)
    )
    return jax.random.key_data(key) if is_known else None


# Inlined, so that the hash fuses with what the caller's program does to the bits.
@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _random_bits(pair, block, start, end, itemsize):
    return _bits_of(pair, block, np.uint32(start) + jax.lax.iota(np.uint32, end - start), itemsize)


def _bits_of(pair, block, counters, itemsize):
    high, low = _threefry2x32(pair[0], pair[1], block, counters)
    if itemsize == 4:
        return high ^ low
    return (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)


def _threefry2x32(key0, key1, x0, x1):
    """Hash a 64-bit counter in 20 rounds."""
    schedule = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for block in range(5):  # of four rounds each: the 20 that Salmon et al. recommend
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation)))
        # the key goes in again after every four rounds, with a number that tells them apart
        x0 = x0 + schedule[(block + 1) % 3]
        x1 = x1 + (schedule[(block + 2) % 3] + np.uint32(block + 1))
    return x0, x1


def _inverse_cdf(bits, dtype):
    """Turn random words into normals, operation for operation as jax.random does."""
    num_bits, mantissa = (32, 23) if dtype == np.float32 else (64, 52)
    one = np.array(1, dtype)
    # erf_inv(-1) is minus infinity: the interval is open there
    lowest = np.nextafter(-one, np.array(0, dtype), dtype=dtype)
    # random bits behind the exponent of 1 make a number in [1, 2)
    mantissa_bits = (bits >> np.array(num_bits - mantissa, bits.dtype)) | np.array(
        one.view(bits.dtype)
    )
    unit = jax.lax.bitcast_convert_type(mantissa_bits, dtype) - one
    uniform = jax.lax.max(lowest, unit * (one - lowest) + lowest)
    return np.array(np.sqrt(2), dtype) * jax.lax.erf_inv(uniform)
