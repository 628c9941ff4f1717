"""Findings: what a careful reader would notice in a run, with the cause and the next step."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fastvi._html import Remark
from fastvi.evaluation.importance import USABLE, Importance
from fastvi.geometry.minimum import ROUNDING_UNITS, Bottom
from fastvi.sampling.run import (
    DRIFT,
    ERROR,
    GRADIENT_NOISE,
    LENGTH,
    TAKEN_BACK,
    Unmet,
)

SEVERITIES = ("error", "warning", "note")
# Distance of the virial from 1, which has no unit. At 0.1 the width of a Gaussian is off by 5 %,
# and its ELBO short by 0.0025 nats a dimension; at half by 0.0006, at double by 0.01.
VIRIAL_TOLERANCE = 0.1
# Spread of the chains over their own errors. Chance alone takes two equal fits beyond 4 once in
# 16,000 times, beyond half of it once in 20; double would pass fits of different optima.
CHAIN_SPREAD_SIGMAS = 4.0
# Nats. Log-normal weights of standard deviation s leave a share exp(-s^2) of the draws: 2 % at 2,
# 37 % at half of it, 1e-7 at double.
LOG_WEIGHT_SD_FAR = 2.0
# Findings of the problem. A value that is not of q keeps them; the others are of the fit.
OF_PROBLEM = (
    "improper_posterior",
    "unlocalized",
    "non_finite",
    "constant_loss",
    "negative_curvature",
    "not_a_minimum",
    "coarse_numbers",
    "localizer_decides",
    "core_truncated",
    "stiff",
    "uneven_weights",
    "weights_drift",
    "data_ended",
)
# Share of the weight in one component beside others, which then hold one draw in 20.
DOMINANT_WEIGHT = 0.95
# Variance that the longest factor row adds to 1: at 0.1 it widens one direction by 5 %.
UNUSED_VARIANCE = 0.1
# The loss narrows fewer directions than this number, and than this share of d. llc is then below
# half a direction, hence of the localizer alone.
DECIDED_DIRECTIONS, DECIDED_SHARE = 1.0, 0.1
# Rise of |w - w*|^2 over the last half: relative, and in standard errors over the chains. Double
# the first would pass a q that widens by a fifth.
DRIFT_SHARE, DRIFT_SIGMAS = 0.1, 4.0
# Shares of llc. Rounding of w adds up over parameters, that of the loss averages out over draws.
COARSE_WEIGHTS, COARSE_LOSS = 0.005, 0.5
# Rounding of the loss over llc. It averages out over steps, so a few times as much moves nothing;
# at a tenth, float32 losses of large n are named.
ROUNDED_SHARE = 0.02
# Nats of rounded products over llc. It is in the error whatever its size; half of it names language
# models at a percent of theirs, double leaves out what is more than the usual error.
ROUNDED_PRODUCTS = 0.02
# Nats by which n beta L_n may lie above its minimum. llc is short by about as many: half of what
# one regular parameter adds to it.
LEAST_GAIN = 0.25
# Standard errors below zero. Chance alone names 2 in 100 estimates of an llc of zero.
NEGATIVE_SIGMAS = 2.0
TRAIN_LONGER = (
    "Train longer (a decaying learning rate, full batches at the end), then estimate again."
)
SPLIT = "Of a checkpoint under way, read fastvi.split_llc(result): drift and spread."
SAMPLE = 'Sample the posterior: method="sample" or fastvi.correct(result, "sample").'
FIT_BETTER = "A better q takes more components (M), a larger rank (r) or a flow."


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

    @property
    def remark(self) -> Remark:
        """The finding for a page."""
        return Remark(self.severity, self.name, f"{self.observed} {self.cause}", self.next_step)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The numbers that findings are read from; arrays have a leading axis of chains.

    `newton_decrement` and `excess`, nbeta (L_n - L_n(w*)) at draws of q, are those of all data;
    `rounding` is how many nats of the latter may be rounding. `weight_rounding` is how many nats
    rounding w to its dtype adds to n beta L_n on average, `narrow_dtype` that dtype where the loss
    sees w in half precision, `loss_rounding` how many one unit in the last place of the loss stands
    for.
    """

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
    excess: np.ndarray
    rounding: float = 0.0
    weight_rounding: float = 0.0
    loss_rounding: float = 0.0
    narrow_dtype: str | None = None
    init_loss: float = 0.0
    bottom: Bottom = Bottom()
    in_memory: bool = True
    num_components: int = 1
    dominant_weight: float = 0.0
    longest_factor: float | None = None


