"""Standard normal noise."""

import jax


def normal(key, shape, dtype):
    """Draw standard normals."""
    return jax.random.normal(key, shape, dtype)
