"""Estimate on a linear regression, where everything is known in closed form."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fastvi._numbers import with_error
from fastvi._typing import Array, Batch, Float, Scalar
from fastvi.config import VIConfig
from fastvi.demos.base import AbstractDemo, Say, check
from fastvi.evaluation.errors import chain_error, pair_mean
from fastvi.results.estimate import LLCEstimate


class Exact(NamedTuple):
    """Closed-form values: the learning coefficient, and log of the normalising constant in nats."""

    llc: float
    log_z: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuadraticDemo(AbstractDemo):
    """Estimate on a linear regression and compare with the exact values.

    The loss is a rotated quadratic, with minibatch noise.

    Attributes:
        dim: Number of parameters d.
        condition: Largest over smallest eigenvalue of the Hessian; the largest is 1.
        num_data: Number of examples n.
    """

    out: Path = Path("runs/demo-quadratic")
    dim: int = 50
    condition: float = 100.0
    num_data: int = 1000

    def check_options(self) -> None:
        """Raise ConfigError where an option of the demo's own is impossible."""
        check(self.dim >= 1, "dim", "1 or more", self.dim)
        check(1 <= self.condition < float("inf"), "condition", "a number from 1", self.condition)
        check(
            self.num_data >= max(2, self.dim),
            "num_data",
            "at least 2 and at least dim",
            self.num_data,
        )

    def produce(self, config: VIConfig, say: Say) -> tuple[LLCEstimate, str]:
        """Estimate and compare."""
        spectrum = np.geomspace(1.0, 1.0 / self.condition, self.dim)
        center, data = make_regression(self.seed, spectrum, self.num_data)
        say(
            f"estimating     linear regression, d = {self.dim:,}, n = {self.num_data:,}, "
            f"condition {self.condition:.4g}, ..."
        )
        result = self.estimate(squared_error, center, data, config)
        exact = exact_values(spectrum, result.nbeta, result.localization)
        return result, f"\n\n{comparison(result, exact)}"


def target() -> tuple[Callable[[Array, Batch], Scalar], Array, Batch]:
    """Return loss, parameters and data of the demo, as `fastvi llc` takes them."""
    defaults = QuadraticDemo()
    spectrum = np.geomspace(1.0, 1.0 / defaults.condition, defaults.dim)
    center, data = make_regression(defaults.seed, spectrum, defaults.num_data)
    return squared_error, center, data


def make_regression(
    seed: int, spectrum: Float[np.ndarray, " dim"], num_data: int
) -> tuple[Float[Array, " dim"], Batch]:
    """Return w* and (inputs, targets) whose squared error has the Hessian `R diag(spectrum) R^T`.

    The inputs are `sqrt(n) Q diag(sqrt(spectrum)) R^T` with orthonormal columns in Q and a rotation
    R; the targets are met exactly at w*, so `L_n(w*) = 0`.
    """
    rng, dim = np.random.default_rng(seed), spectrum.size
    # Orthonormal columns: the Hessian is then what was asked for, not a sample of it.
    columns, _ = np.linalg.qr(rng.normal(size=(num_data, dim)))
    rotation, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    inputs = math.sqrt(num_data) * (columns * np.sqrt(spectrum)) @ rotation.T
    center = rng.normal(size=dim)
    return jnp.asarray(center, jnp.float32), tuple(
        jnp.asarray(array, jnp.float32) for array in (inputs, inputs @ center)
    )


def squared_error(w: Float[Array, " dim"], batch: Batch) -> Scalar:
    """Evaluate half the mean squared residual."""
    inputs, targets = batch
    return 0.5 * jnp.mean((inputs @ w - targets) ** 2)


def exact_values(spectrum: Float[np.ndarray, " dim"], nbeta: float, localization: float) -> Exact:
    """Evaluate the Gaussian integrals.

    `llc = 1/2 sum_i nbeta h_i / (nbeta h_i + gamma)` and
    `log Z = d/2 log(2 pi) - 1/2 sum_i log(nbeta h_i + gamma)` for eigenvalues h_i of the Hessian.
    """
    precision = nbeta * spectrum + localization
    return Exact(
        llc=0.5 * float(np.sum(nbeta * spectrum / precision)),
        log_z=0.5 * spectrum.size * math.log(2 * math.pi) - 0.5 * float(np.sum(np.log(precision))),
    )


def elbo_sem(result: LLCEstimate) -> float:
    """Return the standard error of the ELBO.

    Of its pairs of mirrored draws, or the spread of the chains.
    """
    # Mirrored draws are dependent: a pair is the unit of the error (docs/math.md, Estimate).
    pairs = pair_mean(result.log_weights.astype(float), axis=1)
    return chain_error(pairs.mean(axis=1), pairs.std(axis=1, ddof=1) / math.sqrt(pairs.shape[1]))


def comparison(result: LLCEstimate, exact: Exact) -> str:
    """Set estimates beside exact values; the ELBO is a lower bound of log Z."""
    rows = [("llc", "llc", result.llc, result.llc_sem, exact.llc)]
    # A walk from the localizer has no ELBO.
    if result.has_fit:
        rows.append(("elbo", "log Z", result.elbo, elbo_sem(result), exact.log_z))
    lines = [f"{'':<15}{'estimate ± sem':>22}{'exact':>20}{'relative error':>18}"]
    for name, exact_name, estimate, sem, value in rows:
        error = f"{100 * (estimate - value) / abs(value):+.3f} %" if value else "-"
        given, known = with_error(estimate, sem), f"{exact_name} {value:.5g}"
        lines.append(f"{name:<15}{given:>22}{known:>20}{error:>18}")
    return "\n".join(lines)
