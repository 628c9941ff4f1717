"""Shared type names.

Axis vocabulary of the jaxtyping annotations: `dim` parameters of the model, `comp` mixture components,
`rank` columns of a covariance factor, `core` rows of the precision core, `locs` 0, 1 or `comp` means,
`draws` samples, `chains` independent fits, `examples` data points.
"""

from typing import Any, TypeAlias

import jaxtyping
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt32

Batch: TypeAlias = PyTree[Array]
Scalar: TypeAlias = Float[Array, ""]
Key: TypeAlias = PRNGKeyArray
Keys: TypeAlias = jaxtyping.Key[Array, " chains"]

__all__ = ["Any", "Array", "Batch", "Bool", "Float", "Int", "Key", "Keys", "PyTree", "Scalar", "UInt32"]
