"""`forecast_sgld`: what SGLD would report at somebody's settings, and why."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fastvi._compilation import PROGRAMS
from fastvi._errors import ConfigError, DataError
from fastvi._html import result_html
from fastvi._modes import in_own_modes
from fastvi._numbers import with_error
from fastvi._typing import Array, Float, Given, Key
from fastvi.api.arguments import check_count, positive_scalar
from fastvi.geometry.spectrum import (
    Measures,
    noise_gradients,
    num_products,
    spectral_measures,
)
from fastvi.results.estimate import LLCEstimate
from fastvi.sampling.ensemble import Target
from fastvi.sampling.sgld import QuadraticSGLD
from fastvi.target.fingerprint import shapes_of
from fastvi.target.keys import as_key
from fastvi.target.work import HESSIAN_PRODUCT

# Points of the posterior at which curvature and noise are measured. Half of them leave the errors
# of both larger by 1.4; double costs twice the products.
POINTS = 8
# Bytes that the products compute in all, some ten seconds of a core: at half, Hessians are of fewer
# examples; at double, a forecast is as dear as the run that it is of.
PRODUCT_BYTES = 2.0**34
# Examples of the Hessian at each point, at least. Half of them overstate the largest curvature;
# double costs large models twice as much.
LEAST_EXAMPLES = 8
# Share of llc by which the quadratic model may miss it before a forecast is called rough: its
# biases are then off by about as much. Half of it calls most networks rough, double hardly any.
ROUGH = 0.3
TOLERANCE = 0.02  # half of it halves the step that is advised and doubles the steps


@dataclasses.dataclass(frozen=True)
class SGLDForecast:
    """What SGLD reports as llc at some settings, by the quadratic model of the posterior.

    Biases are in units of llc. See docs/math.md, "Sampling".

    Attributes:
        lr: Step size epsilon.
        nbeta: n times the inverse temperature.
        localization: gamma.
        batch_size: Examples of a minibatch; None for gradients on all data.
        num_steps: Steps of each chain that are averaged; None for the stationary mean.
        burn_in: Steps of each chain that are left out before these.
        posterior_llc: llc of the posterior at these settings: that of the estimate if it is at the
            same nbeta and localization, else that of the quadratic model.
        quadratic_llc: That of the quadratic model at the estimate's settings, beside its llc.
        is_anchored: Whether `posterior_llc` is that of the estimate.
        widening: What finite steps add to the stationary mean.
        heat: What the noise of minibatches adds to it.
        missing: Share of the stationary mean by which the average is short, as it holds steps from
            before the chains have spread.
        predicted: What SGLD reports; infinite where it diverges.
        predicted_sem: Standard error of `predicted`: that of the estimate, and of what was measured
            of the curvature and the noise.
        relaxation_steps: Steps in which the slowest directions forget, 2 / (lr localization).
        largest_lr: Step beyond which the steepest direction diverges, 4 / (localization + nbeta h).
        advised_lr: Largest step at which widening and heat are within `tolerance` of llc.
        advised_burn_in: Steps to leave out at `lr` for less than `tolerance` to be missing.
        tolerance: Bias that the advice allows, relative to llc.
        curvatures: Eigenvalues of the Hessian of L_n that stand for all, ascending.
        counts: How many directions each of them stands for.
        widenings: Stationary variance in each of these over that of the posterior, without noise.
        is_rough: Whether the quadratic model's llc is far from that of the estimate.
        sample_gradients: Work of the forecast.
    """

    lr: float
    nbeta: float
    localization: float
    batch_size: int | None
    num_steps: int | None
    burn_in: int
    posterior_llc: float
    quadratic_llc: float
    is_anchored: bool
    widening: float
    heat: float
    missing: float
    predicted: float
    predicted_sem: float
    relaxation_steps: float
    largest_lr: float
    advised_lr: float
    advised_burn_in: float
    tolerance: float
    curvatures: np.ndarray = dataclasses.field(repr=False)
    counts: np.ndarray = dataclasses.field(repr=False)
    widenings: np.ndarray = dataclasses.field(repr=False)
    is_rough: bool
    sample_gradients: float

    @property
    def is_stable(self) -> bool:
        """Whether SGLD stays bounded in every direction."""
        return self.lr < self.largest_lr

    def _repr_html_(self) -> str:
        """Return it for a notebook."""
        return result_html(self.summary())

    def summary(self) -> str:
        """Return the forecast in words, for a terminal."""
        return "\n".join([*self._what_it_reports(), *self._advice()])

    def _what_it_reports(self) -> list[str]:
        source = "the estimate" if self.is_anchored else "the quadratic model"
        batch = "all data" if self.batch_size is None else f"batches of {self.batch_size}"
        lines = [
            f"SGLD           lr {self.lr:.3g}, {batch}, n beta {self.nbeta:.4g}, localization "
            f"{self.localization:.4g}",
            f"posterior      llc {self.posterior_llc:.4g}, by {source}",
        ]
        if not self.is_stable:
            return [
                *lines,
                f"diverges       lr is above 4 / (localization + n beta h) = {self.largest_lr:.3g}",
            ]
        return [
            *lines,
            f"widening       {self._share(self.widening)} of finite steps",
            f"heat           {self._share(self.heat)} of the noise of minibatches",
            f"burn-in        {-100 * self.missing:+.2g} % of steps before the chains have spread",
            f"SGLD's llc     {with_error(self.predicted, self.predicted_sem)}",
        ]

    def _share(self, bias: float) -> str:
        if not self.posterior_llc:  # of a constant loss
            return f"{bias:+.3g}"
        return f"{bias:+.3g} ({100 * bias / abs(self.posterior_llc):+.2g} %)"

    def _advice(self) -> list[str]:
        percent = f"{100 * self.tolerance:.3g} %"
        lines = [
            f"relaxation     {self.relaxation_steps:,.0f} steps; leave out "
            f"{self.advised_burn_in:,.0f} for less than {percent} to be missing",
            f"step           {self.advised_lr:.3g} or less for a bias within {percent}; diverges "
            f"above {self.largest_lr:.3g}",
        ]
        if self.is_rough:
            lines.append(
                f"rough          the quadratic model has llc {self.quadratic_llc:.4g} at the "
                "estimate's settings or these: the posterior is not Gaussian, and biases are "
                "those of its mean curvature"
            )
        return lines


@in_own_modes
def forecast_sgld(
    result: LLCEstimate,
    *,
    lr: Given[float],
    batch_size: Given[int | None],
    nbeta: Given[float | None] = None,
    localization: Given[float | None] = None,
    num_steps: Given[int | None] = None,
    burn_in: Given[int] = 0,
    tolerance: Given[float] = TOLERANCE,
    key: Any = 0,
) -> SGLDForecast:
    """Say what SGLD would report as llc, and what its settings add to that of the posterior.

    SGLD is `w <- w - lr/2 (nbeta grad L_B + localization (w - w*)) + sqrt(lr) noise` from w*, with
    minibatches that are drawn with replacement. In a direction of curvature h with
    `a = localization + nbeta h` and minibatch noise of variance V its stationary variance is
    `(1 + lr nbeta^2 V / 4) / (a (1 - lr a / 4))`. Curvature and noise are measured at draws of the
    posterior: to first order in lr it is their mean there that counts, not that at w*.

    Args:
        result: An estimate of this process, from `estimate_llc`.
        lr: Step size epsilon.
        batch_size: Examples of a minibatch; None for gradients on all data. A loader that draws
            without replacement has 1 - batch_size / n of the noise.
        nbeta: n times the inverse temperature; that of the estimate when left out.
        localization: gamma; that of the estimate when left out.
        num_steps: Steps of each chain that are averaged, after `burn_in` from w*; the stationary
            mean when left out.
        burn_in: Steps that are left out before.
        tolerance: Bias that the advice allows, relative to llc.
        key: An int seed or a jax random key.

    Returns:
        The forecast; `print(forecast.summary())`.

    Raises:
        ConfigError: If a number is impossible.
        DataError: If the result holds neither walkers nor a fit (it was loaded from disk), or its
            loss has changed since.

    Cost:
        `sample_gradients` of the forecast: Hessian products at 8 draws of the posterior, some ten
        seconds of a core at the most for a small model.

    References:
        Mandt, Hoffman & Blei, Stochastic Gradient Descent as Approximate Bayesian Inference (2017).
    """
    lr, tolerance = positive_scalar("lr", lr), positive_scalar("tolerance", tolerance)
    _check_steps(batch_size, num_steps, burn_in)
    nbeta = float(positive_scalar("nbeta", result.nbeta if nbeta is None else nbeta))
    gamma = _localization(result.localization if localization is None else localization)
    key = as_key(key)
    own, work = _measure(*_target_and_points(result, jax.random.fold_in(key, POINTS)), key)
    is_anchored = bool(np.allclose((nbeta, gamma), (own.nbeta, own.localization), rtol=1e-6))
    model = dataclasses.replace(own, nbeta=nbeta, localization=gamma, lr=lr, batch_size=batch_size)
    bases = np.full(POINTS, result.llc) if is_anchored else np.asarray(model.llc)
    base = float(np.mean(bases))
    is_stable = lr < model.largest_lr
    missing = 0.0 if num_steps is None or not is_stable else model.missing(burn_in, num_steps)
    at_points = (bases + model.widening + model.heat) * (1 - missing)
    spread = float(np.std(at_points, ddof=1)) / math.sqrt(len(at_points))
    order = np.argsort(model.curvatures, axis=None)
    curvatures = model.curvatures.ravel()[order]
    return SGLDForecast(
        lr=lr,
        nbeta=nbeta,
        localization=gamma,
        batch_size=batch_size,
        num_steps=num_steps,
        burn_in=burn_in,
        posterior_llc=base,
        quadratic_llc=float(np.mean(own.llc)),
        is_anchored=is_anchored,
        widening=float(np.mean(model.widening)) if is_stable else math.inf,
        heat=float(np.mean(model.heat)) if is_stable else math.inf,
        missing=missing,
        predicted=float(np.mean(at_points)) if is_stable else math.inf,
        predicted_sem=math.hypot(spread, result.llc_sem if is_anchored else 0.0),
        relaxation_steps=2 / (lr * gamma),
        largest_lr=model.largest_lr,
        advised_lr=model.lr_for(tolerance * abs(base)),
        advised_burn_in=model.burn_in_for(tolerance) if is_stable else math.inf,
        tolerance=tolerance,
        curvatures=curvatures,
        counts=model.counts.ravel()[order] / len(model.counts),
        widenings=model.widenings(curvatures),
        is_rough=bool(abs(np.mean(own.llc) - result.llc) > ROUGH * abs(result.llc)),
        sample_gradients=work,
    )


def _localization(value: Any) -> float:
    """Refuse a posterior whose flat directions SGLD never leaves, or spreads in for ever."""
    return float(positive_scalar("localization", value))


def _check_steps(batch_size: Any, num_steps: Any, burn_in: Any) -> None:
    if batch_size is not None:
        check_count("batch_size", batch_size)
    if num_steps is not None:
        check_count("num_steps", num_steps)
    if isinstance(burn_in, bool) or not isinstance(burn_in, (int, np.integer)) or burn_in < 0:
        raise ConfigError(f"burn_in must be an integer >= 0; got {burn_in!r}.")
    if burn_in and num_steps is None:
        raise ConfigError(
            "burn_in has no effect on the stationary mean: pass num_steps, those that are averaged."
        )


def _target_and_points(result: LLCEstimate, key: Key) -> tuple[Target, Float[Array, "points dim"]]:
    """Return the target, and draws of the posterior: walkers where there are some, else of q."""
    if result.ensemble is not None:
        target, v = result.ensemble.target, result.ensemble.displacement
        target.check_unchanged()
        return target, v[np.arange(POINTS) % v.shape[0]]
    if result.fitted is None:
        raise DataError(
            "this estimate holds neither walkers nor a fit: it was loaded from disk, is not the "
            "last of a curve, or walked from the localizer in more than half a million dimensions. "
            "Run estimate_llc again, in many dimensions with sampler={'start': 'fit'}."
        )
    fitted = result.fitted
    target = Target(fitted.objective, fitted.loss, fitted.problem, fitted.is_masked)
    draws = fitted.q.flat.sample(key, POINTS) - fitted.problem.posterior.center
    target.check_unchanged()
    return target, draws


def _measure(
    target: Target, points: Float[Array, "points dim"], key: Key
) -> tuple[QuadraticSGLD, float]:
    """Measure curvature and noise at the points; return the model, and sample gradients."""
    problem, dim = target.problem, points.shape[1]
    products = POINTS**2 * num_products(dim)
    affordable = PRODUCT_BYTES / max(target.loss.computed, 1.0) / (HESSIAN_PRODUCT * products)
    num_examples = min(problem.data.num_examples, max(LEAST_EXAMPLES, int(affordable)))

    def build(objective: Any) -> Callable[..., Measures]:
        return jax.jit(
            lambda problem, points, keys: spectral_measures(
                objective, problem, points, keys, num_examples
            )
        )

    name = ("spectral measures", num_examples, shapes_of(problem))
    program = PROGRAMS.find(target.loss, name, (target.objective,), build)
    found = jax.device_get(program(problem, points, jax.random.split(key, POINTS)))
    arrays = [np.asarray(leaf, float).reshape(POINTS, -1) for leaf in jax.tree.leaves(found)]
    posterior = problem.posterior
    work = products * HESSIAN_PRODUCT * num_examples + POINTS * noise_gradients(problem, dim)
    nbeta, gamma = float(posterior.nbeta), float(posterior.gamma)
    return QuadraticSGLD(*arrays, nbeta=nbeta, localization=gamma), work
