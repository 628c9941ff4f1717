"""Closed-form pull-back as sums of rank-1 terms.

With h the cotangent, h_x = D^{1/2} h and l = P^{-1} h_x: offsets h, log_scale h_x x, factors z
h_x^T, core (zeta - B x_core) l^T - (B l) x_core^T.
"""

import math

import jax
import jax.numpy as jnp

from fastvi.kernels.mixture_grad.types import Gradient
from fastvi.kernels.woodbury import xla as woodbury
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise


def pullback(
    mixture: Mixture, grams: Grams, noise: Noise, drawn: Draw, cotangent, metric: str
) -> Gradient:
    """Pull a cotangent of the displacement back to all parameters."""
    num_components, num_offsets = mixture.log_weights.size, mixture.offsets.shape[0]
    scale = jnp.exp(mixture.log_scale)
    h_x = scale * cotangent
    core_l = woodbury.solve(grams.core_half, mixture.core @ h_x)  # B l = C_B^{-1} B h_x
    l_x = h_x - core_l @ mixture.core
    # The vectors and products are those of docs/math.md, section "Gradients".
    if metric == "natural":
        y = drawn.x_core + drawn.core_x @ mixture.core  # P x_core
        offset, factor_right, core_left, core_right = l_x, l_x, h_x, y
        # the core's share, core * grad(core) summed over rows, from B^T (zeta - B x_core) = x_core
        # - eps and B^T B l = h_x - l
        moved = (drawn.x_core - noise.eps) * l_x - (h_x - l_x) * drawn.x_core
    else:
        # core: (zeta - B x_core) l^T - (B l) x_core^T; only the draw's path depends on log_scale
        offset, factor_right, core_left, core_right = cotangent, h_x, l_x, drawn.x_core
        moved = 0.0
    shift = noise.zeta - drawn.core_x
    # A mean of a component moves with its own draws, a shared one with every draw.
    rows = (
        jnp.arange(num_components) == noise.label
        if num_offsets > 1
        else jnp.ones(num_offsets, bool)
    )
    return Gradient(
        offsets=rows[:, None] * offset,
        log_scale=h_x * drawn.x + moved,
        core=shift[:, None] * core_left - core_l[:, None] * core_right,
        factor=factor_right,
    )


@jax.custom_batching.custom_vmap
def update_factors(factors, labels, left, right):
    """Add the products one after another, then read the blocks that moved.

    Each product is fused into its update in place. All arrays may have a leading axis of chains.
    Nothing stands between the updates and what follows, no reshape and no read: for either XLA
    would copy all factors.
    """
    blocks, count = labels.shape[-1], labels.size
    size = (*(1 for _ in labels.shape), *factors.shape[-2:])

    def locate(index):
        """Return where a block's terms are, and its place among the factors."""
        at = (index,) if labels.ndim == 1 else (index // blocks, index % blocks)
        # an index of a slice has one type, which the labels' need not be
        return at, (*at[:-1], labels[at].astype(index.dtype))

    def move(index, factors):
        at, place = locate(index)
        terms = zip(left[at], right[at], strict=True)
        step = sum((short[:, None] * long for short, long in terms), jnp.zeros((), factors.dtype))
        start = (*place, 0, 0)
        return jax.lax.dynamic_update_slice(
            factors, jax.lax.dynamic_slice(factors, start, size) + step, start
        )

    # in a loop, also of two: XLA fuses an update written out into what reads its result, and reads
    # a copy there
    factors = jax.lax.fori_loop(0, count, move, factors)
    grams = jax.lax.map(
        lambda index: woodbury.component_gram(factors, locate(index)[1]), jnp.arange(count)
    )
    return factors, grams.reshape(*labels.shape, *grams.shape[1:])


@update_factors.def_vmap
def _over_chains(size, batched, *arrays):
    """Update one chain after another in place, where vmap would scatter."""
    stacked = [
        leaf if has_axis else jnp.broadcast_to(leaf, (size, *leaf.shape))
        for leaf, has_axis in zip(arrays, batched, strict=True)
    ]
    chains = stacked[1].shape[:-1]  # Labels have one more axis, of blocks.
    # Two axes of chains are taken for one. For one axis the reshape is none, and copies nothing.
    flat = (leaf.reshape(math.prod(chains), *leaf.shape[len(chains) :]) for leaf in stacked)
    found = update_factors(*flat)
    return tuple(leaf.reshape(*chains, *leaf.shape[1:]) for leaf in found), (True, True)
