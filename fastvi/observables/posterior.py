"""Draws of the posterior: traces of walkers, and what follows from them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastvi._errors import DataError
from fastvi._html import result_html
from fastvi._typing import PyTree
from fastvi.observables.control_variates import (
    MOST_TRACES,
    Columns,
    choose_weights,
    plain_weights,
)
from fastvi.observables.covariance import (
    Estimate,
    blocks_per_walker,
    jackknifed,
    mean_of,
)
from fastvi.observables.pieces import (
    correlation_by_entry,
    covariance_by_entry,
    mean_by_entry,
    mean_over_entries,
    some_entries,
)
from fastvi.observables.split import Split, split_of
from fastvi.sampling.averages import correlation_time


class Locality(NamedTuple):
    """How far llc is that of the neighbourhood, and how far that of the localizer.

    Attributes:
        localization_slope: d llc / d log localization.
        nbeta_slope: d llc / d log nbeta; 0 where llc does not depend on the temperature.
        radius: Root mean square of |w - w*|.
        localizer_radius: What the localizer alone would give, sqrt(dim / localization).
        center_norm: |w*|.
        rise: Mean of n beta (L_n(w) - L_n(w*)) over n beta, the rise of the loss in nats.
        held: Share of the directions that the data hold: d - localization |w - w*|^2 over d.
    """

    localization_slope: Estimate
    nbeta_slope: Estimate
    radius: Estimate
    localizer_radius: float
    center_norm: float
    rise: Estimate
    held: Estimate


@dataclasses.dataclass(frozen=True)
class PosteriorDraws:
    """Draws that walkers made of the posterior, and what was evaluated at each of them.

    Draws of one walker depend on each other, `thin` steps apart. Errors account for that: see
    `fastvi.observables.covariance`.

    Attributes:
        energies: n beta (L_n(w) - L_n(w*)) of each draw, shape (walkers, draws, 2): two estimates
            that are independent of each other, and equal where all data were evaluated.
        slopes: (w - w*) . grad of n beta L_n at each draw, the same.
        radius2: |w - w*|^2 of each draw, the same shape.
        losses: Of each data set that was named, the loss of each example at each draw, in nats,
            shape (walkers, draws, examples), or of each token, (walkers, draws, examples, tokens).
            Arrays, or `StoredArray` where they are on disk: slices of it are arrays.
        init_losses: The same at w*, shape (examples,) or (examples, tokens).
        observables: What each observable gave at each draw, shape (walkers, draws, ...), as losses.
        nbeta: n beta of the posterior.
        localization: gamma of the posterior.
        n_data: n.
        dim: Dimensions.
        center_norm: |w*|.
        init_loss: L_n(w*), in nats.
        thin: Steps between two draws of a walker.
        fge: Full-gradient equivalents that the draws took.
        health: Findings, gravest first.
        displacement: w - w* of each draw, flat, shape (walkers, draws, dim), where it was kept.
        gradient: Gradient of n beta L_n at each draw, the same.
        control_variates: Whether noise is taken off by functions of mean zero where they help.
        as_passed: Turns flat vectors w - w* into what was passed as parameters.
        mean_energies: n beta (L_n - L_n(w*)) at the mean of all draws and at those that leave out a
            group of walkers each, which `split` reads; none where there is one walker, or the run
            has not come to its end.
    """

    energies: np.ndarray
    slopes: np.ndarray
    radius2: np.ndarray
    losses: Mapping[str, Any]
    init_losses: Mapping[str, np.ndarray]
    observables: Mapping[str, Any]
    nbeta: float
    localization: float
    n_data: int
    dim: int
    center_norm: float
    init_loss: float
    thin: int
    fge: float
    health: tuple[Any, ...] = ()
    displacement: Any = dataclasses.field(default=None, repr=False)
    gradient: Any = dataclasses.field(default=None, repr=False)
    control_variates: bool = True
    as_passed: Callable[[Any], PyTree] = dataclasses.field(
        default=lambda flat: flat, repr=False, compare=False
    )
    mean_energies: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0), repr=False)

    @functools.cached_property
    def llc(self) -> np.ndarray:
        """The mean of the two energies of each draw, shape (walkers, draws)."""
        return self.energies.mean(axis=-1)

    @functools.cached_property
    def slope(self) -> np.ndarray:
        """The mean of the two slopes of each draw, shape (walkers, draws)."""
        return self.slopes.mean(axis=-1)

    @property
    def num_walkers(self) -> int:
        """Count the walkers."""
        return self.radius2.shape[0]

    @property
    def num_draws(self) -> int:
        """Count the draws of each walker."""
        return self.radius2.shape[1]

    @functools.cached_property
    def blocks(self) -> int:
        """Into how many blocks the draws of each walker are cut, by the slowest of the traces."""
        return blocks_per_walker(self.num_walkers, self.num_draws, self.correlation_time)

    @functools.cached_property
    def correlation_time(self) -> float:
        """Integrated autocorrelation time of the slowest of the traces, in draws."""
        traces = (np.asarray(one, float) for one in (self.llc, self.slope, self.radius2))
        # a trace that does not move remembers everything
        return max(correlation_time(one) or float(self.num_draws) for one in traces)

    def with_health(self, health: tuple[Any, ...]) -> "PosteriorDraws":
        """Return these draws with findings, and with what has been computed for them so far."""
        found = dataclasses.replace(self, health=health)
        for name, computed in vars(self).items():
            vars(found).setdefault(name, computed)
        return found

    @property
    def plain(self) -> "PosteriorDraws":
        """The same draws, of which all means and covariances are without control variates."""
        return dataclasses.replace(self, control_variates=False)

    @property
    def columns(self) -> Columns | None:
        """Which control variates are taken off; None where there are none, or none that help."""
        return self._weights_and_columns[1]

    @property
    def weights(self) -> np.ndarray:
        """Weights of the draws in what each block says, shape (blocks, walkers x draws)."""
        return self._weights_and_columns[0]

    @functools.cached_property
    def _weights_and_columns(self) -> tuple[np.ndarray, Columns | None]:
        plain = plain_weights(self.num_walkers, self.num_draws, self.blocks)
        if not self.control_variates or self.displacement is None or self.gradient is None:
            return plain, None
        count = self.num_walkers * self.num_draws
        displacement, gradient = (
            np.asarray(values, float).reshape(count, self.dim)
            for values in (self.displacement, self.gradient)
        )
        slope = gradient + self.localization * displacement
        named = [*self.losses.values(), *self.observables.values()]
        each = max(1, (MOST_TRACES - 2) // max(1, len(named)))
        traces = (self.llc, self.slope, *named[: MOST_TRACES - 2])
        seen = np.concatenate([some_entries(values, each) for values in traces], axis=1)
        return choose_weights(displacement, slope, seen, plain, self.num_walkers)

    def params(self, walker: int, draw: int) -> PyTree:
        """Return the parameters of one draw, as they were passed.

        Raises:
            DataError: If they were not kept.
        """
        if self.displacement is None:
            raise DataError(
                "the parameters of these draws were not kept. Pass keep_params=True, or an "
                "observable that reduces them."
            )
        return self.as_passed(self.displacement[walker, draw])

    def mean(self, name: str) -> Estimate:
        """Return the posterior mean of losses or of an observable, with errors, entry by entry."""
        return mean_by_entry(self.weights, self._values(name))

    def covariance(self, one: str, other: str | None = None) -> Estimate:
        """Return the posterior covariance of each entry of one with each entry of the other.

        Args:
            one: Name of a data set, whose losses are meant, of an observable, or "llc".
            other: The same; `one` again when left out.

        Returns:
            Arrays of shape (entries of one, entries of the other), with the error of each. Tokens
            are in the order of `losses[name][0, 0].ravel()`.
        """
        return covariance_by_entry(self.weights, self._values(one), self._values(other or one))

    def correlation(self, one: str, other: str | None = None) -> Estimate:
        """Return the posterior correlation of each entry of one with each entry of the other.

        The covariance over both standard deviations, NaN where an entry does not vary, as that of a
        masked token. Errors are by the delta method over blocks.

        Args:
            one: As in `covariance`.
            other: The same; `one` again when left out.

        Returns:
            Arrays of shape (entries of one, entries of the other), with the error of each.
        """
        return correlation_by_entry(self.weights, self._values(one), self._values(other or one))

    def influence(self, of: str, on: str | None = None) -> Estimate:
        """Return the Bayesian influence of each example, or token, on the loss of each other.

        In n L_n(w) = sum_i a_i loss_i(w) let the weight a_i of an example grow from 1: the
        derivative of the posterior mean of loss_j is - (n beta / n) Cov(loss_i, loss_j). An example
        that is in no training data counts as one of weight 0.

        The loss of an example is the mean of those of its T tokens, so that the weight of one of
        them has 1/T of this: - (n beta / (n T)) Cov(loss_it, loss_j). Summed over the tokens of an
        example it is the influence of the example.

        Args:
            of: Name of the data set whose weights change.
            on: Name of the data set, or of the observable, that responds; `of` when left out.

        Returns:
            Arrays of shape (entries of `of`, entries of `on`), in nats for a weight of one.
        """
        losses = self.losses[self._known(of, self.losses)]
        tokens = math.prod(losses.shape[3:])
        return _scaled(self.covariance(of, on or of), -self.nbeta / (self.n_data * tokens))

    def susceptibility(self, observable: str, data: str) -> Estimate:
        """Return how an observable responds to a change of the data.

        The derivative of its posterior mean along L_n + h L_data, at h = 0:
        - n beta Cov(observable, L_data). Some divide by n beta.

        Args:
            observable: Name of an observable, or of a data set, whose losses are meant.
            data: Name of the data set.

        Returns:
            Arrays of shape (entries of the observable,).
        """
        mean_loss = mean_over_entries(self._values(data))
        found = covariance_by_entry(self.weights, self._values(observable), mean_loss)
        return _scaled(Estimate(found.value[:, 0], found.sem[:, 0]), -self.nbeta)

    def llc_on(self, data: str) -> Estimate:
        """Return n beta (E[L(w)] - L(w*)) with L the mean loss of a data set that was named."""
        losses = self.losses[self._known(data, self.losses)]
        rise = mean_over_entries(losses, self.init_losses[data])
        return _scaled(mean_of(self.weights, rise.ravel()), self.nbeta)

    @functools.cached_property
    def llc_estimate(self) -> Estimate:
        """The mean of `llc`."""
        return mean_of(self.weights, self.llc.ravel())

    @functools.cached_property
    def locality(self) -> Locality:
        """How llc depends on localization and temperature, and how far the draws reach.

        With f = n beta (L_n - L_n(w*)) and v = w - w*: d llc / d log gamma is
        - gamma/2 Cov(f, |v|^2), which Stein's identity turns into
        - 1/2 (E[v . grad f] - Cov(f, v . grad f)), without the noise of |v|^2 in directions that
        only the localizer holds. d llc / d log n beta = llc - Var f.
        """
        energies, slopes = (both.reshape(-1, 2).T for both in (self.energies, self.slopes))
        radius = mean_of(self.weights, self.radius2.ravel())
        root = np.sqrt(radius.value)
        return Locality(
            localization_slope=jackknifed(_localization_slope, self.weights, *energies, *slopes),
            nbeta_slope=jackknifed(_nbeta_slope, self.weights, *energies),
            radius=Estimate(root, radius.sem / (2 * root)),
            localizer_radius=float(np.sqrt(self.dim / self.localization))
            if self.localization
            else float("inf"),
            center_norm=self.center_norm,
            rise=_scaled(self.llc_estimate, 1 / self.nbeta),
            # E[v . grad f] = d - gamma E|v|^2
            held=_scaled(mean_of(self.weights, self.slope.ravel()), 1 / self.dim),
        )

    @functools.cached_property
    def split(self) -> Split:
        """Llc by its parts: drift of the posterior's mean from w*, and spread about that mean.

        Raises:
            DataError: If there is one walker, which does not tell their errors, or the draws are of
                a run that has not come to its end.
        """
        if not self.mean_energies.size:
            raise DataError(
                "drift and spread take two walkers or more, and a run that has come to its end; "
                f"there are {self.num_walkers} walkers. Finish the run."
            )
        return split_of(self.llc, self.mean_energies)

    def _repr_html_(self) -> str:
        """Return it for a notebook."""
        return result_html(self.summary())

    def summary(self) -> str:
        """Return in words what the draws say, for a terminal."""
        near = self.locality
        parts = [self.split] if self.mean_energies.size else []
        lines = [
            f"draws          {self.num_walkers} walkers x {self.num_draws}, {self.thin} steps "
            f"apart; {len(self.weights)} blocks tell the errors",
            f"control        {_columns_text(self.columns)}",
            f"llc            {_text(self.llc_estimate)}",
            *(
                f"parts of llc   {_text(one.drift)} drift of the mean from w*, "
                f"{_text(one.spread)} spread about it"
                for one in parts
            ),
            f"slopes of llc  {_text(near.localization_slope)} per log localization, "
            f"{_text(near.nbeta_slope)} per log n beta",
            f"radius         {_text(near.radius)}; {near.localizer_radius:.3g} for the localizer "
            f"alone, |w*| = {near.center_norm:.3g}",
            f"loss           {_text(near.rise)} nats above that at w*; the data hold "
            f"{_text(near.held)} of the directions",
            *(f"llc on {name:<8}{_text(self.llc_on(name))}" for name in self.losses),
            f"work           {self.fge:,.0f} FGE",
            *map(str, self.health),
        ]
        return "\n".join(lines)

    def _values(self, name: str) -> Any:
        """Return a quantity by its name, shape (walkers, draws, ...)."""
        if name == "llc":
            return self.llc
        known = {**self.losses, **self.observables}
        return known[self._known(name, known)]

    def _known(self, name: str, known: Mapping[str, Any]) -> str:
        if name not in known:
            there = ", ".join(map(repr, known)) or "nothing"
            raise DataError(f"{name!r} was not evaluated at the draws; {there} was.")
        return name


def _columns_text(columns: Columns | None) -> str:
    if columns is None:
        return "no control variates"
    return (
        f"{columns.number} control variates: monomials of degree {columns.degree} in "
        f"{columns.directions} directions"
    )


def _covariance(weight: np.ndarray, one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - weight @ one, other - weight @ other
    return float(weight @ (one * other))


def _localization_slope(weight: np.ndarray, *halves: np.ndarray) -> float:
    f, g, slope, other = halves
    covariance = 0.5 * (_covariance(weight, f, other) + _covariance(weight, g, slope))
    return -0.5 * (0.5 * float(weight @ (slope + other)) - covariance)


def _nbeta_slope(weight: np.ndarray, f: np.ndarray, g: np.ndarray) -> float:
    return 0.5 * float(weight @ (f + g)) - _covariance(weight, f, g)


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(factor * estimate.value, abs(factor) * estimate.sem)


def _text(estimate: Estimate) -> str:
    return f"{float(estimate.value):.4g} ± {float(estimate.sem):.2g}"
