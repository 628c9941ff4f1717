"""What a walk from the localizer shares, and where it is between two rounds."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from fastvi._devices import AbstractLayout
from fastvi._typing import Keys, Vector
from fastvi._vectors import shape_of
from fastvi.fitting.protocols import never
from fastvi.sampling.dynamics import State
from fastvi.sampling.from_localizer.batches import AbstractReader, AbstractSource
from fastvi.sampling.from_localizer.steps import MinibatchPrograms, RoundInputs, Steps
from fastvi.sampling.settings import SamplerSettings
from fastvi.target.posterior import LocalPosterior
from fastvi.target.work import GRADIENT, LOSS

# Time after which a momentum is forgotten: half of it is critical damping in round directions, and
# heat is proportional to it. At half, walkers diffuse; at double, heat is double.
FRICTION_TIME = 0.5


@dataclasses.dataclass(frozen=True)
class WalkSetup:
    """What a walk shares from beginning to end.

    Attributes:
        programs: The compiled round.
        posterior: The target.
        leaf_sizes: Lengths of the arrays of parameters, in order.
        reader: Gives the batches.
        keys: One key for each walker.
        seed: Of the directions that curvature is measured along, and of the start.
        settings: The sampler's.
        error: Standard error that is wanted, relative to llc.
        budget: Sample gradients that the walk never exceeds.
        must_walk: Whether to walk however stiff the posterior is, as nothing else is possible.
        report: Receives the work so far, llc and its error.
        num_data: Examples of all data.
        full_gradient: Returns the gradient of L_n at w*; None where not all data are at hand.
        spent: Sample gradients that were spent before the walk.
        ends: Asked between rounds whether to end there.
    """

    programs: MinibatchPrograms
    posterior: LocalPosterior
    leaf_sizes: tuple[int, ...]
    reader: AbstractReader
    keys: Keys
    seed: np.random.SeedSequence
    settings: SamplerSettings
    error: float
    budget: float
    must_walk: bool
    report: Callable[[float, float, float], None]
    num_data: int
    full_gradient: Callable[[], Vector] | None = None
    spent: float = 0.0
    ends: Callable[[], bool] = never

    @property
    def dtype(self) -> np.dtype:
        """Return the type of the parameters."""
        return self.posterior.center.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Return walkers and dimensions."""
        return self.keys.shape[0], self.posterior.center.size

    def cost(self, steps: int, parts: int, is_anchored: bool = False) -> float:
        """Price steps of all walkers: of each example a gradient, and at w* a loss or another."""
        return (GRADIENT + (GRADIENT if is_anchored else LOSS)) * self.examples(steps, parts)

    def examples(self, steps: int, parts: int) -> int:
        """Count the examples of some steps of all walkers."""
        return steps * parts * self.keys.shape[0] * self.reader.part_size


class Course(NamedTuple):
    """A walk between two rounds.

    Attributes:
        state: The walkers.
        scale: What one unit of each of their coordinates is in model coordinates.
        step_size: The step.
        anchor: Gradient of L_n at w*, where batches are anchored there; None where they are not.
        parts: Parts of a batch.
        heat: As in `Walk`, for this batch.
        gradient_doubt: Nats that llc may be off for a gradient at w* that was taken for zero.
        said: What the steps that are averaged say.
        done: Number of the next step.
        work: Sample gradients spent.
        examples: Examples read.
        is_fed: Whether there are more examples.
    """

    state: State
    scale: Vector
    step_size: float
    anchor: Vector | None = None
    parts: int = 1
    heat: float = 0.0
    gradient_doubt: float = 0.0
    said: Steps | None = None
    done: int = 0
    work: float = 0.0
    examples: int = 0
    is_fed: bool = True

    @property
    def is_anchored(self) -> bool:
        """Whether batches are anchored at w*."""
        return self.anchor is not None


def deal_course(course: Course, layout: AbstractLayout) -> Course:
    """Put a walk on the devices that its walkers are divided over."""
    return course._replace(
        state=layout.deal(course.state, shape_of(course.state.position)[0]),
        scale=layout.share(course.scale),
        anchor=layout.share(course.anchor),
    )


def call_round(
    setup: WalkSetup, course: Course, source: AbstractSource, start: int, stop: int
) -> tuple[State, Steps]:
    """Call the compiled round."""
    dtype = course.state.position.dtype
    inputs = RoundInputs(
        setup.posterior,
        course.scale,
        source,
        course.anchor,
        setup.keys,
        jax.device_put(np.int32(course.parts)),  # for which nothing is compiled
    )
    inputs = setup.programs.layout.share(inputs)
    return setup.programs.advance(
        inputs,
        course.state,
        *(np.asarray(value, dtype) for value in (course.step_size, FRICTION_TIME)),
        *(np.int32(value) for value in (course.done, start, stop)),
    )


def affordable_steps(setup: WalkSetup, course: Course, steps: int, share: float = 1.0) -> int:
    """Return how many of these steps a share of the budget pays for."""
    left = share * setup.budget - course.work  # may be less than nothing after measurements
    return max(0, min(steps, int(left / setup.cost(1, course.parts, course.is_anchored))))
