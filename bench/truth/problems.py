"""The registry of problems with known answers."""

from collections.abc import Callable, Sequence

from bench.truth.factorization import FACTORIZATIONS
from bench.truth.linear_nets import LINEAR_NETS
from bench.truth.nets import NETS
from bench.truth.problem import Problem
from bench.truth.quadratic_units import QUADRATIC_UNITS
from bench.truth.quadratics import QUADRATICS
from bench.truth.regression import REGRESSIONS
from bench.truth.singular import SINGULAR
from bench.truth.superposition import SUPERPOSITION
from bench.truth.trained import TRAINED

PROBLEMS: dict[str, Callable[[], Problem]] = {
    **QUADRATICS,
    **SINGULAR,
    **LINEAR_NETS,
    **NETS,
    **SUPERPOSITION,
    **QUADRATIC_UNITS,
    **REGRESSIONS,
    **FACTORIZATIONS,
    **TRAINED,
}


def select(*sizes: str) -> Sequence[Problem]:
    """Build the problems of the given sizes."""
    return [
        problem for problem in (build() for build in PROBLEMS.values()) if problem.size in sizes
    ]
