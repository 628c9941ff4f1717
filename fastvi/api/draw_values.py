"""What `sample_posterior` evaluates at each draw, and the loop that does."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Array, Batch, Given, PyTree
from fastvi.api.other_data import on_other_data
from fastvi.fitting.protocols import Progress
from fastvi.observables.draws import passed_form
from fastvi.observables.evaluate import (
    ExampleLosses,
    energies_at,
    half_of_sample,
    mean_rise_at,
    observable_at,
)
from fastvi.observables.split import GroupMeans, points_of
from fastvi.observables.storage import AbstractSink
from fastvi.results.draw_identity import LOSSES, OBSERVABLES, TRACES
from fastvi.results.progress import reporting
from fastvi.sampling.ensemble import AbstractEnsemble, Target
from fastvi.target.losses import passed_examples
from fastvi.target.work import GRADIENT, LOSS

Report = bool | Callable[[Progress], None]
# Dimensions up to which the place of each draw and the gradient there are kept, for control
# variates. Half leaves small networks without; double holds as much again, 13 MiB for each of the
# two at the usual number of draws of 8 walkers.
MOST_PLACED = 4096


class DrawValues:
    """What is evaluated at each draw: programs, their data, and what they cost."""

    def __init__(
        self,
        target: Target,
        losses: Mapping[str, Given[Batch]],
        token_losses: Mapping[str, Given[Batch]],
        observables: Mapping[str, Any],
    ):
        _check_names(losses, token_losses, observables)
        self.target, problem = target, target.problem
        self.as_passed = passed_form(target.objective, target.is_masked)
        center = problem.posterior.center
        self.losses = {
            **self._losses("losses", losses, by_token=False),
            **self._losses("token_losses", token_losses, by_token=True),
        }
        self.observables = {
            name: self._observable(name, given) for name, given in observables.items()
        }
        self.energies = energies_at(target)
        self.zero = jnp.zeros((1, center.size), center.dtype)
        self.reference = mean_rise_at(target)(problem, self.zero[0], np.float32(0.0))
        self.init_losses = {name: one.at(self.zero)[0] for name, one in self.losses.items()}

    def _losses(
        self, keyword: str, sets: Mapping[str, Given[Batch]], by_token: bool
    ) -> dict[str, ExampleLosses]:
        objective, problem = self.target.objective, self.target.problem
        return {
            name: ExampleLosses(
                self.target,
                on_other_data(objective, problem, data, f"{keyword}[{name!r}]", in_order=True),
                by_token,
            )
            for name, data in sets.items()
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

    def shapes(self, keep_params: bool) -> dict[str, tuple[int, ...]]:
        """Return the shape of each value of a draw."""
        return {
            **TRACES,
            **{LOSSES + name: one.shape for name, one in self.losses.items()},
            **{
                OBSERVABLES + name: jax.eval_shape(function, self.zero).shape[1:]
                for name, function in self.observables.items()
            },
            **{name: self.zero.shape[1:] for name in self._places(keep_params)},
        }

    def _places(self, keep_params: bool) -> tuple[str, ...]:
        if self.zero.size <= MOST_PLACED:
            return "displacement", "gradient"
        return ("displacement",) if keep_params else ()

    def run(
        self,
        ensemble: AbstractEnsemble,
        means: GroupMeans,
        sink: AbstractSink,
        draws: int,
        thin: int,
        progress: Report,
    ) -> tuple[AbstractEnsemble, GroupMeans]:
        """Move the walkers, and evaluate what the sink takes."""
        llc = [float(np.mean(one)) for one in sink.seen("energies")]
        # what is complete is written, however the run ends
        with contextlib.closing(sink), reporting(progress) as report:
            for number in range(sink.done + 1, draws + 1):
                ensemble = ensemble.moved(thin)
                means = means.with_draw(ensemble.displacement)
                for name, rows, values in self._values(ensemble, number, sink.names):
                    sink.put(name, number - 1, rows, np.asarray(values))
                    if name == "energies":
                        llc.append(float(np.mean(values)))
                sink.finish(number - 1, self.fge(ensemble, number), (ensemble.progress, means))
                if report is not None:
                    report(Progress("draws", number, draws, float(np.mean(llc))))
        return ensemble, means

    def _values(
        self, ensemble: AbstractEnsemble, number: int, names: Any
    ) -> Iterator[tuple[str, slice, Any]]:
        """Yield what is evaluated where the walkers are: its name, which rows, and the values."""
        v, everything = ensemble.displacement, slice(None)
        at = v, ensemble.keys, jnp.int32(number)
        found = self.energies(self.target.problem, self.reference, *at)
        traces = found.llc, found.slope, found.radius2
        for name, values in zip(TRACES, traces, strict=True):
            yield name, everything, values
        for name, one in self.losses.items():
            for rows, losses in one.pieces(v):
                yield LOSSES + name, rows, losses
        for name, function in self.observables.items():
            yield OBSERVABLES + name, everything, function(v)
        for name, values in (("displacement", v), ("gradient", found.gradient)):
            if name in names:
                yield name, everything, values

    @functools.cached_property
    def numbers(self) -> dict[str, Any]:
        """What the posterior is."""
        problem, posterior = self.target.problem, self.target.problem.posterior
        return {
            "nbeta": float(posterior.nbeta),
            "localization": float(posterior.gamma),
            "n_data": problem.num_data,
            "dim": posterior.center.size,
            "center_norm": float(np.linalg.norm(np.asarray(posterior.center, float))),
            "init_loss": float(self.reference),
        }

    def in_full(self, displacement: np.ndarray) -> PyTree:
        """Return the parameters at a displacement, as they were passed."""
        return self.as_passed(self.target.problem.posterior.center + displacement)

    def fge(self, ensemble: AbstractEnsemble, draws: int) -> float:
        """Price so many draws of each walker, in full gradients."""
        examples = sum(one.shape[0] for one in self.losses.values())
        half, num_data = half_of_sample(self.target), self.target.problem.num_data
        of_energies = 2 * half * (GRADIENT + LOSS) or GRADIENT * num_data
        count = ensemble.displacement.shape[0] * draws
        work = ensemble.work + count * (of_energies + LOSS * examples)
        return work / num_data + LOSS * points_of(ensemble.displacement.shape[0])


def _check_names(*named: Mapping[str, Any]) -> None:
    known = {"llc"}
    for mapping in named:
        for name in mapping:
            if name in known:
                raise ConfigError(
                    f"{name!r} names two things that are evaluated: give one another name."
                )
        known.update(mapping)
