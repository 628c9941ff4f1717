"""Random numbers with the bits of jax.random, in one fused loop."""

from fastvi.kernels.noise.streams import NOISE_BLOCKS
from fastvi.kernels.noise.threefry import normal, normal_stretch, split_key, words

__all__ = ["NOISE_BLOCKS", "normal", "normal_stretch", "split_key", "words"]
