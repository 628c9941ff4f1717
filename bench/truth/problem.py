"""What a problem with a known answer is."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fastvi import LLCEstimate, estimate_llc
from fastvi.target.losses import weigh_batch

SIZES = ("fast", "medium", "large")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss at its minimum, the temperature and localization, and what is known of the answer.

    The answer is `nbeta (E[L(w)] - L(w*))` under `exp(-nbeta L(w) - gamma/2 |w - w*|^2)`, on all
    data.

    Attributes:
        name: Its key in the registry.
        loss_fn: `(params, batch) -> mean loss per example`, in nats, or `(losses, weights)`.
        params: The minimum w*, a pytree of arrays.
        data: Pytree of arrays with leading axis n; zeros for a loss that does not look at them.
        gamma: Localization.
        n_data: n.
        nbeta: n times the inverse temperature; n / log n when left out.
        theory: The learning coefficient, the limit of the answer as n grows at fixed gamma.
        theory_source: Where `theory` is from.
        exact: Computes the answer itself by formula, quadrature or draws of the posterior; returns
            it and a bound on the numerical error, or the standard error of draws.
        exact_method: "closed form", "quadrature", "Gibbs sampling" or "importance sampling".
        size: "fast" (seconds for any method), "medium" (minutes), "large".
    """

    name: str
    loss_fn: Callable[..., Any]
    params: Any
    data: Any
    gamma: float
    n_data: int
    nbeta: float = 0.0
    theory: float | None = None
    theory_source: str = ""
    exact: Callable[[], tuple[float, float]] | None = None
    exact_method: str = ""
    size: str = "fast"

    def __post_init__(self):
        if self.nbeta == 0.0:
            object.__setattr__(self, "nbeta", default_nbeta(self.n_data))
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {SIZES}; got {self.size!r}.")

    @property
    def dim(self) -> int:
        """Count the parameters."""
        return sum(np.size(leaf) for leaf in jax.tree_util.tree_leaves(self.params))

    def batch(self) -> Any:
        """Return all data as an objective takes them: weighted ones with their mean weight."""
        value = jax.eval_shape(self.loss_fn, self.params, self.data)
        if not isinstance(value, tuple):
            return self.data
        weights = np.asarray(self.loss_fn(self.params, self.data)[1], np.float64)
        return weigh_batch(self.data, weights.sum() / self.n_data, np.float32)

    def estimate(self, seed: int, **options: Any) -> LLCEstimate:
        """Run `estimate_llc` on it, to the end even where it breaks."""
        return estimate_llc(
            self.loss_fn,
            self.params,
            self.data,
            key=seed,
            nbeta=self.nbeta,
            localization=self.gamma,
            progress=False,
            throw=False,
            **options,
        )


def default_nbeta(n_data: int) -> float:
    """Return n / log n."""
    return n_data / math.log(n_data)


def no_data(n_data: int) -> np.ndarray:
    """Return the data of a loss that does not look at them."""
    return np.zeros((n_data, 1), np.float32)


def rotation(seed: int, dim: int) -> np.ndarray:
    """Draw an orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]
