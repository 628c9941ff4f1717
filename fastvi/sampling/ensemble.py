"""Walkers of a finished run: where they are, and how they go on."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fastvi._devices import off_devices
from fastvi._errors import ConfigError, DataError
from fastvi._typing import Array, Float, Keys
from fastvi.sampling.from_localizer.batches import DrawnReader
from fastvi.sampling.from_localizer.plan import TINY, Measured
from fastvi.sampling.from_localizer.setup import Course, WalkSetup, deal_course
from fastvi.sampling.from_localizer.steps import Steps, minibatch_programs
from fastvi.sampling.from_localizer.walk import Averaging as AveragingWalk
from fastvi.sampling.from_localizer.walk import Walk, advance, average, with_parts
from fastvi.sampling.keeping import NO_KEEPER
from fastvi.sampling.programs import Record, sampler_programs
from fastvi.sampling.run import (
    REFINE_AT,
    Averaging,
    RunSetup,
    RunState,
    SamplerResult,
    begin,
    finish,
    go_on,
    step_bias,
    switch_fidelity,
)
from fastvi.sampling.tuning import Fidelity, plan_energy_error
from fastvi.sampling.walkers import Walkers
from fastvi.target.data import Problem
from fastvi.target.fingerprint import Fingerprint, fingerprint_loss

# What a run that has ended knows beside where its walkers are.
TOLD = (
    *("llc", "block_noise", "noise_rounds", "width", "rounding", "steps", "returned", "work"),
    *("refinements", "longest_step"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What walkers sample: the loss, what it computed, and the posterior with its data.

    `is_masked` says whether the caller passed all parameters and a mask, not a restricted loss.
    """

    objective: Any
    loss: Fingerprint
    problem: Problem
    is_masked: bool = False

    def check_unchanged(self) -> Fingerprint:
        """Return what the loss computes now; refuse what is something else than before.

        Raises:
            DataError: If state that the loss reads has changed.
        """
        now = fingerprint_loss(self.objective, self.problem)
        if now.digest != self.loss.digest:
            raise DataError(
                "the loss computes something else than at the estimate: state that it reads has "
                "changed since (an attribute, a global, an array). Set it back, or run "
                "estimate_llc again."
            )
        return now


@dataclasses.dataclass(frozen=True)
class AbstractEnsemble(abc.ABC):
    """Walkers that have burnt in, of one posterior."""

    target: Target

    @abc.abstractmethod
    def awake(self, error: float) -> "AbstractEnsemble":
        """Return walkers that may move, of which these know nothing.

        A finished run holds no more than it takes to begin them.

        Args:
            error: What gradient noise and finite steps may each add to llc, relative to it. No
                control variate takes it off draws.
        """

    @abc.abstractmethod
    def moved(self, steps: int) -> "AbstractEnsemble":
        """Return them so many steps later; those before are used up."""

    @property
    @abc.abstractmethod
    def progress(self) -> Any:
        """What changes as they move: a pytree of arrays and numbers."""

    @abc.abstractmethod
    def at(self, progress: Any) -> "AbstractEnsemble":
        """Return them as they were when that was their progress."""

    @property
    @abc.abstractmethod
    def displacement(self) -> Float[Array, "walkers dim"]:
        """Where they are, less w*."""

    @property
    @abc.abstractmethod
    def keys(self) -> Keys:
        """Their keys."""

    @property
    @abc.abstractmethod
    def work(self) -> float:
        """Sample gradients since they were woken."""


