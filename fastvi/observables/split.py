"""What llc is made of away from a minimum: drift of the posterior's mean, and spread about it."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float
from fastvi.observables.covariance import Estimate, from_left_out

# Groups of walkers, each of which is left out once. Half of them tell errors to a quarter instead
# of a sixth; double takes twice the losses on all data.
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

    def __str__(self) -> str:
        """Format for a terminal."""
        return f"drift {self.drift}, spread {self.spread}"


class GroupMeans(NamedTuple):
    """Displacements of groups of walkers, summed up along the draws.

    Attributes:
        total: Sums over the walkers of each group and the draws so far: at most `GROUPS` vectors.
        size: Walkers of a group.
        draws: Draws so far.
    """

    total: Float[Array, "groups dim"]
    size: int
    draws: int

    def with_draw(self, displacement: Float[Array, "walkers dim"]) -> "GroupMeans":
        """Add a draw of every walker."""
        count, dim = self.total.shape
        grouped = displacement[: count * self.size].reshape(count, self.size, dim)
        return self._replace(total=self.total + jnp.sum(grouped, axis=1), draws=self.draws + 1)

    def points(self) -> Float[Array, "points dim"]:
        """Return the mean of all, and those that leave out a group each; none of one group."""
        count = len(self.total)
        if count < 2:
            return self.total[:0]
        whole = jnp.sum(self.total, axis=0, keepdims=True)
        without = (whole - self.total) / (count - 1)
        means = jnp.concatenate([whole / count, without])
        return means / (self.draws * self.size)


def group_means(displacement: Float[Array, "walkers dim"]) -> GroupMeans:
    """Return the sums before the first draw of such walkers."""
    count, size = groups_of(displacement.shape[0])
    return GroupMeans(jnp.zeros((count, displacement.shape[1]), displacement.dtype), size, 0)


def groups_of(walkers: int) -> tuple[int, int]:
    """Return how many groups of one size there are, and their size; a rest is left out."""
    size = -(-walkers // GROUPS)
    return walkers // size, size


def points_of(walkers: int) -> int:
    """Count the points at which the loss is wanted for so many walkers."""
    count = groups_of(walkers)[0]
    return count + 1 if count > 1 else 0


def split_of(
    llc: Float[np.ndarray, "walkers draws"], at_means: Float[np.ndarray, " points"]
) -> Split:
    """Return the parts, jackknifed over groups of walkers.

    The loss at the mean of finitely many draws is off by the noise of the mean. To second order
    that is in inverse proportion to the draws, which the jackknife takes off: for a quadratic the
    parts have no bias.

    Args:
        llc: n beta (L_n(w) - L_n(w*)) at the draws.
        at_means: The same at the mean of all draws, and at those that leave out a group each.
    """
    count, size = groups_of(len(llc))
    means = np.asarray(llc, float)[: count * size].reshape(count, -1).mean(axis=1)
    energies = np.concatenate([[means.mean()], (means.sum() - means) / (count - 1)])
    return Split(drift_of(at_means), _jackknifed(energies - np.asarray(at_means, float)))


def drift_of(at_means: Float[np.ndarray, " points"]) -> Estimate:
    """Return the drift, from n beta (L_n - L_n(w*)) at the points of `GroupMeans.points`."""
    return _jackknifed(np.asarray(at_means, float))


def _jackknifed(values: Float[np.ndarray, " points"]) -> Estimate:
    return from_left_out(float(values[0]), values[1:])
