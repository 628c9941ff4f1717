"""Random numbers with the bits of jax.random, in one fused loop."""

from fastvi.kernels.noise.threefry import normal, words

__all__ = ["normal", "words"]
