"""Compilation: what it costs, by jax's public monitoring events; quick options; and work on it ahead of need."""

import functools
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import monitoring

COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
QUICK_OPTIONS: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False}
WORKERS = 2


class CompileClock:
    """Running totals since import of fastvi: programs compiled, and seconds that callers waited for them."""

    def __init__(self):
        self.seconds = 0.0
        self.programs = 0
        self._ahead = threading.local()

    def listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        """Add one event; the seconds of one that runs ahead are counted when somebody waits for it."""
        del kwargs
        if event in COMPILE_EVENTS:
            self.seconds += 0.0 if getattr(self._ahead, "here", False) else duration_secs
            self.programs += event == COMPILE_EVENTS[-1]

    def run_ahead(self, call: Any) -> Any:
        """Call in a thread of the pool."""
        self._ahead.here = True
        return call()

    def wait(self, future: Future) -> None:
        """Wait for a call that runs ahead."""
        began = time.perf_counter()
        future.result()
        self.seconds += time.perf_counter() - began


CLOCK = CompileClock()
monitoring.register_event_duration_secs_listener(CLOCK.listen)


@functools.cache
def quick_compilation() -> dict[str, Any] | None:
    """Return compiler options for programs that run once or twice, None where this XLA does not know them.

    Measured on CPU, jax 0.10: XLA's older emitters compile in 0.6 of the time and run at 0.8 of the speed.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(jnp.negative).lower(jnp.float32(0)).compile(compiler_options=QUICK_OPTIONS)
    except (jax.errors.JaxRuntimeError, ValueError):  # "No such compile option"
        return None
    return QUICK_OPTIONS


class Identity:
    """Compare by identity, for values that cannot be hashed."""

    def __init__(self, value: Any):
        self.value = value


def cache_key(value: Any) -> Any:
    """Return the value, or where it cannot be hashed a stand-in for it."""
    try:
        hash(value)
    except TypeError:
        return Identity(value)
    return value


def from_cache_key(key: Any) -> Any:
    """Return what `cache_key` was given."""
    return key.value if isinstance(key, Identity) else key


class Ahead:
    """Compile programs in the background while earlier ones compile or run.

    Lowering, which runs the user's Python, stays in the caller's thread; a later call of the jitted function finds
    the compiled program in jax's own cache.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="fastvi-compile")
        self._futures: dict[str, Future] = {}

    def compile(self, name: str, lowered: Any) -> None:
        """Start on one program."""
        self._futures[name] = self._pool.submit(CLOCK.run_ahead, lowered.compile)

    def wait(self, names: Iterable[str]) -> None:
        """Wait until these are compiled."""
        for name in names:
            CLOCK.wait(self._futures[name])

    def close(self) -> None:
        """Let the threads go once they are idle."""
        self._pool.shutdown(wait=False)