@dataclasses.dataclass(frozen=True)
class BlockEnsemble(AbstractEnsemble):
    """Walkers of a run that began at a fit.

    Attributes:
        setup: What the run shared.
        walkers: Where it ended.
        told: What it knew of noise, width and llc: the end's other numbers.
        fidelity: That of its gradients.
        records: What it has averaged.
        state: The run that goes on; None before.
    """

    setup: RunSetup
    walkers: Walkers
    told: dict[str, Any]
    fidelity: Fidelity
    records: tuple[Record, ...]
    state: RunState | None = None

    @classmethod
    def parked(cls, target: Target, run: SamplerResult) -> "BlockEnsemble":
        """Hold the end of a run, without its table of gradients."""
        end = run.end
        told = {name: getattr(end, name) for name in TOLD}
        return cls(target, run.setup, end.walkers, told, end.fidelity, run.records)

    @property
    def callable_setup(self) -> RunSetup:
        """The setup, with programs that call the loss of this target.

        Programs are shared, and may have been lent the loss of another estimate that computes the
        same and is gone.
        """
        target, settings = self.target, self.setup.settings
        programs = sampler_programs(target.objective, target.loss, target.problem, settings)
        shared = programs.layout.share((target.problem, self.setup.reference_loss))
        problem, reference_loss = shared
        return dataclasses.replace(
            self.setup, programs=programs, problem=problem, reference_loss=reference_loss
        )

    def awake(self, error: float) -> "BlockEnsemble":
        """Evaluate the anchor and the walkers anew: a gradient on all data, and one of each."""
        setup = dataclasses.replace(self.callable_setup, error=error)
        state = self._told_anew(setup)._replace(work=0.0)
        state = switch_fidelity(setup, state, self._exact(setup, state))
        return dataclasses.replace(self, setup=setup, state=state)

    def averaged_on(
        self,
        error: float,
        budget: float,
        report: Callable[[float, float, float], None],
        ends: Callable[[], bool],
    ) -> SamplerResult:
        """Go on with the average of the run, to a smaller error.

        What it has averaged counts, unless its dynamics are too inexact for this error.

        Args:
            error: As in `RunSetup`.
            budget: The same, beside what the run has spent.
            report: The same.
            ends: The same.

        Raises:
            ConfigError: If the budget pays for no round.
        """
        setup = dataclasses.replace(
            self.callable_setup,
            error=error,
            budget=self.told["work"] + budget,
            report=report,
            ends=ends,
        )
        state, records = self._told_anew(setup), self.records
        fidelity = self.fidelity
        is_exact = step_bias(fidelity.energy_error) <= REFINE_AT * error
        if not (is_exact and setup.is_quiet(state, fidelity.num_blocks)):
            fidelity, records = self._exact(setup, state), ()
        least = setup.run_cost(fidelity.num_blocks, state.num_walkers)
        if least > budget:
            raise ConfigError(
                f"budget={budget:.4g} sample gradients pay for no more of the walk. {least:.0f} "
                "are enough."
            )
        state = switch_fidelity(setup, state, fidelity)
        return finish(setup, Averaging(state, (), state.work + least, records))

    def _told_anew(self, setup: RunSetup) -> RunState:
        """Return the run as it ended, of whose gradients nothing is known."""
        state = begin(setup, self.walkers)._replace(**self.told)
        untold = self.fidelity._replace(num_blocks=0)
        return state._replace(
            estimate=state.estimate._replace(fidelity=untold),
            allowed_bias=setup.allowed_bias(state.llc),
        )

    def _exact(self, setup: RunSetup, state: RunState) -> Fidelity:
        """Return a fidelity that is exact enough for the error of the setup."""
        planned = plan_energy_error(setup.error, setup.settings)
        blocks = setup.max_blocks(state, state.allowed_bias)
        return Fidelity(blocks, min(self.fidelity.energy_error, planned))

    def moved(self, steps: int) -> "BlockEnsemble":
        """Return them so many steps later."""
        assert self.state is not None, "walkers are woken first"
        return dataclasses.replace(self, state=go_on(self.setup, self.state, steps))

    @property
    def progress(self) -> RunState | None:
        """The run that goes on."""
        return self.state

    def at(self, progress: RunState) -> "BlockEnsemble":
        """Return them at another state of their run."""
        return dataclasses.replace(self, state=progress)

    @property
    def displacement(self) -> Float[Array, "walkers dim"]:
        """Where they are, less w*."""
        walkers = self.walkers if self.state is None else self.state.walkers
        return off_devices(walkers.linear_map.displacement(walkers.position))

    @property
    def keys(self) -> Keys:
        """Their keys."""
        return self.walkers.keys

    @property
    def work(self) -> float:
        """Sample gradients since they were woken."""
        return 0.0 if self.state is None else self.state.work


