"""Closed-form pull-back as sums of rank-1 terms.

With h the cotangent, h_x = D^{1/2} h and l = P^{-1} h_x: offsets h, log_scale h_x x, factors z h_x^T,
core (zeta - B x_core) l^T - (B l) x_core^T.
"""

import jax.numpy as jnp

from fastvi.kernels.woodbury import xla as woodbury
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise


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


def update_factors(factors, labels, left, right):
    """Add the products one after another, each fused into its update."""
    for block, label in enumerate(labels):
        terms = zip(left[block], right[block], strict=True)
        step = sum((short[:, None] * long for short, long in terms), jnp.zeros((), factors.dtype))
        factors = factors.at[label].add(step, mode="promise_in_bounds")
    grams = [woodbury.factor_grams(factors.at[label].get(mode="promise_in_bounds")[None]) for label in labels]
    return factors, jnp.concatenate(grams)
