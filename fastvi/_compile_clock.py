"""Seconds that jax spends compiling, from its public monitoring events."""

from typing import Any

from jax import monitoring

COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class CompileClock:
    """Running totals since import of fastvi."""

    def __init__(self):
        self.seconds = 0.0
        self.programs = 0

    def listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        """Add one event."""
        del kwargs
        if event in COMPILE_EVENTS:
            self.seconds += duration_secs
            self.programs += event == COMPILE_EVENTS[-1]


CLOCK = CompileClock()
monitoring.register_event_duration_secs_listener(CLOCK.listen)
