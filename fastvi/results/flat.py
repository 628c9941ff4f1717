"""What the flat contract of a sampler returns."""

from typing import Any, NamedTuple

from fastvi._typing import Array


class SamplerRunResult(NamedTuple):
    """What `run_vi` returns: traces of shape (chains, steps), seconds, counts."""

    traces: dict[str, Array]
    timings: dict[str, float]
    work: dict[str, Any]
