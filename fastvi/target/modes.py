"""Strict modes of jax are for the code of those who set them.

This package's runs in jax's own, a person's in theirs.

Under `jax_numpy_rank_promotion="raise"` or `jax_numpy_dtype_promotion="strict"` a person's loss is
traced as they say. `jax_transfer_guard="disallow"` asks that no data pass to a device unasked for;
data and parameters that are passed to an estimate are asked for. "disallow_explicit" forbids these
too, and is left alone.

Products of matrices in single precision are products of 11 bits on GPUs and TPUs, by jax's default.
The package's own keep all 24; a person's model computes as they say.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")
_THEIRS = threading.local()  # the modes outside, while this package's own are on
# jax's context managers, each of the setting jax_<name>, and what the package runs in
OWN = {
    "numpy_rank_promotion": "allow",
    "numpy_dtype_promotion": "standard",
    "default_matmul_precision": "highest",
}
EXPLICIT = ("disallow_explicit", "log_explicit")


def in_own_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Run an entry point of the package in jax's own modes."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _own_modes():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _own_modes() -> Iterator[None]:
    before = getattr(_THEIRS, "modes", None)
    _THEIRS.modes = before or tuple(jax_setting(f"jax_{name}") for name in OWN)
    guard = (
        contextlib.nullcontext()
        if jax_setting("jax_transfer_guard") in EXPLICIT
        else jax.transfer_guard("allow")
    )
    try:
        with _modes(OWN.values()), guard:
            yield
    finally:
        _THEIRS.modes = before


def jax_setting(name: str) -> Any:
    """Return a setting of jax as it is in this thread.

    `jax.config.read` refuses those that a context sets.
    """
    return getattr(jax.config, name)


def call_in_their_modes(function: Callable[..., Any], *args: Any) -> Any:
    """Call a person's function in the modes that they have set."""
    modes = getattr(_THEIRS, "modes", None)
    if modes is None:
        return function(*args)
    with _modes(modes):
        return function(*args)


@contextlib.contextmanager
def _modes(values: Iterable[str | None]) -> Iterator[None]:
    """Set the modes that `OWN` names."""
    with contextlib.ExitStack() as stack:
        for name, value in zip(OWN, values, strict=True):
            stack.enter_context(getattr(jax, name)(value))
        yield
