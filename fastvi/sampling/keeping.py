"""Progress of walkers: what a run hands out after each round, and is given back to go on."""

import abc
from collections.abc import Callable
from typing import Any


class AbstractWalkKeeper(abc.ABC):
    """Keeps the progress of walkers."""

    @abc.abstractmethod
    def restore(self) -> Any:
        """Return the progress that was kept last; None where there is none."""

    @abc.abstractmethod
    def save(self, progress: Callable[..., Any], *told: Any, is_last: bool = False) -> None:
        """Keep the progress, named tuples that hold all a run needs, or leave it for a later one.

        The last of a run is kept whatever it costs.

        Args:
            progress: Returns it of what is `told`, where it is kept.
            told: Its arguments.
            is_last: Whether the run has ended.
        """


class NoKeeper(AbstractWalkKeeper):
    """Keeps nothing."""

    def restore(self) -> None:
        """Return nothing."""

    def save(self, progress: Callable[..., Any], *told: Any, is_last: bool = False) -> None:
        """Keep nothing."""


NO_KEEPER = NoKeeper()
