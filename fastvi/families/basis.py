"""A basis that a person gives, as a hashable value."""

from typing import Any, final

import numpy as np


@final
class Basis:
    """Columns that span a subspace; equal where the numbers are."""

    def __init__(self, columns: Any):
        self.columns = np.asarray(columns, float)
        # The hash is that of the numbers, so they must not change.
        self.columns.flags.writeable = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and np.array_equal(self.columns, other.columns)

    def __hash__(self) -> int:
        return hash((self.columns.shape, self.columns.tobytes()))

    def __repr__(self) -> str:
        return f"Basis({self.columns.shape[0]} x {self.columns.shape[1]})"

    def tolist(self) -> list[list[float]]:
        """Return rows of numbers."""
        return self.columns.tolist()
