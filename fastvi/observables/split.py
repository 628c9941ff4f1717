"""What llc is made of away from a minimum: drift of the posterior's mean, and spread about it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float
from fastvi.observables.covariance import Estimate
from fastvi.sampling.averages import STUDENT

# Groups of walkers, each of which is left out once. Half of them tell errors to a quarter instead of
# a sixth; double takes twice the losses on all data.
GROUPS = 16


class Split(NamedTuple):
    """llc as the sum of two parts, with m the mean of the posterior.

    Attributes:
        drift: nbeta (L_n(m) - L_n(w*)): zero at a minimum of a quadratic, negative where the loss
            falls away from w*.
        spread: nbeta (E[L_n(w)] - L_n(m)): what llc is at a minimum.
    """

    drift: Estimate
    spread: Estimate


class GroupMeans:
    """Mean displacement of groups of walkers, summed up along the draws.

    Memory is that of `GROUPS` parameter vectors, or of one for each walker where these are fewer.
    """

    def __init__(self, walkers: int):
        self.members = group_sizes(walkers)
        self._total: Any = 0.0
        self._draws = 0

    def add(self, displacement: Float[Array, "walkers dim"]) -> None:
        """Add a draw of every walker."""
        starts = np.cumsum([0, *self.members[:-1]])
        self._total = self._total + jnp.add.reduceat(displacement, jnp.asarray(starts), axis=0)
        self._draws += 1

    def points(self) -> Float[Array, "points dim"]:
        """Return the mean of all, and those that leave out a group each; none of one group."""
        if len(self.members) < 2:
            return self._total[:0]
        members = jnp.asarray(self.members, self._total.dtype)[:, None]
        whole = jnp.sum(self._total, axis=0, keepdims=True)
        counts = jnp.concatenate([jnp.sum(members, keepdims=True)[0], jnp.sum(members) - members])
        totals = jnp.concatenate([whole, whole - self._total])
        return totals / (self._draws * counts)


def group_sizes(walkers: int) -> np.ndarray:
    """Return how many walkers each group has."""
    return np.array([len(part) for part in np.array_split(np.arange(walkers), GROUPS) if len(part)])


def split_of(
    llc: Float[np.ndarray, "walkers draws"], at_means: Float[np.ndarray, " points"]
) -> Split:
    """Return the parts, jackknifed over groups of walkers.

    The loss at the mean of finitely many draws is too large by their noise, to second order by as
    much as it grows when a group is left out times their number: the jackknife takes that off, for
    a quadratic all of it.

    Args:
        llc: n beta (L_n(w) - L_n(w*)) at the draws.
        at_means: The same at the mean of all draws, and at those that leave out a group each.
    """
    members = group_sizes(len(llc))
    sums = np.add.reduceat(llc.mean(axis=1), np.cumsum([0, *members[:-1]]))
    energies = np.concatenate([[llc.mean()], (sums.sum() - sums) / (members.sum() - members)])
    at_means = np.asarray(at_means, float)
    return Split(_jackknife(at_means), _jackknife(energies - at_means))


def _jackknife(values: np.ndarray) -> Estimate:
    """Return the estimate from the statistic of all, and those that leave out a group each."""
    whole, without, count = values[0], values[1:], len(values) - 1
    variance = (count - 1) * np.mean((without - without.mean()) ** 2)
    value = count * whole - (count - 1) * without.mean()
    return Estimate(np.asarray(value), np.asarray(np.sqrt(variance) * (1 + STUDENT / (count - 1))))
