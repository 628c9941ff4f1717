"""What a person gets from an estimate.

Numbers, their errors, findings, and a folder to keep them in.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from textwrap import TextWrapper
from typing import Any, NamedTuple

import numpy as np

from fastvi._errors import DataError
from fastvi._html import result_html
from fastvi._modes import in_own_modes
from fastvi._numbers import with_error
from fastvi._typing import Given
from fastvi.config import VIConfig
from fastvi.evaluation.errors import ErrorParts
from fastvi.evaluation.importance import Importance, assess_importance
from fastvi.fitting.protocols import Progress
from fastvi.observables.draws import FittedQ
from fastvi.results.early_end import EarlyEnd
from fastvi.results.findings import Finding, not_improved
from fastvi.results.parts import ChainValues, Correction, Curvature, DrawValues, Timings
from fastvi.results.saved import read_estimate, write_estimate
from fastvi.results.work import RunWork
from fastvi.target.hessian import SecondDerivative

SUMMARY_WIDTH = 80  # letters, those of the narrowest common terminal
# What each part of an error is the error of.
ERRORS = {
    "statistical": "few draws that depend on each other",
    "relaxation": "walkers that have not spread",
    "dynamics": "finite steps and noisy gradients",
    "evaluation": "what was read of the data",
}
NO_FINDINGS = "none: no check was triggered, which does not prove that llc is right"
# Entries of D^{1/2} that a result keeps of each chain, 16 KiB: a histogram of 41 bins has 100 in
# each. All of them would make the result of a large model as large as the model.
MOST_SCALES = 4096


class More(NamedTuple):
    """How a walk is to go on.

    Attributes:
        error: Standard error at which it may end, relative to llc.
        budget: Sample gradients that it may add; None for as many as an estimate may take.
        early_end: Says whether to end before that.
        progress: As in `estimate_llc`.
        throw: The same.
    """

    error: float
    budget: float | None
    early_end: EarlyEnd
    progress: bool | Callable[[Progress], None]
    throw: bool


@dataclasses.dataclass(frozen=True)
class LLCEstimate:
    """An estimate of the local learning coefficient.

    Attributes:
        llc: lambda-hat = nbeta (E_q[L_n(w)] - L_n(w*)), mean over chains.
        llc_sem: Standard error of `llc`; `coverage` says of what. Uncorrected, it is that of q's
            own value: Monte Carlo under q and, of two or more chains, the spread of the fits, but
            not the distance of q from the posterior (`distance` estimates it). Reweighted, that of
            the weighted draws. Sampled, that of the walkers.
        error_parts: What `llc_sem` is made of: statistical, relaxation, dynamics and evaluation
            errors, whose squares add up to its square.
        llc_per_chain: One value for each chain, or for each share of the walkers, shape (chains,).
        llc_sem_per_chain: Error of each of these alone, of the same shape.
        elbo: Lower bound on log of the posterior's normalising constant, in nats, mean over chains.
        init_loss: L_n(w*), in nats.
        nbeta: n times the inverse temperature.
        localization: gamma of the Gaussian localizer.
        n_data: Number of examples.
        dim: Number of parameters.
        converged: Whether the stopping rule was met before the cap on steps; None without the rule.
        curvature: What is known of the spectrum at w*.
        evaluation: What each chain's q says by itself.
        work: Counts of calls, and full-gradient equivalents by stage.
        timings: Seconds by stage.
        traces: Arrays of shape (chains, steps).
        log_weights: log p(w) - log q(w) at the evaluation's draws, shape (chains, draws).
        draws: The draws that q was evaluated at.
        family_arrays: What the fitted q looks like, each with a first axis of chains: pi, D_sqrt
            (sorted, at most `MOST_SCALES` quantiles of it), factor_norm2 (component, rank).
        snapshots: With `tensorboard=True` the family's arrays after every `eval_every` steps, each
            of shape (chains, snapshots, ...), and the steps' numbers, `step`.
        health: Findings, gravest first.
        config: The configuration that ran, with nothing left open that had an effect.
        llc_vi: The variational value, under q: `llc` where nothing corrects it.
        llc_vi_sem: Its standard error, under q.
        correction: How `llc` was found where it is the posterior's own; None for that of q.
        walk_llc: nbeta (L_n(w) - L_n(w*)), means over bins of `sampler.bin_length`
            steps, shape (walkers, bins).
        stopped: What ended the estimate before it was done, its time limit or Ctrl-C; None where
            it came to its own end.
        fitted: What `fastvi.correct` goes on from, and `q` draws from; not saved.
        ensemble: The walkers, which `fastvi.sample_posterior` goes on from; not saved.
        going_on: What `more` calls; not saved.
    """

    llc: float
    llc_sem: float
    error_parts: ErrorParts
    llc_per_chain: np.ndarray
    llc_sem_per_chain: np.ndarray
    elbo: float
    init_loss: float
    nbeta: float
    localization: float
    n_data: int
    dim: int
    converged: bool | None
    curvature: Curvature
    evaluation: ChainValues
    work: RunWork
    timings: Timings
    traces: dict[str, np.ndarray] = dataclasses.field(repr=False)
    log_weights: np.ndarray = dataclasses.field(repr=False)
    draws: DrawValues = dataclasses.field(repr=False)
    health: tuple[Finding, ...]
    config: VIConfig
    llc_vi: float
    llc_vi_sem: float
    correction: Correction | None = None
    walk_llc: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    family_arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    snapshots: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    stopped: str | None = None
    fitted: Any = dataclasses.field(default=None, repr=False, compare=False)
    ensemble: Any = dataclasses.field(default=None, repr=False, compare=False)
    going_on: Callable[["LLCEstimate", More], "LLCEstimate"] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    def summary(self) -> str:
        """Return the estimate in words, for a terminal."""
        chains = "  ".join(f"{value:.4g}" for value in self.llc_per_chain)
        is_walk = self.correction is not None and self.correction.method == "sample"
        lines = [
            f"llc            {self.llc_text}   ({self.provenance})",
            f"error          {self.coverage}",
            f"{'per walkers' if is_walk else 'per chain':<15}{chains}",
            f"problem        d = {self.dim:,}, n = {self.n_data:,}, n beta = {self.nbeta:.4g}, "
            f"localization = {self.localization:.4g}, L_n(w*) = {self.init_loss:.4g}",
            *(self._fit_lines() if self.has_fit else self._walk_lines()),
        ]
        findings = [str(finding) for finding in self.health] or [NO_FINDINGS]
        wrap = TextWrapper(width=SUMMARY_WIDTH, initial_indent="  ", subsequent_indent="    ")
        return "\n".join([*map(_folded, lines), "findings", *map(wrap.fill, findings)])

    @in_own_modes
    def more(
        self,
        error: Given[float | None] = None,
        *,
        budget: Given[float | None] = None,
        time_limit: Given[float | None] = None,
        progress: Given[bool | Callable[[Progress], None]] = True,
        throw: Given[bool] = True,
    ) -> "LLCEstimate":
        """Go on with the walk of this estimate from where it is, to a smaller error.

        Draws of q that were reweighted stay where they are good enough, else walkers start at them.
        What it has averaged counts, so that it costs what an estimate to this error would have cost
        beyond what this one did. Where its steps or its blocks of data are too inexact for the new
        error, the average begins anew at these walkers, which have burnt in. This estimate stays as
        it is, and may be gone on from again. Where time or budget end before the new average is as
        good as this one, this one is returned, with the work of both and a finding that says so.

        Args:
            error: Standard error at which it may end, relative to llc; that of this estimate when
                left out, for one that ended before it.
            budget: Sample gradients that it adds at most; as many as a new estimate may take when
                left out.
            time_limit: As in `fastvi.estimate_llc`.
            progress: The same.
            throw: The same.

        Returns:
            The estimate, whose work and timings are those of both.

        Raises:
            ConfigError: If an option is impossible, or the budget pays for no step.
            DataError: If there is no walk to go on with, or the loss has changed.
            NonFiniteError: If NaN or infinity appears, unless `throw` is False.
        """
        if self.going_on is None:
            raise DataError(self._why_no_more)
        config = self.config.replace(
            **{
                name: value
                for name, value in {"error": error, "budget": budget}.items()
                if value is not None
            }
        )
        early_end = EarlyEnd(time_limit)
        asked = More(config.filled.error, budget, early_end, progress, throw)
        with early_end.interruptible(tells=progress is True):
            found = self.going_on(self, asked)
        is_better = found.llc_sem <= self.llc_sem or not math.isfinite(found.llc_sem)
        if is_better or found.correction is None or not found.correction.unmet:
            return found
        return dataclasses.replace(
            self,
            work=found.work,
            timings=found.timings,
            stopped=found.stopped,
            health=(*self.health, not_improved(found)),
        )

    @property
    def _why_no_more(self) -> str:
        """Say why no walk goes on, and what to do instead."""
        if self.correction is None:
            return (
                "this estimate is that of q, without a walk that could go on. Use "
                'fastvi.correct(result, "sample", error=...).'
            )
        if self.correction.method == "reweight":
            return (
                "this estimate reweights a fixed number of draws of q, and has no walk that could "
                'go on. Use fastvi.correct(result, "sample", error=...).'
            )
        return (
            "this estimate does not hold its walkers: it was loaded from disk, or is not the last "
            "of a curve, or its walkers are too large to keep or divided, or its data are gone. "
            "Run estimate_llc again with a smaller error."
        )

    def _repr_html_(self) -> str:
        """Return the estimate for a notebook."""
        lead = (
            f"{self.provenance}; d = {self.dim:,}, n = {self.n_data:,}, nβ = {self.nbeta:.4g}, "
            f"localization = {self.localization:.4g}"
        )
        remarks = [finding.remark for finding in self.health]
        return result_html(self.summary(), f"llc {self.llc_text}", lead, remarks)

    @property
    def has_fit(self) -> bool:
        """Whether a q was fitted; a walk from the localizer has none."""
        return self.log_weights.size > 0

    def _walk_lines(self) -> list[str]:
        """Say what a walk without a fit was."""
        details = self.correction
        assert details is not None, "an estimate without a fit is a walk"
        return [
            f"walk           {details.steps} steps of {details.step_size:.2g} x "
            f"{details.walkers} walkers, {details.batch} fresh examples each",
            f"work           {self.sample_gradients:,.0f} sample gradients "
            f"({self.work.total_fge:.3g} FGE)",
            f"time           {self.timings.total:.1f} s; about {self.timings.compile:.1f} s of it "
            "compiling",
        ]

    def _fit_lines(self) -> list[str]:
        """Say what the fit was."""
        fits, steps = next(iter(self.traces.values())).shape
        stop = {None: "fixed length", True: "stopped by itself", False: "cap reached"}[
            self.converged
        ]
        khat, word, effective = self.importance
        draws, limit = self.log_weights.shape[-1], self.config.clip_global_norm
        has_variate = self.config.control_variate != "none"
        # The option's name says a norm; its value is a multiple (docs/math.md, Optimiser).
        clipping = "" if limit is None else f", norms clipped at {limit:g} x usual"
        return [
            f"elbo           {self.elbo:.4f} nats",
            f"importance     k-hat {khat:.2g} ({word}), {effective:.3g} effective of "
            f"{self.log_weights.size} draws",
            # An evaluation of few draws has none where nothing was asked for.
            *([] if has_variate else [f"evaluation     {draws} draws, no control variate"]),
            f"core           rank {self.curvature.rank} of {self.dim:,}, explains "
            f"{100 * self.curvature.explained:.3g} % of the precision's trace at w*",
            # said where it is not autodiff's usual way
            *(
                [f"curvature      by {self.curvature.products}"]
                if self.curvature.products != SecondDerivative.FORWARD.value
                else []
            ),
            f"fit            {steps} steps x {fits} {'chain' if fits == 1 else 'chains'} "
            f"({stop}){clipping}",
            f"work           {self.sample_gradients:,.0f} sample gradients, "
            f"{self.work.total_fge:.0f} FGE: curvature {self.work.fge_curvature:.0f}, "
            f"fit {self.work.fge_fit:.0f}, evaluation {self.work.fge_evaluation:.0f}"
            + (f", correction {self.work.fge_correction:.0f}" if self.correction else ""),
            f"time           {self.timings.total:.1f} s: fit "
            f"{self.timings.adaptation + self.timings.sampling:.1f} s, evaluation "
            f"{self.timings.evaluation:.1f} s"
            + (f", correction {self.timings.correction:.1f} s" if self.correction else "")
            + f"; about {self.timings.compile:.1f} s of it compiling",
        ]

    @property
    def sample_gradients(self) -> float:
        """All work: one example's gradient at one point is 1, its loss 1/3, its HVP 2."""
        return self.work.total_fge * self.n_data

    @property
    def q(self) -> FittedQ:
        """The fitted q, to draw from: see `fastvi.FittedQ`.

        Raises:
            DataError: If the result is a walk without a fit, or was loaded from disk.
        """
        return self.fit_for("draw from").q

    def of_masked(self, is_masked: bool) -> "LLCEstimate":
        """Say whether the caller passed all parameters and a mask: draws are of that form."""
        fitted, ensemble = self.fitted, self.ensemble
        if fitted is not None:
            fitted = fitted._replace(is_masked=is_masked)
        if ensemble is not None:
            target = dataclasses.replace(ensemble.target, is_masked=is_masked)
            ensemble = dataclasses.replace(ensemble, target=target)
        return dataclasses.replace(self, fitted=fitted, ensemble=ensemble)

    def fit_for(self, purpose: str) -> Any:
        """Return `fitted`.

        Args:
            purpose: What it is wanted for, as the error says it.

        Raises:
            DataError: If there is none.
        """
        if self.fitted is not None:
            return self.fitted
        # The two ways out differ: a walk needs another start, a loaded estimate only a new run.
        if not self.has_fit:
            raise DataError(
                f"this estimate is a walk from the localizer: it has no fit to {purpose}. Run "
                "estimate_llc again, with a larger budget for a smaller error, or with "
                "sampler={'start': 'fit'} for a fit."
            )
        raise DataError(
            f"this estimate holds no fit to {purpose} (it was loaded from disk, or is not the "
            "last of a curve). Run estimate_llc again."
        )

    @property
    def distance(self) -> float:
        """First-order estimate of how far the LLC of q is from that of the posterior.

        It is the covariance, over draws of q, of the excess loss and log p - log q.
        """
        # One infinite weight leaves no covariance, and a walk has no q.
        if not self.log_weights.size or not np.all(np.isfinite(self.log_weights)):
            return float("nan")
        excess, weights = (
            np.asarray(values, float) - np.mean(values, axis=1, keepdims=True, dtype=float)
            for values in (self.draws.excess_loss, self.log_weights)
        )
        return abs(float(self.nbeta * np.mean(excess * weights)))

    @property
    def llc_text(self) -> str:
        """`llc` with its error, and no more digits than the error and `distance` allow."""
        # A corrected value is the posterior's own, however far q is from it.
        return with_error(self.llc, self.llc_sem, 0.0 if self.correction else self.distance)

    @property
    def coverage(self) -> str:
        """Say what `llc_sem` covers, and what it does not."""
        fits = self.log_weights.shape[0]
        spread = f" and the spread of {fits} fits" if fits > 1 else ""
        if self.correction is None:
            other = "" if fits > 1 else "; nor of another fit, as there is one alone"
            return (
                f"Monte Carlo under q{spread}; not of how far q is from the posterior, which is "
                f"about {self.distance:.1g} by its weights{other}"
            )
        if self.correction.method == "reweight":
            return f"Monte Carlo of the weighted draws{spread}"
        parts, first = self.error_parts._asdict(), self.error_parts.largest
        others = ", ".join(f"{name} {parts[name]:.1g}" for name in parts if name != first)
        return f"mostly {first}, {parts[first]:.2g} for {ERRORS[first]}; {others}"

    @property
    def importance(self) -> Importance:
        """How well draws of q stand for the posterior: k-hat, its word, effective draws."""
        return assess_importance(self.log_weights)

    @property
    def walk_burn_in(self) -> int:
        """Records of `walk_llc` that the corrected value leaves out."""
        if self.correction is None or not self.correction.steps:
            return 0
        # In integers: a share in floating point is now and then one record short.
        return (self.correction.burn_in or 0) * self.walk_llc.shape[-1] // self.correction.steps

    @property
    def provenance(self) -> str:
        """Say where `llc` comes from, in words."""
        if self.correction is None:
            return "uncorrected variational estimate"
        if not self.has_fit:
            return "Langevin dynamics from the localizer"
        methods = {"reweight": "reweighted draws of q", "sample": "Langevin dynamics from q"}
        # A fit that only prepares sampling has a fixed length (docs/math.md, Sampling).
        short = " after a short fit" if self.converged is None else ""
        alone = f"q alone{short} {with_error(self.llc_vi, self.llc_vi_sem)}"
        return f"{methods[self.correction.method]}; {alone}"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write result.json and traces.npz into a folder, which is made if need be.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_estimate(self, folder)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "LLCEstimate":
        """Read what `save` wrote.

        Raises:
            DataError: If the folder does not hold a saved estimate, or a file of it is damaged, of
                another estimate or of another version of fastvi's format.
        """
        return cls(**read_estimate(cls, Path(folder)))


def _folded(line: str) -> str:
    """Break a line of the summary where it is too long, but not around `=` and `±`."""
    wrap = TextWrapper(width=SUMMARY_WIDTH, subsequent_indent=15 * " ", break_on_hyphens=False)
    # TextWrapper does not break at a space that does not break.
    for sign in ("=", "±"):
        line = line.replace(f" {sign} ", f"\u00a0{sign}\u00a0")
    return wrap.fill(line).replace("\u00a0", " ")


def kept_scales(deviations: np.ndarray, most: int = MOST_SCALES) -> np.ndarray:
    """Sort each chain's D^{1/2} and keep at most `most` evenly spaced quantiles.

    Args:
        deviations: D^{1/2}, shape (chains, dim).
        most: Largest number of quantiles.
    """
    ordered = np.sort(deviations, axis=1)
    if ordered.shape[1] <= most:
        return ordered
    # The first and the last are the extremes, between which the histogram's bins lie.
    return ordered[:, np.linspace(0, ordered.shape[1] - 1, most).round().astype(int)]
