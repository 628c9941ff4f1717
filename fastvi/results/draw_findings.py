"""Findings of draws of the posterior: whether they mixed, and whether llc is local."""

from collections.abc import Iterator

from fastvi.observables.covariance import BLOCK_TIMES
from fastvi.observables.posterior import PosteriorDraws
from fastvi.results.findings import Finding

# - d log llc / d log gamma from which on it is said: 1 where the localizer is narrower than what
# data say of all directions. At half, models are named of whose directions a third are held.
LOCALIZER_SHARE = 0.6
# Standard errors that a part of llc is beyond: at half, chance names one draw in six; at double,
# parts that are surely there are not named.
SPREAD_SIGMAS = 3.0
# Drift over spread from which on it is said. Half of it is an llc 5 % too low; double, 20 %.
DRIFT_SHARE = 0.1
SIGMAS = 2.0  # by which the share is beyond that: chance names one draw in 40


def with_findings(draws: PosteriorDraws) -> PosteriorDraws:
    """Return the draws with what stands out."""
    return draws.with_health(draw_findings(draws))


def draw_findings(draws: PosteriorDraws) -> tuple[Finding, ...]:
    """Return what stands out, gravest first."""
    return (
        *_slow_draws(draws),
        *_negative_spread(draws),
        *_localizer_number(draws),
        *_off_minimum(draws),
        *_far_draws(draws),
    )


def _slow_draws(draws: PosteriorDraws) -> Iterator[Finding]:
    if draws.num_draws < BLOCK_TIMES * draws.correlation_time:
        yield Finding(
            "warning",
            "slow_draws",
            f"Walkers remember {draws.correlation_time:.3g} of their {draws.num_draws} draws.",
            "A block of draws is one walker, and blocks depend on each other: errors may be too "
            "small.",
            f"Raise draws to {BLOCK_TIMES * draws.correlation_time:.2g}, or thin in proportion.",
        )


def _negative_spread(draws: PosteriorDraws) -> Iterator[Finding]:
    if not draws.mean_energies.size:
        return
    spread = draws.split.spread
    if spread.value < -SPREAD_SIGMAS * spread.sem:
        yield Finding(
            "warning",
            "negative_spread",
            f"The spread of llc is negative, {float(spread.value):.3g} ± {float(spread.sem):.2g}.",
            "The loss at the mean of the draws is above their mean loss: the posterior curves "
            "around its mean, or lies in several places.",
            "Raise localization, so that the draws are of one neighbourhood.",
        )


def _off_minimum(draws: PosteriorDraws) -> Iterator[Finding]:
    if not draws.mean_energies.size:
        return
    drift, spread = draws.split
    surely = -float(drift.value) - SPREAD_SIGMAS * float(drift.sem)
    if surely > DRIFT_SHARE * abs(float(spread.value)):
        yield Finding(
            "note",
            "off_minimum",
            f"llc has a drift of {float(drift.value):.3g} ± {float(drift.sem):.2g}: the loss at "
            "the mean of the draws is below that at w*.",
            "w* is no minimum, as checkpoints of a training under way are not.",
            f"Compare checkpoints by the spread, {float(spread.value):.3g} ± "
            f"{float(spread.sem):.2g}.",
        )


def _localizer_number(draws: PosteriorDraws) -> Iterator[Finding]:
    slope, llc = draws.locality.localization_slope, float(draws.llc_estimate.value)
    surely = -float(slope.value) - SIGMAS * float(slope.sem)
    if llc > 0 and surely > LOCALIZER_SHARE * llc:
        yield Finding(
            "warning",
            "localizer_number",
            f"d log llc / d log localization is {float(slope.value) / llc:.2g}: llc is nearly "
            "proportional to 1 / localization.",
            "The localizer is narrower than what the data say of most directions, so that llc "
            "measures the curvature at w* over localization, not the volume of the minimum.",
            "Lower localization, or raise nbeta, until this slope is small.",
        )


def _far_draws(draws: PosteriorDraws) -> Iterator[Finding]:
    radius, norm = float(draws.locality.radius.value), draws.center_norm
    if radius > norm > 0:
        yield Finding(
            "note",
            "far_draws",
            f"Draws are {radius:.3g} from w*, whose own length is {norm:.3g}.",
            "The localizer leaves more room than the weights themselves take.",
            "Raise localization if llc is to be that of this minimum alone.",
        )
