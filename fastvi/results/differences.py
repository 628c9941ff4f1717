"""Differences of two estimates with errors: paired where both walked on the same noise."""

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastvi._errors import ConfigError
from fastvi._html import result_html
from fastvi._numbers import with_error
from fastvi.results.estimate import LLCEstimate
from fastvi.results.report.svg import svg_where_possible
from fastvi.sampling.averages import stated_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Correlation of two walks from which on their errors are not added as if independent. Half of it
# believes what few walkers show by chance; nearer to 1, errors are stated larger than they are.
LEAST_CORRELATION = 0.5
# Bins of all walkers, at least, that tell a correlation: some 30 % of what it lacks to 1. Half tell
# it to 40 %, double leave short walks unpaired.
LEAST_BINS = 64


@dataclasses.dataclass(frozen=True)
class LLCDifference:
    """The llc of a second estimate less that of a first.

    Attributes:
        value: The difference: where paired, of the walks over the steps that both averaged.
        sem: Its standard error.
        paired: Whether the error takes into account that both walked on the same noise; otherwise
            it is the root of the sum of squares.
        correlation: Of the two walks, by the errors of each and of their difference over the steps
            that both averaged; NaN where they share none.
    """

    value: float
    sem: float
    paired: bool
    correlation: float

    @property
    def z(self) -> float:
        """The difference in its standard errors; NaN where both are zero."""
        if self.sem:
            return self.value / self.sem
        return math.copysign(math.inf, self.value) if self.value else math.nan

    def __str__(self) -> str:
        """Format for a terminal."""
        how = f"paired, correlation {self.correlation:.3g}" if self.paired else "independent errors"
        return f"{with_error(self.value, self.sem)}   ({self.z:+.1f} errors; {how})"


def difference(first: LLCEstimate, second: LLCEstimate) -> LLCDifference:
    """Return the llc of the second estimate less that of the first, with its error.

    Walkers of two estimates with one key step on the same noise. Where the posteriors are alike
    they move side by side, and the difference over the steps that both average is known much better
    than either llc. Of the other parts of their errors, s and s', it has
    s^2 + s'^2 - 2 r s s', with r the correlation of the walks. What each llc has beside the plain
    mean of its walk, by control variates and for heat, counts in the difference, and as an error as
    far as the two differ in it.
    """
    value, sem = second.llc - first.llc, math.hypot(first.llc_sem, second.llc_sem)
    shared = shared_walk(first, second)
    if shared is None or shared.correlation < LEAST_CORRELATION:
        return LLCDifference(value, sem, False, shared.correlation if shared else math.nan)
    others = zip(first.error_parts[1:], second.error_parts[1:], strict=True)
    systematic = [one**2 + other**2 - 2 * shared.correlation * one * other for one, other in others]
    added = _beside_the_mean(second) - _beside_the_mean(first)
    paired = math.sqrt(shared.sem**2 + added**2 + sum(systematic))
    if not paired < sem:
        return LLCDifference(value, sem, False, shared.correlation)
    return LLCDifference(shared.value + added, paired, True, shared.correlation)


def _beside_the_mean(estimate: LLCEstimate) -> float:
    """Return llc less the plain mean of the bins that it averages."""
    return estimate.llc - float(estimate.walk_llc[:, estimate.walk_burn_in :].mean())


class SharedWalk(NamedTuple):
    """What two walks say over the steps that both average.

    Attributes:
        value: The second's mean less the first's.
        sem: Its statistical error.
        correlation: Of the two means.
    """

    value: float
    sem: float
    correlation: float


def shared_walk(first: LLCEstimate, second: LLCEstimate) -> SharedWalk | None:
    """Return what two walks have in common; None where they share too few steps."""
    walks = [_kept_walk(one) for one in (first, second)]
    if any(walk is None for walk in walks):
        return None
    (one, begins, length), (other, other_begins, other_length) = walks
    is_aligned = length == other_length and (begins - other_begins) % length == 0
    if not is_aligned or one.shape[0] != other.shape[0]:
        return None
    start = max(begins, other_begins)
    count = min(begins + length * one.shape[1], other_begins + length * other.shape[1]) - start
    bins = count // length
    if bins * one.shape[0] < LEAST_BINS:
        return None
    common = [
        walk[:, (start - begin) // length :][:, :bins]
        for walk, begin in ((one, begins), (other, other_begins))
    ]
    errors = [stated_error(walk) for walk in common]
    if not all(errors):  # a walk that stands still has no noise to share
        return None
    apart = common[1] - common[0]
    sem = stated_error(apart)
    correlation = (errors[0] ** 2 + errors[1] ** 2 - sem**2) / (2 * errors[0] * errors[1])
    return SharedWalk(float(apart.mean()), sem, float(np.clip(correlation, -1.0, 1.0)))


def _kept_walk(estimate: LLCEstimate) -> Any:
    """Return the bins that an estimate averages, the number of their first step and their length.

    None where it did not walk.
    """
    details, burn = estimate.correction, estimate.walk_burn_in
    if details is None or not details.steps or details.first_step is None:
        return None
    length = details.steps // estimate.walk_llc.shape[1]
    return estimate.walk_llc[:, burn:], details.first_step + burn * length, length


@dataclasses.dataclass(frozen=True)
class LLCComparison:
    """Estimates by name, and their differences.

    Attributes:
        estimates: In the order in which they were given.
    """

    estimates: dict[str, LLCEstimate]

    @property
    def differences(self) -> tuple[LLCDifference, ...]:
        """Each estimate's llc less that of the one before."""
        return consecutive(tuple(self.estimates.values()))

    def between(self, first: str, second: str) -> LLCDifference:
        """Return the llc of the second less that of the first.

        Raises:
            ConfigError: If there is no estimate of that name.
        """
        for name in (first, second):
            if name not in self.estimates:
                there = ", ".join(map(repr, self.estimates))
                raise ConfigError(f"{name!r} was not compared; {there} were.")
        return difference(self.estimates[first], self.estimates[second])

    def _repr_html_(self) -> str:
        """Return it for a notebook."""
        return result_html(self.summary(), figure=svg_where_possible(self.plot, "llc"))

    def summary(self) -> str:
        """Return each llc and the difference of every pair, for a terminal."""
        names = list(self.estimates)
        pairs = list(itertools.combinations(names, 2))
        width = max(len(f"{second} - {first}") for first, second in pairs)
        return "\n".join(
            [
                *(f"{name:<{width}}  {one.llc_text}" for name, one in self.estimates.items()),
                *(
                    f"{f'{second} - {first}':<{width}}  {self.between(first, second)}"
                    for first, second in pairs
                ),
            ]
        )

    def plot(self) -> "Figure":
        """Draw llc of each, and the differences from one to the next: see `plot_differences`."""
        from fastvi.results.report.differences import plot_differences

        values = tuple(self.estimates.values())
        return plot_differences(
            np.array([one.llc for one in values]),
            np.array([one.llc_sem for one in values]),
            self.differences,
            names=list(self.estimates),
        )


def consecutive(estimates: tuple[LLCEstimate, ...]) -> tuple[LLCDifference, ...]:
    """Return each estimate's llc less that of the one before."""
    return tuple(difference(*pair) for pair in itertools.pairwise(estimates))
