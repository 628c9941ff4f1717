"""Probes one after another: memory of one operator application."""

import jax
import jax.numpy as jnp


def diagonal(probes, operator):
    """Average z * (H z) without storing the products."""

    def add(total, probe):
        return total + probe * operator(probe), None

    # A scan keeps one product at a time, a map would keep those of all probes.
    total, _ = jax.lax.scan(add, jnp.zeros_like(probes[0]), probes)
    return total / probes.shape[0]


def trace_samples(probes, operator):
    """Evaluate z . H z probe by probe."""
    return jax.lax.map(lambda probe: probe @ operator(probe), probes)
