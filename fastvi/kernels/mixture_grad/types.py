"""What the kernel returns, for one draw of one chain; more of either are added by vmap in front."""

from typing import NamedTuple

import jax.numpy as jnp

from fastvi._typing import Array, Float
from fastvi.kernels.woodbury.types import Noise


class Gradient(NamedTuple):
    """The gradient of one draw by the parameters of the mixture.

    That of the factors is a product and is kept as one: `z factor^T` for the component of the draw,
    and zero for the others. Its norm and its update then need no other array of the factors' size.
    """

    offsets: Float[Array, "locs dim"]
    log_scale: Float[Array, " dim"]
    core: Float[Array, "core dim"]
    factor: Float[Array, " dim"]

    def factors(self, noise: Noise, num_components: int) -> Float[Array, "comp rank dim"]:
        """Write the product out."""
        drawn = jnp.arange(num_components) == noise.label
        return (drawn[:, None] * noise.z)[..., None] * self.factor
