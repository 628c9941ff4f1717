"""What a fit tells those who watch it, and what it asks of those who keep its progress."""

import abc
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fastvi.fitting.run import Course


class Progress(NamedTuple):
    """What a progress callback is told.

    `value` is the ELBO of a fit, the llc so far of a correction.

    `traces`, of shape (chains, steps), are those of the fit since the report before.
    """

    stage: str
    step: int
    steps: int
    value: float
    traces: dict[str, Any] | None = None


class AbstractKeeper(abc.ABC):
    """Keeps the progress of a fit."""

    @abc.abstractmethod
    def restore(self, course: "Course") -> None:
        """Move a course to where the kept one was, if there is one."""

    @abc.abstractmethod
    def save(self, course: "Course") -> None:
        """Keep the course."""
