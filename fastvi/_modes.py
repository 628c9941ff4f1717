"""Strict modes of jax are for the code of those who set them.

This package's runs in jax's own, a person's in theirs.

Under `jax_numpy_rank_promotion="raise"` or `jax_numpy_dtype_promotion="strict"` a person's loss is
traced as they say. `jax_transfer_guard="disallow"` asks that no data pass to a device unasked for;
data and parameters that are passed to an estimate are asked for. "disallow_explicit" forbids these
too, and is left alone.

By jax's default, products of matrices in single precision are products of 11 bits on recent NVIDIA
GPUs, and of 8 on TPUs. The package's own keep all 24; a person's model multiplies as they say,
forwards and backwards.

A mesh that a person has set (`jax.set_mesh`) says which devices walkers and chains are divided
over. The package divides by itself what is to be divided, and its other arrays know of no mesh.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

P = ParamSpec("P")
R = TypeVar("R")
_THEIRS = threading.local()  # modes and mesh outside, while this package's own are on
NO_MESH = Mesh(np.empty((), object), ())
# jax's context managers, each of the setting jax_<name>, and what the package runs in
OWN = {
    "numpy_rank_promotion": "allow",
    "numpy_dtype_promotion": "standard",
    "default_matmul_precision": "highest",
}
# names of the precision of products that keeps all digits of single precision
EXACT = ("highest", "float32", "F32_F32_F32")
BFLOAT16_EPS, TENSORFLOAT_EPS = 2.0**-7, 2.0**-10
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
    before, mesh = getattr(_THEIRS, "modes", None), getattr(_THEIRS, "mesh", None)
    # a precision that nobody has set by its name: jax takes products of a derivative, which are
    # traced later, for ones without a precision, as the package's own
    _THEIRS.modes = before or tuple(jax_setting(f"jax_{name}") or "default" for name in OWN)
    _THEIRS.mesh, no_mesh = _take_mesh()
    guard = (
        contextlib.nullcontext()
        if jax_setting("jax_transfer_guard") in EXPLICIT
        else jax.transfer_guard("allow")
    )
    try:
        with _modes(OWN.values()), guard, no_mesh:
            yield
    finally:
        _THEIRS.modes, _THEIRS.mesh = before, mesh


def their_mesh() -> Mesh | None:
    """Return the mesh that a person has set, None where they have set none."""
    mesh = getattr(_THEIRS, "mesh", None)
    if mesh is None:
        get_mesh = getattr(jax.sharding, "get_mesh", None) or _mesh_of_old_jax()
        # jax tells of no mesh inside of a trace, where nothing is divided
        with contextlib.suppress(ValueError):
            mesh = None if get_mesh is None else get_mesh()
    return None if mesh is None or mesh.empty else mesh


def _take_mesh() -> tuple[Mesh | None, Any]:
    """Return the mesh that a person has set, and what hides it from jax for a block.

    jax's own functions go by it, and refuse arrays that are not on all of its devices.
    """
    mesh = their_mesh()
    with contextlib.suppress(ValueError):  # inside of a trace
        return mesh, contextlib.nullcontext() if mesh is None else jax.set_mesh(NO_MESH)
    return None, contextlib.nullcontext()


def _mesh_of_old_jax() -> Callable[[], Mesh] | None:
    """Return what jax has before `jax.sharding.get_mesh`, which came with 0.8."""
    with contextlib.suppress(ImportError):
        from jax._src import mesh

        return getattr(mesh, "get_concrete_mesh", None)
    return None


def jax_setting(name: str) -> Any:
    """Return a setting of jax as it is in this thread.

    `jax.config.read` refuses those that a context sets.
    """
    return getattr(jax.config, name)


def their_product_eps() -> float:
    """Return the relative spacing of what a person's model multiplies in single precision.

    It is 0 where products keep all digits.
    """
    modes, backend = getattr(_THEIRS, "modes", None), jax.default_backend()
    theirs = jax_setting("jax_default_matmul_precision") if modes is None else modes[-1]
    if backend == "cpu" or theirs in EXACT:
        return 0.0
    return BFLOAT16_EPS if backend == "tpu" or theirs == "bfloat16" else TENSORFLOAT_EPS


def call_in_their_modes(function: Callable[..., Any], *args: Any) -> Any:
    """Call a person's function in the modes that they have set."""
    modes = getattr(_THEIRS, "modes", None)
    if modes is None:
        return function(*args)
    with _modes(modes):
        return function(*args)


@contextlib.contextmanager
def their_products() -> Iterator[None]:
    """Multiply as a person has set it, where a function of theirs is called or differentiated.

    What jax derives of a function is traced after the function, and so outside of
    `call_in_their_modes`.
    """
    modes = getattr(_THEIRS, "modes", None)
    if modes is None:
        yield
        return
    with jax.default_matmul_precision(modes[-1]):
        yield


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Multiply with all digits of single precision, in a person's function too."""
    before = getattr(_THEIRS, "modes", None)
    _THEIRS.modes = None if before is None else (*before[:-1], EXACT[0])
    try:
        with jax.default_matmul_precision(EXACT[0]):
            yield
    finally:
        _THEIRS.modes = before


@contextlib.contextmanager
def _modes(values: Iterable[str | None]) -> Iterator[None]:
    """Set the modes that `OWN` names."""
    with contextlib.ExitStack() as stack:
        for name, value in zip(OWN, values, strict=True):
            stack.enter_context(getattr(jax, name)(value))
        yield
