"""Compilation.

What it costs, by jax's public monitoring events; quick options; who owns programs; work ahead.
"""

import dataclasses
import functools
import gc
import hashlib
import os
import platform
import threading
import time
import types
import weakref
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import monitoring

from fastvi._devices import layout_in_use
from fastvi._modes import in_own_modes, their_products
from fastvi._typing import Given

BACKEND_EVENT = "/jax/core/compile/backend_compile_duration"
WAIT_EVENT = "/fastvi/compile/wait_duration"  # for programs that compile in other threads
COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    BACKEND_EVENT,
    WAIT_EVENT,
)
# XLA's options for programs that run once or a few times. Measured on CPU, jax 0.10: XLA's older
# emitters and LLVM's first level compile in half of the time and run at 0.6 to 0.8 of the speed.
# Without LLVM a program compiles in a fifth of the time, and runs at a third of the speed but for
# products of matrices.
QUICK_OPTIONS: dict[str, Any] = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_backend_optimization_level": 1,
}
ONCE_OPTIONS: dict[str, Any] = {**QUICK_OPTIONS, "xla_backend_optimization_level": 0}
# Bytes that a program computes in its life, up to which each of the two pays: a gigabyte takes half
# a second more without LLVM, ten of them a second more by the quick options, and so long is what
# they save. Half as much compiles longer for less, double runs up to as many seconds longer.
ONCE_BYTES, QUICK_BYTES = 1e9, 4e10
WORKERS = 2
# A set of programs is those of a fit or of a walk. On CPU the two take 45 and 30 MB, whatever the
# dimension.
MOST_LOSSES = 4  # losses of which programs are kept
MOST_SETS = 16
# Sets that may be dropped before Python's garbage is collected for their memory, which takes 0.1 to
# 0.3 s. Half of it collects twice as often, double holds up to 180 MB more.
MOST_DROPPED = 4

Programs = TypeVar("Programs")


class CompileWatch:
    """What compilation costs within a `with` block.

    Attributes:
        seconds: What the thread of the block traces, compiles and waits for.
        programs: Programs that any thread compiles.
    """

    def __init__(self):
        self.seconds, self.programs = 0.0, 0
        self._thread, self._lock = threading.get_ident(), threading.Lock()

    def listen(self, event: str, duration_secs: float) -> None:
        """Add one event of jax's monitoring."""
        with self._lock:  # programs compile in several threads at once
            is_here = threading.get_ident() == self._thread
            self.seconds += duration_secs if is_here and event in COMPILE_EVENTS else 0.0
            self.programs += event == BACKEND_EVENT

    def __enter__(self) -> "CompileWatch":
        """Begin to listen."""
        _listen_to_jax()
        _WATCHES.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        """Listen no more."""
        _WATCHES.remove(self)


_WATCHES: list[CompileWatch] = []


@functools.cache
def _listen_to_jax() -> None:
    """Pass events on to those who watch: jax 0.7 takes listeners and gives none back."""

    def tell(event: str, duration_secs: float, **_: Any) -> None:
        for watch in tuple(_WATCHES):
            watch.listen(event, duration_secs)

    monitoring.register_event_duration_secs_listener(tell)


def use_compilation_cache(folder: Given[str | os.PathLike[str] | None] = None) -> Path:
    """Keep compiled programs in a folder, where the next process finds them.

    A first estimate of a model compiles for seconds, a later one of the same shapes for none. Call
    it before anything is computed; it sets jax's persistent compilation cache, for all programs of
    the process. The command line does so by itself, unless `JAX_ENABLE_COMPILATION_CACHE=0` is set.

    Programs are machine code that a later process runs: the folder must be yours alone. Those of
    each kind of processor have a folder of their own inside. Nothing is ever deleted; delete the
    folder as you like.

    Args:
        folder: Where; `JAX_COMPILATION_CACHE_DIR` when left out, else `fastvi` in `XDG_CACHE_HOME`,
            which is `~/.cache` if it is not set.

    Returns:
        The folder of this processor.

    Raises:
        OSError: If it cannot be made.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvi"
    chosen = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or home
    own = Path(chosen).expanduser().resolve() / _processor()
    own.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    own.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(own))
    # by itself jax keeps programs of a second or more, and an estimate is made of smaller ones
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return own


def _processor() -> str:
    """Name what machine code depends on: one home folder may serve many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    said = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    words = "\n".join([platform.machine(), platform.processor(), jax.__version__, *said])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def options_by_speed() -> tuple[dict[str, Any] | None, ...]:
    """Return compiler options from those that compile soonest to those that run fastest.

    All are None, XLA's own, on other devices than CPU and where this XLA does not know them.
    """
    is_known = jax.default_backend() == "cpu" and _knows_options()
    return (ONCE_OPTIONS, QUICK_OPTIONS, None) if is_known else (None, None, None)


def speed_for(computed: float) -> int:
    """Return which of `options_by_speed` suit a program that computes so many bytes in its life."""
    return (computed > ONCE_BYTES) + (computed > QUICK_BYTES)


def compiler_options(computed: float) -> dict[str, Any] | None:
    """Return compiler options for a program that computes so many bytes in its life."""
    return options_by_speed()[speed_for(computed)]


@functools.cache
def _knows_options() -> bool:
    try:
        jax.jit(jnp.negative).lower(jnp.float32(0)).compile(compiler_options=ONCE_OPTIONS)
    except (jax.errors.JaxRuntimeError, ValueError):  # "No such compile option"
        return False
    return True


