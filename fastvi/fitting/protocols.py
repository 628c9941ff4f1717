"""What a fit tells those who watch it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """What a progress callback is told.

    Attributes:
        stage: Name of the stage.
        step: Steps so far, or of sampling the work so far.
        steps: Steps at the most, or of sampling the budget.
        value: ELBO of a fit; LLC so far of sampling.
        error: Standard error of `value`; NaN where it is not known.
        expected: Where it will end, in the unit of `step`, as it looks now; None where it is not
            known.
        traces: Those of the fit since the report before, each of shape (chains, steps).
    """

    stage: str
    step: int
    steps: int
    value: float
    error: float = math.nan
    expected: float | None = None
    traces: Mapping[str, Any] | None = None


def never() -> bool:
    """Say that there is no reason to end."""
    return False
