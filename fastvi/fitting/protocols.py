"""What a fit tells those who watch it."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """What a progress callback is told.

    Attributes:
        stage: Name of the stage.
        step: Steps so far, or of sampling the work so far.
        steps: Steps at the most, or of sampling the budget.
        value: ELBO of a fit; LLC so far of sampling.
        traces: Those of the fit since the report before, each of shape (chains, steps).
    """

    stage: str
    step: int
    steps: int
    value: float
    traces: Mapping[str, Any] | None = None
