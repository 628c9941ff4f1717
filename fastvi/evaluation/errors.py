"""Averages over draws and over chains, and the standard errors of these averages."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Scalar


def pair_mean(values: Any, axis: int = 0) -> Any:
    """Average each draw with its mirror image.

    `AbstractFamily.sample` lays mirrored pairs out as [first half | mirrored half]. The two draws
    of a pair depend on each other; the means of the pairs are independent.

    Args:
        values: NumPy or jax array with an even number of draws along `axis`.
        axis: The axis of the draws, counted from the front.
    """
    shape = values.shape
    pairs = (*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :])
    return values.reshape(pairs).mean(axis=axis)


def chain_error(
    means: Float[np.ndarray, " chains"], sems: float | Float[np.ndarray, " chains"]
) -> float:
    """Return the standard error of the mean over chains: the larger of two estimates.

    `within = sqrt(mean(sems^2) / chains)` sees what varies inside a chain. `between =
    std(means) / sqrt(chains)` also sees what differs from chain to chain, but needs two chains and
    is vague with few of them.

    Args:
        means: The mean of each chain.
        sems: The standard error of each of these means, or one number for all.
    """
    chains = len(means)
    within = np.sqrt(np.mean(np.square(sems, dtype=float)) / chains)
    between = np.std(means, ddof=1, dtype=float) / np.sqrt(chains) if chains > 1 else 0.0
    # Python's `max` would drop a NaN that comes second.
    return float(np.maximum(within, between))


def virial(
    displacement: Float[Array, "draws dim"], log_density_grad: Float[Array, "draws dim"]
) -> Scalar:
    """Return `-E[v . grad log p(v)] / dim`, the mean over draws v.

    It is 1 under p itself (integration by parts), larger where draws reach further than p does and
    smaller where they do not reach as far.
    """
    products = jnp.sum(displacement * log_density_grad, axis=-1)
    return -jnp.mean(products) / displacement.shape[-1]
