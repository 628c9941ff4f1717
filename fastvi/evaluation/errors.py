"""Averages over draws and over chains, and the standard errors of these averages."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Scalar


class ErrorParts(NamedTuple):
    """What the standard error of an estimate is made of, in units of llc.

    Attributes:
        statistical: Of draws that depend on each other, of few walkers.
        relaxation: Of where walkers began, and of directions that they have not yet filled.
        dynamics: Of finite steps and noisy gradients.
        evaluation: Of losses and gradients that were taken on a part of the data.
    """

    statistical: float
    relaxation: float = 0.0
    dynamics: float = 0.0
    evaluation: float = 0.0

    @property
    def total(self) -> float:
        """The standard error: the parts are independent, and add in squares."""
        return math.hypot(*self)

    @property
    def systematic(self) -> float:
        """All but the statistical part."""
        return math.hypot(*self[1:])

    @property
    def largest(self) -> str:
        """Name the largest part."""
        return max(zip(self, self._fields, strict=True))[1]

    def plus(self, **parts: float) -> "ErrorParts":
        """Add independent errors to these parts."""
        sums = {name: math.hypot(getattr(self, name), part) for name, part in parts.items()}
        return self._replace(**sums)


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
