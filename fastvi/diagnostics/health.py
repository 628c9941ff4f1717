"""Findings: what a careful reader would notice in a run, with the cause and the next step."""

import dataclasses
from typing import Any

import numpy as np

from fastvi.diagnostics.importance import USABLE, Importance

SEVERITIES = ("error", "warning", "note")
VIRIAL_TOLERANCE = 0.1
CHAIN_SPREAD_SIGMAS = 4.0
LOG_WEIGHT_SD_FAR = 2.0  # nats; importance weights of a log-normal this wide have an effective sample of 2 %
STILL_MATTER = ("non_finite", "not_a_minimum", "core_truncated")  # findings of a fit that a correction leaves standing
DOMINANT_WEIGHT = 0.95  # of one component, beside others
UNUSED_VARIANCE = 0.1  # that the longest factor row adds to a unit of variance
DECIDED_DIRECTIONS, DECIDED_SHARE = 1.0, 0.1  # directions that the loss narrows, below which the localizer decides
DRIFT_SHARE, DRIFT_SIGMAS = 0.1, 4.0  # rise of radius2 over the last half
GRADIENT_TOLERANCE = 1.0  # standard deviations of q that the minimum lies away from w*


@dataclasses.dataclass(frozen=True)
class Finding:
    """One observation: how grave, what was seen, why it happens, what to do next."""

    severity: str
    name: str
    observed: str
    cause: str
    next_step: str

    def __str__(self) -> str:
        """Format for a terminal."""
        return f"[{self.severity}] {self.observed} {self.cause} {self.next_step}"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The numbers that findings are read from; arrays have a leading axis of chains."""

    llc_per_chain: np.ndarray
    llc_sem_per_chain: np.ndarray
    elbo: np.ndarray
    virial: np.ndarray
    log_weight_sd: np.ndarray
    elbo_gain: float
    elbo_gain_error: float
    converged: bool | None
    rank: int
    wanted_rank: int
    rank_limit: int
    newton_decrement: float
    importance: Importance
    radius2: np.ndarray
    localization: float
    dim: int
    num_components: int = 1
    dominant_weight: float = 0.0
    longest_factor: float | None = None


def health_findings(evidence: Evidence) -> tuple[Finding, ...]:
    """Return what stands out, gravest first."""
    broken = _non_finite(evidence)
    if broken is not None:
        return (broken,)
    checks = (
        _not_a_minimum,
        _not_converged,
        _virial,
        _chains_disagree,
        _far_from_posterior,
        _khat,
        _radius_rising,
        _localizer_decides,
        _weights_collapsed,
        _rank_unused,
        _core_truncated,
    )
    found = [finding for check in checks if (finding := check(evidence)) is not None]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def correction_findings(result: Any) -> tuple[Finding, ...]:
    """Return the findings of a corrected estimate: those of its fit that still matter, and its own."""
    kept = [finding for finding in result.health if finding.name in STILL_MATTER]
    checks = (_importance_unreliable, _walk_unsettled, _q_was_off)
    found = [finding for check in checks if (finding := check(result)) is not None]
    return tuple(sorted([*kept, *found], key=lambda finding: SEVERITIES.index(finding.severity)))


def _importance_unreliable(result: Any) -> Finding | None:
    details = result.correction
    if details["method"] != "importance" or details["khat"] < USABLE:
        return None
    return Finding(
        "warning",
        "importance_unreliable",
        f"The importance weights have k-hat {details['khat']:.2g}, above {USABLE}.",
        "q misses part of the posterior, so a few draws carry the estimate.",
        'Use correction="mcmc".',
    )


def _walk_unsettled(result: Any) -> Finding | None:
    details = result.correction
    if details["method"] != "mcmc" or details["settled"]:
        return None
    return Finding(
        "warning",
        "walk_unsettled",
        f"Sampling ended unsettled after {details['steps']} steps of {details['walkers']} walkers: relative error "
        f"{result.llc_sem / max(abs(result.llc), 1e-30):.2g}, R-hat {details['rhat']:.3g}, virial off by "
        f"{abs(details['virial_z']):.2g} standard errors.",
        "The walkers have not yet seen the whole posterior, or its variance is large.",
        "Raise correction_budget, or fit longer with early_stop=True; llc_sem may be too small.",
    )


def _q_was_off(result: Any) -> Finding | None:
    gap, noise = result.llc_vi - result.llc, np.hypot(result.llc_vi_sem, result.llc_sem)
    if abs(gap) <= max(3 * noise, 0.05 * abs(result.llc)):
        return None
    return Finding(
        "note",
        "corrected",
        f"q alone gives {result.llc_vi:.4g}; the correction moved it to {result.llc:.4g}.",
        "The local posterior is not a mixture of Gaussians, or the fit was only as long as sampling needs.",
        "Nothing to do: the corrected value is the posterior's.",
    )


def _non_finite(evidence: Evidence) -> Finding | None:
    bad = ~np.isfinite(evidence.elbo)
    if not bad.any() and np.all(np.isfinite(evidence.llc_per_chain)):
        return None
    where = "in the final evaluation"
    if bad.any():
        step = int(np.argmax(bad.any(axis=0)))
        chains = ", ".join(str(chain) for chain in np.flatnonzero(bad[:, step]))
        where = f"first at step {step}, chain {chains}"
    return Finding(
        "error",
        "non_finite",
        f"NaN or infinity appeared, {where}.",
        "The loss overflows somewhere under q (exp, log or division), or the fit diverged.",
        "Check that the loss is finite a few standard deviations around w*; raise localization or lower lr.",
    )


def _not_a_minimum(evidence: Evidence) -> Finding | None:
    negative = evidence.llc_per_chain.mean() < -2 * np.sqrt(np.mean(evidence.llc_sem_per_chain**2))
    if not negative and not evidence.newton_decrement > GRADIENT_TOLERANCE:
        return None
    gain = f"{evidence.newton_decrement:.2g} nats"
    observed = f"w* is not a minimum: a Newton step from w* would lower n beta L_n by about {gain}"
    observed += ", and llc is negative." if negative else "."
    return Finding(
        "error" if negative else "warning",
        "not_a_minimum",
        observed,
        "The learning coefficient is defined at a local minimum; elsewhere the loss falls away from w*.",
        "Train longer (a decaying learning rate, full batches at the end), then estimate again.",
    )


def _not_converged(evidence: Evidence) -> Finding | None:
    if evidence.converged or evidence.elbo_gain <= max(2 * evidence.elbo_gain_error, 0.5):
        return None
    return Finding(
        "warning",
        "elbo_rising",
        f"The ELBO still rises: {evidence.elbo_gain:.3g} ± {evidence.elbo_gain_error:.2g} nats over the last half.",
        "The fit ran out of steps.",
        "Raise steps, or lr if grad_norm is small and steady.",
    )


def _virial(evidence: Evidence) -> Finding | None:
    mean = float(np.mean(evidence.virial))
    error = float(np.std(evidence.virial) / np.sqrt(max(evidence.virial.size, 1)))
    if abs(mean - 1) <= max(VIRIAL_TOLERANCE, 3 * error):
        return None
    direction = "wide" if mean > 1 else "narrow"
    return Finding(
        "warning",
        "virial",
        f"The virial is {mean:.3g}, and 1 at the best fit.",
        f"q is too {direction}: the fit has not converged, or its gradients are dominated by outliers.",
        "Raise steps or samples_per_step.",
    )


def _chains_disagree(evidence: Evidence) -> Finding | None:
    values, errors = evidence.llc_per_chain, evidence.llc_sem_per_chain
    if values.size < 2:
        return None
    spread, expected = float(np.std(values, ddof=1)), float(np.sqrt(np.mean(errors**2)))
    if spread <= max(CHAIN_SPREAD_SIGMAS * expected, 0.02 * abs(values.mean())):
        return None
    return Finding(
        "warning",
        "chains_disagree",
        f"Chains differ by {spread:.3g} (standard deviation) where their own errors are {expected:.2g}.",
        "The fits ended at different q: not converged, or several optima.",
        "Raise steps; llc_sem is the spread between chains and covers this.",
    )


def _far_from_posterior(evidence: Evidence) -> Finding | None:
    spread = float(np.mean(evidence.log_weight_sd))
    if spread <= LOG_WEIGHT_SD_FAR:
        return None
    return Finding(
        "warning",
        "far_from_posterior",
        f"q is far from the posterior: log p - log q varies by {spread:.3g} nats over draws from q.",
        "The local posterior is not a mixture of Gaussians (a singular or strongly curved minimum), so this "
        "variational llc is biased, as a rule upwards.",
        'Go on to the posterior\'s own value: correction="auto", or fastvi.correct(result). Until then read it as an '
        "upper estimate.",
    )


def _core_truncated(evidence: Evidence) -> Finding | None:
    if evidence.wanted_rank < evidence.rank_limit or evidence.rank_limit == 0 or evidence.wanted_rank <= evidence.rank:
        return None
    return Finding(
        "note",
        "core_truncated",
        f"The core is full ({evidence.rank} rows); {evidence.wanted_rank} or more directions are steeper.",
        "More steep directions than the core has rows; the diagonal has to cover those left out.",
        "Raise curvature_rank if memory allows.",
    )


def _khat(evidence: Evidence) -> Finding | None:
    khat, word, effective = evidence.importance
    if khat < USABLE:
        return None
    return Finding(
        "warning",
        "khat",
        f"Importance weights of q's draws are {word}: k-hat {khat:.2g}, {effective:.3g} effective draws.",
        "The posterior reaches where q hardly goes.",
        'Use correction="mcmc"; a better q needs more components (M), a larger rank (r) or a flow.',
    )


def _radius_rising(evidence: Evidence) -> Finding | None:
    steps = evidence.radius2.shape[1]
    late = evidence.radius2[:, -(steps // 4) :].mean(axis=1) if steps >= 40 else None
    if late is None:
        return None
    before = evidence.radius2[:, steps // 2 : -(steps // 4)].mean(axis=1)
    rise, chains = late - before, late.size
    error = float(np.std(rise, ddof=1) / np.sqrt(chains)) if chains > 1 else float("inf")
    if rise.mean() <= max(DRIFT_SHARE * before.mean(), DRIFT_SIGMAS * error):
        return None
    return Finding(
        "warning",
        "radius_rising",
        f"|w - w*|^2 still grows: by {100 * rise.mean() / before.mean():.3g} % within the last half.",
        "Directions in which the loss is flat widen slowly, or q is leaving the minimum.",
        "Raise steps; raise localization if the radius is out of bounds.",
    )


def _localizer_decides(evidence: Evidence) -> Finding | None:
    radius2 = float(np.mean(evidence.radius2[:, -max(1, evidence.radius2.shape[1] // 4) :]))
    decided = evidence.dim - evidence.localization * radius2
    error = evidence.dim * np.sqrt(2 / (evidence.dim * max(evidence.radius2.size // 4, 1)))
    if decided + 2 * error >= min(DECIDED_DIRECTIONS, DECIDED_SHARE * evidence.dim):
        return None
    return Finding(
        "note",
        "localizer_decides",
        f"The localizer sets the width of q: gamma E|w - w*|^2 is {evidence.localization * radius2:.4g} of d = "
        f"{evidence.dim}.",
        "n beta times the curvature of the loss is far below the localization in every direction.",
        "Lower localization, or raise nbeta (more data); llc is near zero as it stands.",
    )


def _weights_collapsed(evidence: Evidence) -> Finding | None:
    if evidence.num_components < 2 or evidence.dominant_weight < DOMINANT_WEIGHT:
        return None
    return Finding(
        "note",
        "weights_collapsed",
        f"One of {evidence.num_components} components has {100 * evidence.dominant_weight:.3g} % of the weight.",
        "The others found nothing to add, or lost an early race.",
        "Set alpha_dirichlet_prior to 1.05 to 1.2, or alpha_temperature=1.5 with alpha_temperature_frac=0.2; a smaller "
        "M does as well if llc stays the same.",
    )


def _rank_unused(evidence: Evidence) -> Finding | None:
    if evidence.longest_factor is None or evidence.longest_factor > UNUSED_VARIANCE:
        return None
    return Finding(
        "note",
        "rank_unused",
        f"The scree is flat: no factor adds more than {100 * evidence.longest_factor:.2g} % to the variance of any "
        "direction.",
        "The core and the diagonal already describe q.",
        "Go back to a smaller r, which is cheaper; it changes nothing.",
    )
