"""Walkers of a finished run: where they are, and how they go on."""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fastvi._devices import off_devices
from fastvi._errors import DataError
from fastvi._typing import Array, Float, Keys
from fastvi.sampling.from_localizer.batches import DrawnReader
from fastvi.sampling.from_localizer.plan import TINY
from fastvi.sampling.from_localizer.setup import Course, WalkSetup, deal_course
from fastvi.sampling.from_localizer.steps import minibatch_programs
from fastvi.sampling.from_localizer.walk import advance, with_parts
from fastvi.sampling.programs import sampler_programs
from fastvi.sampling.run import RunSetup, RunState, begin, go_on, switch_fidelity
from fastvi.sampling.tuning import Fidelity, plan_energy_error
from fastvi.sampling.walkers import Walkers
from fastvi.target.data import Problem
from fastvi.target.fingerprint import Fingerprint, fingerprint_loss


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
        state: The run that goes on; None before.
    """

    setup: RunSetup
    walkers: Walkers
    told: dict[str, Any]
    state: RunState | None = None

    @classmethod
    def parked(cls, target: Target, setup: RunSetup, end: RunState) -> "BlockEnsemble":
        """Hold the end of a run, without its table of gradients."""
        known = ("llc", "block_noise", "noise_rounds", "width", "rounding", "steps")
        told = {name: getattr(end, name) for name in known}
        told["energy_error"] = end.fidelity.energy_error
        return cls(target, setup, end.walkers, told)

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
        setup, told = dataclasses.replace(self.callable_setup, error=error), dict(self.told)
        before = Fidelity(0, told.pop("energy_error"))
        state = begin(setup, self.walkers)._replace(**told)
        state = state._replace(
            estimate=state.estimate._replace(fidelity=before),
            allowed_bias=setup.allowed_bias(state.llc),
        )
        energy_error = min(before.energy_error, plan_energy_error(error, setup.settings))
        exact = Fidelity(setup.max_blocks(state, state.allowed_bias), energy_error)
        state = switch_fidelity(setup, state, exact)
        return dataclasses.replace(self, setup=setup, state=state)

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
    """Walkers of a walk from the localizer."""

    setup: WalkSetup
    course: Course
    llc: float

    def awake(self, error: float) -> "MinibatchEnsemble":
        """Copy the state, which steps use up, and make batches as large as the heat asks for."""
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
        course = deal_course(self.course._replace(state=state, work=0.0), layout)
        wanted = math.ceil(course.parts * course.heat / max(error * abs(self.llc), TINY))
        parts = max(course.parts, min(wanted, reader.most))
        return dataclasses.replace(self, setup=setup, course=with_parts(course, parts))

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
