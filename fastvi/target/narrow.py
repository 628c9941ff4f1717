"""In how many bits a loss sees its parameters, read off its operations.

A model that computes in half precision casts parameters before it uses them. Walkers move in single
precision, and moves below the spacing of the narrow type change nothing in the loss.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import (  # pyright: ignore[reportPrivateImportUsage]
    ClosedJaxpr,
    Jaxpr,
    Literal,
)

# Operations that hand entries on as they are.
PASSED_ON = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "copy", "copy_p")


class Use(NamedTuple):
    """A stretch of the parameters, and the half-precision type that it is cast to.

    Parameters are counted array by array. None stands for use with all digits.
    """

    start: int
    stop: int
    dtype: str | None


def uses_of_parameters(jaxpr: Jaxpr, sizes: Sequence[int]) -> tuple[Use, ...]:
    """List the uses of a program's first arguments, arrays of so many parameters.

    The list is empty where none is of half precision. A stretch that goes where this does not
    follow counts as used with all its digits.
    """
    ends = list(itertools.accumulate(sizes))
    stretches = zip([0, *ends[:-1]], ends, strict=True)
    found = set(_uses(jaxpr, dict(zip(jaxpr.invars, stretches, strict=False))))
    is_narrow = any(use.dtype is not None for use in found)
    return tuple(sorted(found, key=repr)) if is_narrow else ()


def spacing_seen(
    uses: tuple[Use, ...], center: Any
) -> float | np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the relative spacing in which each parameter is seen; one number where all agree."""
    eps = float(jnp.finfo(center.dtype).eps)
    if not uses:
        return eps
    seen = np.full(center.size, np.inf)
    for use in uses:
        own = eps if use.dtype is None else max(eps, float(jnp.finfo(use.dtype).eps))
        seen[use.start : use.stop] = np.minimum(seen[use.start : use.stop], own)
    return np.where(np.isfinite(seen), seen, eps)  # what is not used at all


def narrow_dtype(uses: tuple[Use, ...]) -> str | None:
    """Return the coarsest half-precision type in which parameters are seen, if there is one."""
    found = {use.dtype for use in uses if use.dtype is not None}
    return max(found, key=lambda name: float(jnp.finfo(name).eps), default=None)


def _uses(jaxpr: Jaxpr, known: dict[Any, tuple[int, int]]) -> Iterator[Use]:
    """Follow the variables that are stretches of the parameters."""
    for equation in jaxpr.eqns:
        places = [
            place
            for place, one in enumerate(equation.invars)
            if not isinstance(one, Literal) and one in known
        ]
        for place in places:
            stretch = known[equation.invars[place]]
            inner = _inner(equation)
            passed = _passed_on(equation, *stretch)
            if passed is not None:
                known.update(passed)
            elif inner is not None:
                yield from _uses(inner, {inner.invars[place]: stretch})
            else:
                yield Use(*stretch, _narrow_target(equation))
    for one in jaxpr.outvars:
        if not isinstance(one, Literal) and one in known:
            yield Use(*known[one], None)


def _passed_on(equation: Any, start: int, stop: int) -> dict[Any, tuple[int, int]] | None:
    """Return the results that are stretches again; None where the operation computes with them."""
    name, params, results = equation.primitive.name, equation.params, equation.outvars
    is_flat = equation.invars[0].aval.ndim == 1
    if name in PASSED_ON:
        return {results[0]: (start, stop)}
    if name == "convert_element_type" and not _is_narrow(params["new_dtype"]):
        # to more digits, nothing is lost
        is_float = jnp.issubdtype(params["new_dtype"], jnp.floating)
        return {results[0]: (start, stop)} if is_float else None
    if name == "split" and is_flat:
        ends = start + np.cumsum(params["sizes"])
        starts = [start, *ends[:-1]]
        pairs = zip(starts, ends, strict=True)
        stretches = ((int(begin), int(end)) for begin, end in pairs)
        return dict(zip(results, stretches, strict=True))
    if name == "slice" and is_flat and params["strides"] is None:
        (first,), (last,) = params["start_indices"], params["limit_indices"]
        return {results[0]: (start + first, start + last)}
    return None


def _inner(equation: Any) -> Jaxpr | None:
    """Return the program inside an operation that takes the operation's arguments, if it is one."""
    found = [value for value in equation.params.values() if isinstance(value, (ClosedJaxpr, Jaxpr))]
    if len(found) != 1:
        return None
    inner = found[0].jaxpr if isinstance(found[0], ClosedJaxpr) else found[0]
    return inner if len(inner.invars) == len(equation.invars) else None


def _narrow_target(equation: Any) -> str | None:
    if equation.primitive.name != "convert_element_type":
        return None
    dtype = equation.params["new_dtype"]
    return jnp.dtype(dtype).name if _is_narrow(dtype) else None


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize <= 2