@dataclasses.dataclass(frozen=True)
class MinibatchEnsemble(AbstractEnsemble):
    """Walkers of a walk from the localizer.

    Attributes:
        setup: What the walk shared.
        course: Where they are.
        llc: That of the walk.
        measured: What was measured before it.
        said: What its steps have said; None of walkers that have moved since.
    """

    setup: WalkSetup
    course: Course
    llc: float
    measured: Measured
    said: Steps | None

    def awake(self, error: float) -> "MinibatchEnsemble":
        """Copy the state, which steps use up, and make batches as large as the heat asks for."""
        setup, course = self._callable()
        wanted = math.ceil(course.parts * course.heat / max(error * abs(self.llc), TINY))
        course = with_parts(course, max(course.parts, min(wanted, setup.reader.most)))
        return dataclasses.replace(self, setup=setup, course=course._replace(work=0.0), said=None)

    def averaged_on(
        self,
        error: float,
        budget: float,
        report: Callable[[float, float, float], None],
        ends: Callable[[], bool],
    ) -> Walk:
        """Go on with the average of the walk, to a smaller error.

        Args:
            error: As in `WalkSetup`.
            budget: The same, beside what the walk has spent.
            report: The same.
            ends: The same.

        Raises:
            ConfigError: If the budget pays for no step.
        """
        setup, course = self._callable()
        step = setup.cost(1, course.parts, course.is_anchored)
        if step > budget:
            raise ConfigError(
                f"budget={budget:.4g} sample gradients pay for no step of the walk. {step:.0f} pay "
                "for one."
            )
        setup = dataclasses.replace(
            setup,
            error=error,
            budget=course.work + budget,
            report=report,
            ends=ends,
            must_walk=True,  # for a fit it is too late
        )
        walk = average(
            setup, AveragingWalk(self.measured, course._replace(said=self.said)), NO_KEEPER
        )
        assert isinstance(walk, Walk), "it must walk"
        return walk

    def _callable(self) -> tuple[WalkSetup, Course]:
        """Return what can be called, and a course of its own."""
        state = jax.tree_util.tree_map(jnp.array, self.course.state)
        # as in `BlockEnsemble.callable_setup`
        setup, target = self.setup, self.target
        programs = minibatch_programs(
            target.objective,
            target.loss,
            setup.posterior,
            setup.reader.first,
            setup.programs.length,
        )
        layout, examples = programs.layout, target.problem.data.examples
        reader = DrawnReader(layout.share(examples), setup.reader.part_size)
        setup = dataclasses.replace(setup, programs=programs, reader=reader)
        return setup, deal_course(self.course._replace(state=state), layout)

    def moved(self, steps: int) -> "MinibatchEnsemble":
        """Return them so many steps later.

        Raises:
            DataError: If the data end.
        """
        course, end = self.course, self.course.done + steps
        while course.done < end:
            course = advance(self.setup, course._replace(said=None), end - course.done)
            if not course.is_fed:
                raise DataError(
                    "the data ended before the draws were made. Hold the data in memory as arrays."
                )
        return dataclasses.replace(self, course=course._replace(said=None))

    @property
    def progress(self) -> Course:
        """Their course, without what its steps have said."""
        return self.course._replace(said=None)

    def at(self, progress: Course) -> "MinibatchEnsemble":
        """Return them at another place of their course."""
        return dataclasses.replace(self, course=progress)

    @property
    def displacement(self) -> Float[Array, "walkers dim"]:
        """Where they are, less w*."""
        return off_devices(self.course.state.position * self.course.scale)

    @property
    def keys(self) -> Keys:
        """Their keys."""
        return self.setup.keys

    @property
    def work(self) -> float:
        """Sample gradients since they were woken."""
        return self.course.work
