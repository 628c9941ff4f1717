"""Findings: what a careful reader would notice in a run, with the cause and the next step."""

import dataclasses
from typing import Any

import numpy as np

from fastvi.diagnostics.importance import USABLE

SEVERITIES = ("error", "warning", "note")
VIRIAL_TOLERANCE = 0.1
CHAIN_SPREAD_SIGMAS = 4.0
LOG_WEIGHT_SD_FAR = 2.0  # nats; importance weights of a log-normal this wide have an effective sample of 2 %
STILL_MATTER = ("non_finite", "not_a_minimum", "core_truncated")  # findings of a fit that a correction leaves standing
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


def health_findings(evidence: Evidence) -> tuple[Finding, ...]:
    """Return what stands out, gravest first."""
    broken = _non_finite(evidence)
    if broken is not None:
        return (broken,)
    checks = (_not_a_minimum, _not_converged, _virial, _chains_disagree, _far_from_posterior, _core_truncated)
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
