"""What the host decides of every step before a program runs it: rates, annealing, records.

The program of the steps reads these numbers from arrays, so other numbers compile nothing.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from fastvi._typing import Array, Bool, Float, Int

MOST_COMPONENTS = np.iinfo(np.int32).max  # no bound
# Last learning rate relative to the peak. Half and double of it were measured: see
# docs/configuration.md, "The end of the schedule".
FINAL_RATE = 0.01


class ScheduleSettings(NamedTuple):
    """How rates, annealing and pruning go along a fit.

    Attributes:
        steps: Number of steps, at most where the fit may stop by itself.
        rate: Peak learning rate.
        decay: "cosine", "linear_decay" or "none", from the peak to the end.
        end_fraction: Last rate relative to the peak.
        warmup_fraction: Share of the steps in which the rate rises to its peak.
        record_every: Steps between records of slow statistics, prunings and snapshots.
        temperature: Temperature of the mixture weights' softmax at the first step.
        temperature_fraction: Share of the steps in which the temperature falls to 1; 0: it stays.
        entropy_bonus: lambda_H in the objective.
        entropy_bonus_steps: Steps after which the bonus ends; None: it stays.
        least_weight: Weight below which a component is pruned.
        most_components: Most components that pruning keeps.
    """

    steps: int = 5000
    rate: float = 1e-2
    decay: str = "cosine"
    end_fraction: float = FINAL_RATE
    warmup_fraction: float = 0.05
    record_every: int = 50
    temperature: float = 1.0
    temperature_fraction: float = 0.0
    entropy_bonus: float = 0.0
    entropy_bonus_steps: int | None = None
    least_weight: float = 0.0
    most_components: int = MOST_COMPONENTS

    @property
    def anneal_until(self) -> int:
        """The step from which temperature and entropy bonus stay as they are."""
        cooled = math.ceil(self.temperature_fraction * self.steps) if self.temperature != 1 else 0
        # A bonus without an end never changes.
        ended = min(self.entropy_bonus_steps or 0, self.steps) if self.entropy_bonus > 0 else 0
        return max(cooled, ended)


class Phases(NamedTuple):
    """The phases of a fit in steps: warm-up, the peak rate, then decay up to `end`."""

    warmup: float
    decay_start: float
    end: int


class StepRows(NamedTuple):
    """Numbers of each step, along a first axis of steps.

    `elapsed` is the share of the decay that lies behind, `records` whether slow statistics are
    taken, `prunes` whether light components go.
    """

    step: Int[Array | np.ndarray | np.generic, " steps"]
    rate: Float[Array | np.ndarray | np.generic, " steps"]
    elapsed: Float[Array | np.ndarray | np.generic, " steps"]
    records: Bool[Array | np.ndarray | np.generic, " steps"]
    prunes: Bool[Array | np.ndarray | np.generic, " steps"]
    temperature: Float[Array | np.ndarray | np.generic, " steps"]
    entropy_bonus: Float[Array | np.ndarray | np.generic, " steps"]


class StepPlan(NamedTuple):
    """What a call of the steps' program does: the first `length` of its rows."""

    rows: StepRows
    length: Int[Array | np.ndarray | np.generic, ""]
    least_weight: Float[Array | np.ndarray | np.generic, ""]
    most_components: Int[Array | np.ndarray | np.generic, ""]


def fixed_phases(schedule: ScheduleSettings) -> Phases:
    """Return the phases of a fit that runs all its steps: warm-up, then decay."""
    warmup = schedule.warmup_fraction * schedule.steps
    return Phases(warmup, warmup, schedule.steps)


def elapsed_decay(phases: Phases, step: Int[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """Return the share of the decay phase that lies behind, from 0 to 1."""
    length = max(phases.end - phases.decay_start, 1)
    return np.clip((step - phases.decay_start) / length, 0.0, 1.0)


def learning_rate(
    schedule: ScheduleSettings, phases: Phases, step: Int[np.ndarray, " steps"]
) -> Float[np.ndarray, " steps"]:
    """Evaluate the schedule: a linear rise, the peak, a decay to `end_fraction` of it, zero."""
    warm = np.minimum(1.0, (step + 1) / max(phases.warmup, 1))
    elapsed = elapsed_decay(phases, step)
    left = {
        "cosine": 0.5 * (1 + np.cos(np.pi * elapsed)),
        "linear_decay": 1 - elapsed,
        "none": np.ones_like(elapsed),
    }[schedule.decay]
    rate = schedule.rate * warm * (schedule.end_fraction + (1 - schedule.end_fraction) * left)
    # Steps beyond the end leave the parameters as they are.
    return np.where(step < phases.end, rate, 0.0)


def annealing(
    schedule: ScheduleSettings, step: Int[np.ndarray, " steps"]
) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    """Return the temperature and the entropy bonus of steps.

    The temperature falls linearly to 1, the bonus ends at once.
    """
    cooling = schedule.temperature_fraction * schedule.steps
    left = np.maximum(1 - step / cooling, 0.0) if cooling > 0 else np.ones(step.shape)
    ends = np.inf if schedule.entropy_bonus_steps is None else schedule.entropy_bonus_steps
    bonus = np.where(step < ends, schedule.entropy_bonus, 0.0)
    return 1 + (schedule.temperature - 1) * left, bonus


def plan_steps(
    schedule: ScheduleSettings, phases: Phases, first: int, length: int, capacity: int, dtype: Any
) -> StepPlan:
    """Return the plan of `length` steps from `first` on, in arrays of `capacity` rows."""
    step = first + np.arange(capacity)
    rate = learning_rate(schedule, phases, step)
    temperature, bonus = annealing(schedule, step)
    rows = StepRows(
        step=step.astype(np.int32),
        rate=rate.astype(dtype),
        elapsed=elapsed_decay(phases, step).astype(dtype),
        records=step % schedule.record_every == 0,
        # Where the rate is zero, nothing may change.
        prunes=((step + 1) % schedule.record_every == 0) & (rate > 0),
        temperature=temperature.astype(dtype),
        entropy_bonus=bonus.astype(dtype),
    )
    return StepPlan(
        rows,
        np.int32(length),
        np.asarray(schedule.least_weight, dtype),
        np.int32(schedule.most_components),
    )


def frozen(plan: StepPlan) -> StepPlan:
    """Return a plan whose steps leave the parameters as they are."""
    # at the start of the schedule, whatever the step: beyond its end moments never begin
    rows = plan.rows._replace(
        **{name: np.zeros_like(getattr(plan.rows, name)) for name in ("rate", "elapsed", "prunes")}
    )
    return plan._replace(rows=rows)
