"""`sample_posterior`: walkers of a finished estimate go on, and say more than their llc."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._modes import in_own_modes
from fastvi._typing import Array, Batch, Given, PyTree
from fastvi.api.other_data import on_other_data
from fastvi.api.resample import correct
from fastvi.fitting.protocols import Progress
from fastvi.observables.draws import passed_form
from fastvi.observables.evaluate import (
    energies_at,
    example_losses_at,
    half_of_sample,
    mean_loss_at,
    observable_at,
)
from fastvi.observables.posterior import PosteriorDraws
from fastvi.results.draw_findings import draw_findings
from fastvi.results.estimate import LLCEstimate
from fastvi.results.progress import reporting
from fastvi.sampling.ensemble import AbstractEnsemble, Target
from fastvi.target.fingerprint import fingerprint_loss
from fastvi.target.losses import passed_examples
from fastvi.target.work import GRADIENT, LOSS

# Steps between two draws. Half of it makes draws that are nearly alike, double leaves half of what
# the steps have paid for unused.
THIN = 4
# What noise and steps may add to llc. Half of it takes a quarter more steps and twice the
# gradients, double is seen in the mean of some thousand draws.
ERROR = 0.005
# Numbers that draws may hold before it is asked whether that was meant: 4 GiB in float32.
MOST_NUMBERS = 2**30


@in_own_modes
def sample_posterior(
    result: LLCEstimate,
    draws: Given[int] = 200,
    *,
    losses: Mapping[str, Batch] | None = None,
    observables: Mapping[str, Any] | None = None,
    thin: Given[int] = THIN,
    error: Given[float] = ERROR,
    keep_params: Given[bool] = False,
    progress: Given[bool | Callable[[Progress], None]] = True,
) -> PosteriorDraws:
    """Draw from the local posterior, and evaluate there what you name.

    The walkers of an estimate go on from where they ended: they have burnt in. Where an estimate
    was made without any, from q alone or by its reweighted draws, they run first.

    Args:
        result: An estimate of this process, from `estimate_llc`.
        draws: Draws of each walker.
        losses: Data sets by name, of the structure that the loss takes. The loss of each example is
            kept for each draw; where the loss returns the mean of a batch, each example is passed
            as a batch of one.
        observables: By name, `(function, data)` with `function(params, data)` an array, or a
            function alone, which is given all data of the estimate.
        thin: Steps between two draws of a walker; an even number.
        error: What gradient noise and finite steps may each add to llc, relative to it. No control
            variate takes it off draws, so it is smaller than that of an estimate.
        keep_params: Whether to keep the parameters of every draw.
        progress: Whether to show a status line on stderr, or a function that receives `Progress`.

    Returns:
        The draws, with covariances, influences, susceptibilities and llc on each data set.

    Raises:
        ConfigError: If a number is impossible, or a name is given twice.
        DataError: If the result holds no walkers (it was loaded from disk), its loss has changed
            since, its data are not held in memory, or data cannot be used.

    Cost:
        For each draw of a walker `thin` steps, a gradient on all data, and a loss of each example
        that is named. Where gradients on all data are dear, they are taken on two samples instead.
    """
    _check_numbers(draws, thin, error)
    ensemble = _walkers_of(result, progress)
    target = ensemble.target
    now = fingerprint_loss(target.objective, target.problem)
    if now.digest != target.loss.digest:
        raise DataError(
            "the loss computes something else than at the estimate: state that it reads has "
            "changed since. Set it back, or run estimate_llc again."
        )
    if not target.problem.holds_all:
        raise DataError(
            "draws are evaluated on all data, and these are a stream. Hold them in memory as "
            "arrays."
        )
    evaluation = _Evaluation(target, losses or {}, observables or {})
    evaluation.check_size(draws, ensemble.displacement.shape, keep_params)
    found = evaluation.run(ensemble.awake(error), draws, thin, keep_params, progress)
    return dataclasses.replace(found, health=draw_findings(found))


def _check_numbers(draws: int, thin: int, error: float) -> None:
    if draws < 8:
        raise ConfigError(
            f"draws must be at least 8 of each walker, for errors to be told; got {draws}."
        )
    if thin < 2 or thin % 2:
        raise ConfigError(
            "thin must be an even number of steps, as walkers keep their blocks for two; got "
            f"{thin}."
        )
    if not 0 < error < 1:
        raise ConfigError(f"error must be between 0 and 1, as a share of llc; got {error}.")


def _walkers_of(
    result: LLCEstimate, progress: bool | Callable[[Progress], None]
) -> AbstractEnsemble:
    """Return the walkers of an estimate, of a run that is made now where there are none."""
    if result.ensemble is None and result.fitted is not None:
        result = correct(result, "sample", progress=progress)
    if result.ensemble is None:
        raise DataError(
            "this estimate holds no walkers: it was loaded from disk, walked on a stream, is not "
            "the last of a curve, or walked from the localizer in more than half a million "
            "dimensions. Run estimate_llc again, on data in memory or with "
            "sampler={'start': 'fit'}."
        )
    return result.ensemble


class _Evaluation:
    """What is evaluated at each draw: programs, their data, and what they cost."""

    def __init__(self, target: Target, losses: Mapping[str, Batch], observables: Mapping[str, Any]):
        twice = sorted({*losses, "llc"} & {*observables, "llc"} & {*losses, *observables})
        if twice:
            raise ConfigError(
                f"{twice[0]!r} names two things that are evaluated: give one another name."
            )
        self.target, problem = target, target.problem
        self.as_passed = passed_form(target.objective, target.is_masked)
        center = problem.posterior.center
        self.sets = {
            name: on_other_data(target.objective, problem, data, f"losses[{name!r}]")
            for name, data in losses.items()
        }
        self.by_example = {
            name: functools.partial(example_losses_at(target, one), one)
            for name, one in self.sets.items()
        }
        self.observables = {
            name: self._observable(name, given) for name, given in observables.items()
        }
        self.energies = energies_at(target)
        zero = jnp.zeros((1, center.size), center.dtype)
        self.reference = mean_loss_at(target)(problem, zero[0])
        self.init_losses = {
            name: np.asarray(function(zero))[0] for name, function in self.by_example.items()
        }

    def _observable(self, name: str, given: Any) -> Callable[[Array], Array]:
        function, data = given if isinstance(given, tuple) else (given, None)
        if not callable(function):
            raise ConfigError(
                f"observables[{name!r}] must be a function of params and data, or (function, "
                f"data); got {type(function).__name__}."
            )
        if data is None:
            data = passed_examples(self.target.problem.data.examples)
        center = self.target.problem.posterior.center
        at_draws = observable_at(function, lambda v: self.as_passed(center + v))
        return lambda displacement: at_draws(displacement, data)

    def check_size(self, draws: int, shape: tuple[int, ...], keep_params: bool) -> None:
        """Refuse draws that would not fit the memory.

        Raises:
            ConfigError: If they are more than `MOST_NUMBERS`.
        """
        walkers, dim = shape
        each = sum(one.num_data for one in self.sets.values()) + dim * keep_params
        if walkers * draws * each > MOST_NUMBERS:
            raise ConfigError(
                f"{walkers} walkers x {draws} draws x {each:,} numbers are more than the "
                f"{MOST_NUMBERS:,} that are held in memory. Name fewer examples, make fewer draws, "
                "or reduce what you need to an observable."
            )

    def run(
        self,
        ensemble: AbstractEnsemble,
        draws: int,
        thin: int,
        keep_params: bool,
        progress: bool | Callable[[Progress], None],
    ) -> PosteriorDraws:
        """Move the walkers, and evaluate."""
        problem = self.target.problem
        kept: dict[str, list[Any]] = {}

        def keep(name: str, value: Any) -> None:
            kept.setdefault(name, []).append(np.asarray(value))

        with reporting(progress) as report:
            for done in range(1, draws + 1):
                ensemble = ensemble.moved(thin)
                v = ensemble.displacement
                where = v, ensemble.keys, jnp.int32(done)
                energies = self.energies(problem, self.reference, *where)
                for name, value in energies._asdict().items():
                    keep(name, value)
                for name, function in {**self.by_example, **self.observables}.items():
                    keep(f"of {name}", function(v))
                if keep_params:
                    keep("displacement", v)
                if report is not None:
                    report(Progress("draws", done, draws, float(np.mean(kept["llc"]))))
        joined = {name: np.stack(values, axis=1) for name, values in kept.items()}
        posterior = problem.posterior
        return PosteriorDraws(
            energies=joined["llc"],
            slopes=joined["slope"],
            radius2=joined["radius2"],
            losses={name: joined[f"of {name}"] for name in self.by_example},
            init_losses=self.init_losses,
            observables={name: joined[f"of {name}"] for name in self.observables},
            nbeta=float(posterior.nbeta),
            localization=float(posterior.gamma),
            n_data=problem.num_data,
            dim=posterior.center.size,
            center_norm=float(np.linalg.norm(np.asarray(posterior.center, float))),
            thin=thin,
            fge=(ensemble.work + self._cost(joined["radius2"].size)) / problem.num_data,
            displacement=joined.get("displacement"),
            as_passed=self._in_full,
        )

    def _in_full(self, displacement: np.ndarray) -> PyTree:
        return self.as_passed(self.target.problem.posterior.center + displacement)

    def _cost(self, count: int) -> float:
        """Price what was evaluated at so many draws, in sample gradients."""
        examples = sum(one.num_data for one in self.sets.values())
        half = half_of_sample(self.target)
        of_energies = 2 * half * (GRADIENT + LOSS) or GRADIENT * self.target.problem.num_data
        return count * (of_energies + LOSS * examples)
