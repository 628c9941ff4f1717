"""Shared type names.

Axis vocabulary of the jaxtyping annotations: `dim` parameters of the model, `comp` mixture
components, `rank` columns of a covariance factor, `core` rows of the precision core, `locs` 0, 1 or
`comp` means, `draws` samples, `chains` independent fits, `examples` data points.
"""

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import jaxtyping
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from fastvi._vectors import Leaves

T = TypeVar("T")
if TYPE_CHECKING:
    Given = Annotated[T, "what a person passes"]
    PyTree: TypeAlias = Any  # type checkers do not know jaxtyping's
    Batch: TypeAlias = Any
else:
    from jaxtyping import PyTree

    Batch = PyTree[Array | np.ndarray]

    class Given:
        """The type of what a person passes, for readers and type checkers.

        At run time our own errors refuse it.
        """

        def __class_getitem__(cls, kind: Any) -> Any:
            return Any


Scalar: TypeAlias = Float[Array, ""]
Key: TypeAlias = PRNGKeyArray
Keys: TypeAlias = jaxtyping.Key[Array, " chains"]
# of the parameters, and of each walker's: in the model's own arrays where these come divided
if TYPE_CHECKING:  # formulas that take either do not ask which it is
    Vector: TypeAlias = Any
    Vectors: TypeAlias = Any
else:
    Vector = Float[Array, " dim"] | Leaves
    Vectors = Float[Array, "walkers dim"] | Leaves

__all__ = [
    "Any",
    "Array",
    "Batch",
    "Bool",
    "Float",
    "Given",
    "Int",
    "Key",
    "Keys",
    "PyTree",
    "Scalar",
    "UInt32",
    "Vector",
    "Vectors",
]
