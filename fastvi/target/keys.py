"""Random keys as callers give them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._modes import jax_setting


def as_key(key: Any) -> Any:
    """Accept an int seed in [0, 2^64), a legacy uint32 key or a typed key.

    A seed below 2^32 is that of `jax.random.key`; all bits of a larger one count, whether 64-bit
    types are enabled or not.

    Raises:
        ConfigError: If it is none of these.
    """
    if isinstance(key, (int, np.integer)):
        if isinstance(key, bool):
            raise ConfigError(f"key must be an int or a jax random key; got {described(key)}.")
        return _seeded(int(key))
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if typed and shape == ():
        return key
    # Two words are a raw key of threefry: those of the other generators have four.
    if dtype is not None and not typed and dtype == np.uint32 and shape == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")
    raise ConfigError(
        f"key must be an int, jax.random.key(...) or jax.random.PRNGKey(...); got {described(key)}."
    )


def _seeded(seed: int) -> Any:
    """Return the key of a seed; jax without 64-bit types would take it modulo 2^32.

    Below 2^32 it has the bits of `jax.random.key`, which compiles a program for it.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(
            f"key must be a seed in [0, 2**64), or a jax random key; got {seed}: use "
            f"{seed % 2**32}."
        )
    # The other generators make a key of a seed in ways of their own.
    if seed < 2**32 and jax_setting("jax_default_prng_impl") != "threefry2x32":
        return jax.random.key(seed)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jax.device_put(words), impl="threefry2x32")


def described(value: Any) -> str:
    """Name a value in an error, an array by its dtype and shape."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array {value.dtype}{list(value.shape)}"
    return f"{value!r} ({type(value).__name__})"
