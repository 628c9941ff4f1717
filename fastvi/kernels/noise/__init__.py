"""Standard normal noise with the bits of jax.random.normal, in one fused loop."""

from fastvi.kernels.noise.threefry import normal

__all__ = ["normal"]
