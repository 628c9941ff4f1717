"""What `make bench` measures: all but what is marked slow, which `make benchall` adds."""

from collections.abc import Iterable
from typing import Any

import pytest

SHORT = 10_000  # parameters


def sizes(values: Iterable[int], short: int = SHORT) -> list[Any]:
    """Return sizes as pytest's parameters, those above `short` marked slow."""
    return [
        pytest.param(value, marks=[pytest.mark.slow] if value > short else []) for value in values
    ]
