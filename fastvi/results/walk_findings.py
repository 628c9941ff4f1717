"""Findings of a walk from the localizer, beside those that every sampled value may have."""

from collections.abc import Iterator

from fastvi.results.estimate import LLCEstimate
from fastvi.results.findings import LEAST_GAIN, Finding, coarse_numbers, not_a_minimum
from fastvi.sampling.from_localizer.walk import MOST_STIFFNESS, Walk
from fastvi.target.checks import LossLook

# Standard errors that a measured gain is above zero: the noise of a few batches passes them in one
# of 700 estimates.
GAIN_SIGMAS = 3.0
# Effective share of the examples below which walks on fresh minibatches are neither chosen nor
# trusted. Of the 6,000 examples of a usual walk 120 then count: half leaves 60, and errors that
# vary by a tenth; double names the masks of text that is mostly padding.
LEAST_SHARE = 0.02


def walk_findings(
    result: LLCEstimate, walk: Walk, look: LossLook, weight_drift: float
) -> tuple[Finding, ...]:
    """Return what stands out before and during a walk.

    Args:
        result: The estimate.
        walk: The walk that it is of.
        look: What was seen of the loss before.
        weight_drift: Relative difference of the mean weight of the examples read from that which
            the loss divides by; 0 where it is chance.
    """
    measured = walk.measured
    gain = measured.decrement
    seen = []
    if gain - GAIN_SIGMAS * measured.decrement_error > LEAST_GAIN:
        seen.append(f"a step along the gradient would lower n beta L_n by about {gain:.2g} nats")
    return (
        *not_a_minimum(seen),
        *coarse_numbers(abs(result.llc), look),
        *_uneven(look),
        *_weights_drift(weight_drift),
        *_stiff(walk),
        *_ended(walk),
    )


def _stiff(walk: Walk) -> Iterator[Finding]:
    stiffness = walk.measured.stiffness
    if not stiffness <= MOST_STIFFNESS:
        yield Finding(
            "warning",
            "stiff",
            f"The largest curvature of n beta L_n is {stiffness:.3g} times that of the rest and "
            "the localizer, so steps are short.",
            "Nothing is known of the directions that the data narrow, and the budget pays for no "
            "fit.",
            "Raise budget, so that a fit finds them; or raise localization.",
        )


def _uneven(look: LossLook) -> Iterator[Finding]:
    if not look.effective_share >= LEAST_SHARE:
        yield Finding(
            "warning",
            "uneven_weights",
            f"The weights of the examples are as uneven as if {100 * look.effective_share:.2g} % "
            "of them counted alike and the others not at all.",
            "A walk on fresh minibatches sees few of those that count, so that llc_sem may be too "
            "small.",
            "Hold the data in memory and begin at a fit, whose walkers use all of them: "
            "sampler={'start': 'fit'}. Or leave out examples of little weight.",
        )


def _weights_drift(drift: float) -> Iterator[Finding]:
    if drift != 0:
        yield Finding(
            "warning",
            "weights_drift",
            f"The mean weight of the examples read is {1 + drift:.2g} times that which the loss is "
            "divided by.",
            "Data that are read once come in an order that their weights depend on. llc is off by "
            "up to as much, which is part of llc_sem.",
            "Shuffle the data.",
        )


def _ended(walk: Walk) -> Iterator[Finding]:
    if walk.ended_early:
        yield Finding(
            "note",
            "data_ended",
            f"The data ended after {walk.examples} examples, before the walk did.",
            "An iterator gives each example once, and the error that was asked for takes more.",
            "Give more examples, or ask for a larger error.",
        )
