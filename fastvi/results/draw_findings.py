"""Findings of draws of the posterior: whether they mixed, and whether llc is local."""

from collections.abc import Iterator

from fastvi.observables.covariance import BLOCK_TIMES
from fastvi.observables.posterior import PosteriorDraws
from fastvi.results.findings import Finding

# - d log llc / d log gamma from which on it is said: 1 where the localizer is narrower than what
# data say of all directions. At half, models are named of whose directions a third are held.
LOCALIZER_SHARE = 0.6
SIGMAS = 2.0  # by which the share is beyond that: chance names one draw in 40


def draw_findings(draws: PosteriorDraws) -> tuple[Finding, ...]:
    """Return what stands out, gravest first."""
    return (*_slow_draws(draws), *_localizer_number(draws), *_far_draws(draws))


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