class Borrowed:
    """A function or objective that programs reach while its owner holds it.

    Programs do not keep it alive.
    """

    def __init__(self, value: Any):
        self.lend(value)

    def lend(self, value: Any) -> None:
        """Use this one from now on."""
        self._owner = _weakly(value)

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self._owner()(*args)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of it."""
        return getattr(self._owner(), name)


class BorrowedObjective(Borrowed):
    """A borrowed objective.

    Its methods are attributes of its own, by which Python 3.12 knows a protocol.
    """

    def loss(self, *args: Any) -> Any:
        """Evaluate the loss of the objective."""
        with their_products():
            return self._owner().loss(*args)

    def grad(self, *args: Any) -> Any:
        """Differentiate the loss of the objective."""
        with their_products():
            return self._owner().grad(*args)


def _weakly(value: Any) -> Callable[[], Any]:
    """Return what gives the value for as long as somebody else holds it."""
    try:
        return weakref.ref(value)
    except TypeError:  # it has slots, or is a tuple
        return lambda: value


def _borrow(value: Any) -> Borrowed | None:
    if value is None:
        return None
    return BorrowedObjective(value) if hasattr(value, "loss") else Borrowed(value)


@dataclasses.dataclass
class _Kept:
    """Programs, what they borrow, and whether people still hold the function."""

    programs: Any
    borrowed: tuple[Borrowed | None, ...]
    is_held: Callable[[], Any]


class ProgramStore:
    """Owner of all compiled programs.

    It keeps the programs of the losses used last, and drops at once those of losses that nobody
    holds any more when another loss needs programs. What it drops gives its memory back after at
    most `MOST_DROPPED` sets.
    """

    def __init__(self, most_losses: int = MOST_LOSSES, most_sets: int = MOST_SETS):
        self._most_losses, self._most_sets = most_losses, most_sets
        # By loss and key, in the order of use.
        self._kept: dict[tuple[Hashable, Hashable], _Kept] = {}
        self._dropped = 0  # sets whose memory has not been looked for
        self._lock = threading.RLock()

    def find(
        self,
        loss: Hashable,
        key: Hashable,
        functions: tuple[Any, ...],
        build: Callable[..., Programs],
    ) -> Programs:
        """Return what `build` made of functions that compute the same, or build it.

        Programs that are divided over other devices are other programs.

        Args:
            loss: What the functions compute.
            key: What else the programs depend on.
            functions: The functions as they are now; the first is asked whether people still hold
                it. Programs borrow them, and call the latest ones where they are traced again.
            build: Makes the programs of the functions, borrowed.
        """
        key = (key, layout_in_use())
        with self._lock:
            kept = self._kept.pop((loss, key), None)
            if kept is None:
                self._make_room(loss)
                borrowed = tuple(map(_borrow, functions))
                kept = _Kept(build(*borrowed), borrowed, lambda: None)
            for borrowed, function in zip(kept.borrowed, functions, strict=True):
                if borrowed is not None:
                    borrowed.lend(function)
            kept.is_held = _holder(functions[0])
            self._kept[loss, key] = kept
            return kept.programs

    def clear(self) -> None:
        """Drop all programs."""
        with self._lock:
            self._kept.clear()
            self._collect()

    def _make_room(self, loss: Hashable) -> None:
        others = list(dict.fromkeys(other for other, _ in reversed(self._kept) if other != loss))
        # The loss that asks is one of the most that stay.
        recent = others[: self._most_losses - 1]
        wanted = {
            (other, key): one
            for (other, key), one in self._kept.items()
            if other == loss or (other in recent and one.is_held() is not None)
        }
        stay = dict(list(wanted.items())[-(self._most_sets - 1) :])
        self._dropped += len(self._kept) - len(stay)
        self._kept = stay
        if self._dropped >= MOST_DROPPED:
            self._collect()

    def _collect(self) -> None:
        """Give dropped programs back: functions of jax and their caches refer to each other."""
        self._dropped = 0
        gc.collect()


PROGRAMS = ProgramStore()


def _holder(function: Any) -> Callable[[], Any]:
    """Return a weak reference to the function, or the object of a method, that people hold."""
    if isinstance(function, types.MethodType):
        # Each access makes a bound method anew: a weak reference to one would be dead at once.
        return _holder(function.__self__)
    if isinstance(function, functools.partial):
        return _holder(function.func)
    if hasattr(function, "loss_fn"):
        return _holder(function.loss_fn)
    return _weakly(function)


def compile_ahead(lowered: Iterable[Any]) -> None:
    """Compile programs in the background, each while the next ones are lowered or compile.

    Lowering, which runs the user's Python, stays in the caller's thread; a later call of the jitted
    function finds the compiled program in jax's own cache.
    """
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="fastvi-compile")
    try:
        # A thread begins in jax's modes, and jax 0.7 finds programs by the modes they compile in.
        compiling = [pool.submit(in_own_modes(program.compile)) for program in lowered]
        began = time.perf_counter()
        for future in compiling:
            future.result()
        monitoring.record_event_duration_secs(WAIT_EVENT, time.perf_counter() - began)
    finally:
        # After an error, what has not begun is not wanted.
        pool.shutdown(wait=False, cancel_futures=True)
