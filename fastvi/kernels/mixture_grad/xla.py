"""Closed-form pull-back as sums of rank-1 terms.

With h the cotangent, h_x = D^{1/2} h and l = P^{-1} h_x: offsets h, log_scale h_x x, factors z h_x^T,
core (zeta - B x_core) l^T - (B l) x_core^T.
"""

import math

import jax
import jax.numpy as jnp

from fastvi.kernels.woodbury import xla as woodbury
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise

UNROLLED_BLOCKS = 8  # more are moved in a loop, for the sake of compilation


def pullback(mixture: Mixture, small: Grams, noise: Noise, drawn: Draw, cotangent, metric: str) -> Mixture:
    """Pull a cotangent of the displacement back to all parameters."""
    gradient = directions(mixture, small, noise, drawn, cotangent, metric)
    label = jnp.arange(mixture.log_weights.size) == noise.label
    return gradient._replace(factors=(label[:, None] * noise.z)[..., None] * gradient.factors)


def directions(mixture: Mixture, small: Grams, noise: Noise, drawn: Draw, cotangent, metric: str) -> Mixture:
    """Do the same but for the factors, of whose rank-1 gradient the long side is returned."""
    num_components, num_offsets = mixture.log_weights.size, mixture.offsets.shape[0]
    scale = jnp.exp(mixture.log_scale)
    h_x = scale * cotangent
    core_l = woodbury.solve(small.core_half, mixture.core @ h_x)  # B l = C_B^{-1} B h_x
    l_x = h_x - core_l @ mixture.core
    if metric == "natural":
        y = drawn.x_core + drawn.core_x @ mixture.core  # P x_core
        offset, factor_right, core_left, core_right = l_x, l_x, h_x, y
        # the core's share, core * grad(core) summed over rows, from B^T (zeta - B x_core) = x_core - eps and
        # B^T B l = h_x - l
        moved = (drawn.x_core - noise.eps) * l_x - (h_x - l_x) * drawn.x_core
    else:
        offset, factor_right, core_left, core_right = cotangent, h_x, l_x, drawn.x_core
        moved = 0.0
    shift = noise.zeta - drawn.core_x
    rows = jnp.arange(num_components) == noise.label if num_offsets > 1 else jnp.ones(num_offsets, bool)
    return Mixture(
        log_weights=jnp.zeros_like(mixture.log_weights),
        offsets=rows[:, None] * offset,
        log_scale=h_x * drawn.x + moved,
        core=shift[:, None] * core_left - core_l[:, None] * core_right,
        factors=factor_right,
    )


@jax.custom_batching.custom_vmap
def update_factors(factors, labels, left, right):
    """Add the products one after another, each fused into its update in place, then read the blocks that moved."""
    moved, grams = _update(*(leaf[None] for leaf in (factors, labels, left, right)))
    return moved[0], grams[0]


@update_factors.def_vmap
def _over_chains(size, batched, *arrays):
    """Update one chain after another in place, where vmap would scatter."""
    stacked = (
        leaf if has_axis else jnp.broadcast_to(leaf, (size, *leaf.shape))
        for leaf, has_axis in zip(arrays, batched, strict=True)
    )
    return _stacked(*stacked), (True, True)


@jax.custom_batching.custom_vmap
def _stacked(factors, labels, left, right):
    return _update(factors, labels, left, right)


@_stacked.def_vmap
def _over_more_chains(size, batched, *arrays):
    """Take two axes of chains for one."""
    arrays = [
        leaf if has_axis else jnp.broadcast_to(leaf, (size, *leaf.shape))
        for leaf, has_axis in zip(arrays, batched, strict=True)
    ]
    shape = arrays[0].shape[:2]
    flat = _stacked(*(leaf.reshape(math.prod(shape), *leaf.shape[2:]) for leaf in arrays))
    return tuple(leaf.reshape(*shape, *leaf.shape[1:]) for leaf in flat), (True, True)


def _update(factors, labels, left, right):
    """Do as `update_factors` with a leading axis of chains.

    Without a reshape or a read between the updates and what follows: for either XLA would copy all factors.
    """
    chains, blocks = labels.shape
    size = (1, 1, *factors.shape[2:])

    def move(index, factors):
        chain, block = index // blocks, index % blocks
        start = (chain, labels[chain, block], 0, 0)
        terms = zip(left[chain, block], right[chain, block], strict=True)
        step = sum((short[:, None] * long for short, long in terms), jnp.zeros((), factors.dtype))
        return jax.lax.dynamic_update_slice(factors, jax.lax.dynamic_slice(factors, start, size) + step, start)

    def gram(index, factors):
        chain = index // blocks
        return woodbury.component_gram(factors, (chain, labels[chain, index % blocks]))

    count = chains * blocks
    if count > UNROLLED_BLOCKS:
        factors = jax.lax.fori_loop(0, count, move, factors)
        grams = jax.lax.map(lambda index: gram(index, factors), jnp.arange(count))
    else:
        for index in range(count):
            factors = move(index, factors)
        grams = jnp.stack([gram(index, factors) for index in range(count)])
    return factors, grams.reshape(chains, blocks, *grams.shape[1:])