def health_findings(evidence: Evidence) -> tuple[Finding, ...]:
    """Return what stands out, gravest first."""
    broken = (*_improper(evidence), *_non_finite(evidence))
    # A q that is not finite, or stands for nothing, triggers checks that say nothing.
    if any(finding.severity == "error" for finding in broken):
        return broken
    # The checks ask `not x <= bound` where a NaN is to be named.
    checks = (
        _improper,
        _constant_loss,
        _negative_curvature,
        _not_a_minimum,
        _coarse_numbers,
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
    return _by_severity(finding for check in checks for finding in check(evidence))


def correction_findings(result: Any) -> tuple[Finding, ...]:
    """Return the findings of a corrected estimate.

    Those of its fit that still matter, and its own.
    """
    # Findings of the fit speak of q, which no longer is the estimate.
    kept = (finding for finding in result.health if finding.name in OF_PROBLEM)
    checks = (
        _non_finite_value,
        _negative_llc,
        _importance_unreliable,
        _walk_unsettled,
        _rounded_loss,
        _rounded_products,
        _q_was_off,
    )
    found = (finding for check in checks for finding in check(result))
    return _by_severity((*kept, *found))


def with_stopped(result: Any) -> tuple[Finding, ...]:
    """Return the findings of an uncorrected estimate whose fit was ended early, and that one."""
    steps = result.traces["elbo"].shape[1]
    stopped = Finding(
        "warning",
        "fit_stopped",
        f"The fit came to {result.stopped} after {steps} steps.",
        "Its learning rate had not fallen to the end, so that q is noisier and wider than it need "
        "be.",
        "Give it more time.",
    )
    return _by_severity((*result.health, stopped))


def not_improved(found: Any) -> Finding:
    """Return the finding of an estimate that was gone on from in vain."""
    return Finding(
        "note",
        "not_improved",
        f"Going on came to {found.stopped or 'the end of its budget'} with an error of "
        f"{found.llc_sem:.2g}, above the one before, which is kept.",
        "A smaller error took more exact steps, whose average began anew.",
        "Give it more time, or a larger budget.",
    )


def _by_severity(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort findings, gravest first; equals keep the order of their checks."""
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def _non_finite_value(result: Any) -> Iterator[Finding]:
    if not (math.isfinite(result.llc) and math.isfinite(result.llc_sem)):
        yield Finding(
            "error",
            "non_finite",
            f"NaN or infinity appeared in the correction (method {result.correction.method}).",
            "The loss or its gradient overflows where the posterior reaches beyond q, or steps "
            "were too long.",
            "Check that loss and gradient are finite a few standard deviations around w*; raise "
            "localization.",
        )


def _negative_llc(result: Any) -> Iterator[Finding]:
    least = -NEGATIVE_SIGMAS * result.llc_sem
    if not result.llc < least:
        return
    # of a quadratic the drift is at least as negative, and the rest of llc is not negative
    gain = result.curvature.newton_decrement
    is_explained = bool(result.llc + gain >= least)
    said = f"; a Newton step from w* gains {gain:.2g} nats, which explains it" * is_explained
    yield Finding(
        "warning" if is_explained else "error",
        "negative_llc",
        f"The corrected llc is negative: {result.llc:.4g} ± {result.llc_sem:.2g}{said}.",
        "The posterior lies where the loss is below that at w*, so w* is not its minimum.",
        f"{TRAIN_LONGER} {SPLIT}",
    )


def _importance_unreliable(result: Any) -> Iterator[Finding]:
    details = result.correction
    if details.method == "reweight" and not details.khat < USABLE:
        yield Finding(
            "warning",
            "importance_unreliable",
            f"The importance weights have k-hat {details.khat:.2g}, above {USABLE}.",
            "q misses part of the posterior, so a few draws carry the estimate.",
            SAMPLE if details.in_memory else FIT_BETTER,
        )


def _walk_unsettled(result: Any) -> Iterator[Finding]:
    details = result.correction
    if details.settled or not math.isfinite(result.llc):
        return
    if details.method == "reweight":
        yield Finding(
            "warning",
            "walk_unsettled",
            f"A budget of {result.config.budget:.4g} sample gradients pays for no walk: llc is "
            "that of reweighted draws of q.",
            f"The shortest walk takes {details.least_budget:.0f}.",
            f"Raise budget to {math.ceil(details.least_budget)} or more.",
        )
        return
    unmet = {one.criterion: one for one in details.unmet}
    said = [f"{one.criterion} {one.value:.3g} ({one.bound:.3g} is asked)" for one in unmet.values()]
    end, (cause, next_step) = "the end of its budget", _why_unsettled(unmet, result)
    if result.stopped is not None:
        end = f"{result.stopped}, which ended it,"
        next_step = "Go on from here with result.more(), or give it more time."
    elif any(finding.name == "data_ended" for finding in result.health):
        end, next_step = "the end of its data", "Give more examples, or ask for a larger error."
    yield Finding(
        "warning",
        "walk_unsettled",
        f"Sampling came to {end} after {details.steps} steps of {details.walkers} "
        f"walkers with {' and '.join(said)}.",
        cause,
        next_step,
    )


def _why_unsettled(unmet: dict[str, Unmet], result: Any) -> tuple[str, str]:
    """Return cause and next step for the criteria that failed.

    Only what moves one of them is advised.
    """
    narrow = result.correction.narrow_dtype
    if any(finding.name == "improper_posterior" for finding in result.health):
        return "The posterior is improper: walkers have nowhere to settle.", "Set localization > 0."
    if narrow is not None and set(unmet) - {LENGTH, GRADIENT_NOISE}:
        return (
            f"Parameters or loss are {narrow}, which rounds the loss more coarsely than walkers "
            "move it.",
            "Cast parameters and data to float32 before the estimate.",
        )
    if TAKEN_BACK in unmet:
        return (
            "On some batches the gradient throws walkers out, as with few examples of large "
            "curvature, or the loss is not finite near. What these say of llc is left out.",
            "Begin at a fit, for which all examples are measured: sampler={'start': 'fit'}; or "
            "raise localization.",
        )
    budget = float(result.config.budget)
    if set(unmet) <= {LENGTH, GRADIENT_NOISE}:
        return (
            f"A budget of {budget:.4g} sample gradients pays for no longer or more exact walk.",
            f"Raise budget to {math.ceil(result.correction.least_budget)} or more.",
        )
    if set(unmet) <= {ERROR, DRIFT} and result.error_parts.largest == "relaxation":
        return (
            "Walkers still spread along wide directions, which the loss and so llc hardly feel.",
            "Raise budget; or raise localization, which narrows these directions and "
            "changes the posterior.",
        )
    if set(unmet) == {ERROR}:
        # The error falls as the root of the budget.
        wanted = budget * (unmet[ERROR].value / unmet[ERROR].bound) ** 2
        # Rounded up to one digit, so never to what it was.
        digit = 10.0 ** math.floor(math.log10(wanted))
        return (
            "The walkers agree; their records are too few for the error that was asked for.",
            f"Raise budget to about {math.ceil(wanted / digit) * digit:.0e}, or error to what is "
            "enough.",
        )
    return (
        "The walkers have not yet seen the whole posterior, so llc_sem may be too small.",
        "Raise budget, or fit longer with early_stop=True."
        if result.has_fit
        else "Raise budget, or begin at a fit: sampler={'start': 'fit'}.",
    )


def _rounded_loss(result: Any) -> Iterator[Finding]:
    rounding = result.correction.rounding or 0.0
    if rounding > ROUNDED_SHARE * abs(result.llc):
        yield Finding(
            "note",
            "rounded_loss",
            f"Rounding of the loss changes the energy of a walker by {rounding:.2g} nats at every "
            "step, however short it is.",
            "The model or its loss computes in few digits (bfloat16, float16), or the loss is "
            "large beside its changes. Step sizes were chosen by what is left without that.",
            "llc is that of the loss as it is computed. Compute it in float32, or float64, to see "
            "what rounding adds.",
        )


def _rounded_products(result: Any) -> Iterator[Finding]:
    rounding = result.correction.product_rounding or 0.0
    if abs(rounding) > ROUNDED_PRODUCTS * abs(result.llc):
        yield Finding(
            "warning",
            "rounded_products",
            f"The digits that products of matrices leave out add {rounding:.3g} nats to the loss "
            "where walkers are.",
            "By default, jax multiplies float32 matrices with 11 bits on GPUs and 8 on TPUs, and "
            "layers whose products cancel show it.",
            "Set jax.config.update('jax_default_matmul_precision', 'highest') before the estimate; "
            "or read llc as that of the loss as it is computed.",
        )


def _q_was_off(result: Any) -> Iterator[Finding]:
    gap, noise = result.llc_vi - result.llc, np.hypot(result.llc_vi_sem, result.llc_sem)
    # NaN, where there is no q, is no gap.
    if abs(gap) > max(3 * noise, 0.05 * abs(result.llc)):
        yield Finding(
            "note",
            "corrected",
            f"q alone gives {result.llc_vi:.4g}, the correction {result.llc:.4g}.",
            "q and the draws of the correction weigh the neighbourhood of w* differently.",
            "llc is that of the correction; llc_vi keeps that of q.",
        )


def _improper(evidence: Evidence) -> Iterator[Finding]:
    bottom = evidence.bottom
    level = f"{bottom.level} of {evidence.dim} directions"
    if bottom.level and bottom.is_flat:
        yield Finding(
            "error",
            "improper_posterior",
            f"The posterior is improper: localization is 0, and the loss is flat along {level}.",
            "Nothing bounds w there, so the posterior cannot be normalised and no draw stands for "
            "it.",
            "Set localization > 0 (1.0 is the default), or leave these parameters out "
            "(param_mask).",
        )
    elif bottom.level:
        yield Finding(
            "note",
            "unlocalized",
            f"localization is 0, and the loss has no curvature at w* along {level}.",
            "Only higher orders of the loss bound the posterior there; a symmetry of the model "
            "would not.",
            "Set localization > 0 unless the loss is known to rise along all of them.",
        )


def _constant_loss(evidence: Evidence) -> Iterator[Finding]:
    if np.all(np.abs(evidence.excess) <= evidence.rounding / ROUNDING_UNITS):
        yield Finding(
            "error",
            "constant_loss",
            f"The loss is constant: at {evidence.excess.size} draws of q it is what it is at w*.",
            "It does not depend on the parameters that vary, or rounding hides by how much it "
            "does.",
            "Let loss_fn use the parameters that it is given (no stop_gradient, no weights of a "
            "closure); subtract a large "
            'constant, or use dtype="float64".',
        )


def _negative_curvature(evidence: Evidence) -> Iterator[Finding]:
    bottom = evidence.bottom
    if bottom.fall > 0:
        yield Finding(
            "warning",
            "negative_curvature",
            "w* is a saddle or a maximum: along one direction n beta L_n falls by "
            f"{bottom.fall:.2g} nats or more on both sides (curvature of n beta L_n + localizer "
            f"{bottom.curvature + evidence.localization:.3g}, without the localizer "
            f"{bottom.curvature:.3g}).",
            "The learning coefficient is defined at a local minimum; this direction enters llc "
            "with a negative sign.",
            TRAIN_LONGER,
        )


def _non_finite(evidence: Evidence) -> Iterator[Finding]:
    bad = ~np.isfinite(evidence.elbo)
    if not math.isfinite(evidence.init_loss):
        yield Finding(
            "error",
            "non_finite",
            f"L_n(w*), the loss of all data at w* itself, is {evidence.init_loss}.",
            "Some example gives NaN or infinity at the trained parameters.",
            "Evaluate the loss example by example at w* to find it, and clean the data or the "
            "loss.",
        )
    elif bad.any() or not np.all(np.isfinite(evidence.llc_per_chain)):
        where = "in the final evaluation"
        if bad.any():
            step = int(np.argmax(bad.any(axis=0)))
            chains = ", ".join(map(str, np.flatnonzero(bad[:, step])))
            where = f"first at step {step}, chain {chains}"
        yield Finding(
            "error",
            "non_finite",
            f"NaN or infinity appeared, {where}.",
            "The loss overflows somewhere under q (exp, log or division), or the fit diverged.",
            "Check that the loss is finite a few standard deviations around w*; raise localization "
            "or lower lr.",
        )


def _not_a_minimum(evidence: Evidence) -> Iterator[Finding]:
    error = float(np.sqrt(np.mean(evidence.llc_sem_per_chain**2)))
    negative = evidence.llc_per_chain.mean() < -NEGATIVE_SIGMAS * error
    lower = -float(np.min(evidence.excess, initial=0.0)) - evidence.rounding
    newton = evidence.newton_decrement
    signs = {
        f"a Newton step from w* would raise the log posterior by about {newton:.2g} nats": (
            newton > LEAST_GAIN
        ),
        f"at a draw of q n beta L_n is {lower:.2g} nats lower": lower > LEAST_GAIN,
        "llc is negative": negative,
    }
    seen = [words for words, is_seen in signs.items() if is_seen]
    return not_a_minimum(seen, bool(negative))


def not_a_minimum(seen: list[str], negative: bool = False) -> Iterator[Finding]:
    """Say that w* is not a minimum, by the signs that were seen."""
    if seen:
        yield Finding(
            "error" if negative else "warning",
            "not_a_minimum",
            f"w* is not a minimum: {', and '.join(seen)}.",
            "The learning coefficient is defined at a local minimum; elsewhere the loss falls away "
            "from w*, and llc is too small by about as many nats.",
            f"{TRAIN_LONGER} {SPLIT}",
        )


def _coarse_numbers(evidence: Evidence) -> Iterator[Finding]:
    llc = abs(float(evidence.llc_per_chain.mean()))
    return coarse_numbers(llc, evidence)


def coarse_numbers(llc: float, seen: Any) -> Iterator[Finding]:
    """Hold the rounding of weights and loss, in nats of n beta L_n, against |llc|.

    `seen` has `weight_rounding`, `loss_rounding` and `narrow_dtype`, as evidence or a look at the
    loss has them.
    """
    weights, loss, narrow = seen.weight_rounding, seen.loss_rounding, seen.narrow_dtype
    dtype = narrow or "its dtype"
    signs = {
        f"rounding w to {dtype} adds about {weights:.2g} nats to n beta L_n": (
            weights > COARSE_WEIGHTS * llc
        ),
        f"one unit in the last place of the loss is {loss:.2g} nats of n beta L_n": (
            loss > COARSE_LOSS * llc
        ),
    }
    found = [words for words, is_seen in signs.items() if is_seen]
    # Nothing is small beside an llc of zero.
    if found and llc != 0:
        yield Finding(
            "warning",
            "coarse_numbers",
            f"Numbers are too coarse for this posterior: {' and '.join(found)}, where llc is "
            f"{llc:.3g}.",
            "The posterior is narrow beside the spacing of floating-point numbers near w*, or the "
            "loss is large beside its changes.",
            f"Compute in float32 what the model computes in {narrow}."
            if narrow is not None
            else 'Use dtype="float64" with jax_enable_x64 (and parameters and data of that dtype); '
            "subtract a large constant from the loss; shift parameters that are far from 0.",
        )


def _not_converged(evidence: Evidence) -> Iterator[Finding]:
    # The stopping rule allows the same 0.5 nats (docs/math.md, Stopping).
    if not evidence.converged and not evidence.elbo_gain <= max(2 * evidence.elbo_gain_error, 0.5):
        yield Finding(
            "warning",
            "elbo_rising",
            f"The ELBO still rises: {evidence.elbo_gain:.3g} ± {evidence.elbo_gain_error:.2g} nats "
            "over the last half.",
            "The fit ran out of steps.",
            "Raise steps, or lr if grad_norm is small and steady.",
        )


def _virial(evidence: Evidence) -> Iterator[Finding]:
    mean = float(np.mean(evidence.virial))
    error = float(np.std(evidence.virial) / np.sqrt(max(evidence.virial.size, 1)))
    if not abs(mean - 1) <= max(VIRIAL_TOLERANCE, 3 * error):
        yield Finding(
            "warning",
            "virial",
            f"The virial is {mean:.3g}, and 1 at the best fit.",
            f"q is too {'wide' if mean > 1 else 'narrow'}: the fit has not converged, or its "
            "gradients are dominated by outliers.",
            "Raise steps or samples_per_step.",
        )


def _chains_disagree(evidence: Evidence) -> Iterator[Finding]:
    values, errors = evidence.llc_per_chain, evidence.llc_sem_per_chain
    # One fit has no spread.
    if values.size < 2:
        return
    spread, expected = float(np.std(values, ddof=1)), float(np.sqrt(np.mean(errors**2)))
    if not spread <= max(CHAIN_SPREAD_SIGMAS * expected, 0.02 * abs(values.mean())):
        yield Finding(
            "warning",
            "chains_disagree",
            f"Chains differ by {spread:.3g} (standard deviation) where their own errors are "
            f"{expected:.2g}.",
            "The fits ended at different q: not converged, or several optima.",
            "Raise steps; llc_sem is the spread between chains and covers this.",
        )


def _far_from_posterior(evidence: Evidence) -> Iterator[Finding]:
    spread = float(np.mean(evidence.log_weight_sd))
    if not spread <= LOG_WEIGHT_SD_FAR:
        yield Finding(
            "warning",
            "far_from_posterior",
            f"q is far from the posterior: log p - log q varies by {spread:.3g} nats over draws "
            "from q.",
            "The local posterior is not a mixture of Gaussians (a singular or strongly curved "
            "minimum), so this variational llc is biased, as a rule upwards.",
            f"{SAMPLE if evidence.in_memory else FIT_BETTER} Until then read it as an upper "
            "estimate.",
        )


def _core_truncated(evidence: Evidence) -> Iterator[Finding]:
    if evidence.wanted_rank >= evidence.rank_limit > 0 and evidence.wanted_rank > evidence.rank:
        yield Finding(
            "note",
            "core_truncated",
            f"The core is full ({evidence.rank} rows); {evidence.wanted_rank} or more directions "
            "are steeper.",
            "More steep directions than the core has rows; the diagonal has to cover those left "
            "out.",
            "Raise curvature_rank if memory allows.",
        )


def _khat(evidence: Evidence) -> Iterator[Finding]:
    khat, word, effective = evidence.importance
    if not khat < USABLE:
        yield Finding(
            "warning",
            "khat",
            f"Importance weights of q's draws are {word}: k-hat {khat:.2g}, {effective:.3g} "
            "effective draws.",
            "The posterior reaches where q hardly goes.",
            f"{SAMPLE} {FIT_BETTER}" if evidence.in_memory else FIT_BETTER,
        )


def _radius_rising(evidence: Evidence) -> Iterator[Finding]:
    steps, quarter = evidence.radius2.shape[1], evidence.radius2.shape[1] // 4
    # The mean of fewer than ten steps is mostly their noise.
    if quarter < 10:
        return
    before = evidence.radius2[:, steps // 2 : -quarter].mean(axis=1)
    rise = evidence.radius2[:, -quarter:].mean(axis=1) - before
    # One chain alone has no error, and is never named.
    error = float(np.std(rise, ddof=1) / np.sqrt(rise.size)) if rise.size > 1 else float("inf")
    if not rise.mean() <= max(DRIFT_SHARE * before.mean(), DRIFT_SIGMAS * error):
        yield Finding(
            "warning",
            "radius_rising",
            f"|w - w*|^2 still grows: by {100 * rise.mean() / before.mean():.3g} % within the last "
            "half.",
            "Directions in which the loss is flat widen slowly, or q is leaving the minimum.",
            "Raise steps; raise localization if the radius is out of bounds.",
        )


def _localizer_decides(evidence: Evidence) -> Iterator[Finding]:
    radius2 = float(np.mean(evidence.radius2[:, -max(1, evidence.radius2.shape[1] // 4) :]))
    # Along a direction that the localizer alone bounds, gamma v^2 is 1 on average.
    decided = evidence.dim - evidence.localization * radius2
    # Their sum is chi-squared with dim degrees of freedom, of variance 2 dim.
    error = evidence.dim * np.sqrt(2 / (evidence.dim * max(evidence.radius2.size // 4, 1)))
    if not decided + 2 * error >= min(DECIDED_DIRECTIONS, DECIDED_SHARE * evidence.dim):
        yield Finding(
            "note",
            "localizer_decides",
            "The localizer sets the width of q: gamma E|w - w*|^2 is "
            f"{evidence.localization * radius2:.4g} of d = {evidence.dim}.",
            "n beta times the curvature of the loss is far below the localization in every "
            "direction.",
            "Lower localization, or raise nbeta (more data), for an llc that speaks of the loss.",
        )


def _weights_collapsed(evidence: Evidence) -> Iterator[Finding]:
    if evidence.num_components > 1 and not evidence.dominant_weight < DOMINANT_WEIGHT:
        yield Finding(
            "note",
            "weights_collapsed",
            f"One of {evidence.num_components} components has "
            f"{100 * evidence.dominant_weight:.3g} % of the weight.",
            "The others found nothing to add, or lost an early race.",
            "Set alpha_dirichlet_prior to 1.05 to 1.2, or alpha_temperature=1.5 with "
            "alpha_temperature_frac=0.2; a smaller M does as well if llc stays the same.",
        )


def _rank_unused(evidence: Evidence) -> Iterator[Finding]:
    if evidence.longest_factor is not None and not evidence.longest_factor > UNUSED_VARIANCE:
        yield Finding(
            "note",
            "rank_unused",
            f"The scree is flat: no factor adds more than {100 * evidence.longest_factor:.2g} % "
            "to the variance of any direction.",
            "The core and the diagonal already describe q.",
            "Go back to a smaller r, which is cheaper; it changes nothing.",
        )
