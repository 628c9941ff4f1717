"""Random numbers with the bits of jax.random, in one fused loop."""

from fastvi.kernels.noise.threefry import normal, words

NOISE_BLOCKS = (
    2  # blocks of a key's counters that the noise of one step may use; its minibatch uses the next
)

__all__ = ["NOISE_BLOCKS", "normal", "words"]
