"""Definition on the dense matrix of the operator."""

import jax
import jax.numpy as jnp


def diagonal(probes, operator):
    """Average z * (H z) with H built column by column."""
    matrix = jax.vmap(operator)(jnp.eye(probes.shape[1], dtype=probes.dtype))
    return jnp.mean(probes * (probes @ matrix), axis=0)


def trace_samples(probes, operator):
    """Evaluate z . H z with H built column by column."""
    matrix = jax.vmap(operator)(jnp.eye(probes.shape[1], dtype=probes.dtype))
    return jnp.einsum("pi,ij,pj->p", probes, matrix, probes)
