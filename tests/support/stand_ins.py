"""A start that was not searched for, and an estimate that nothing was fitted for."""

import jax.numpy as jnp
import numpy as np

from fastvi import LLCEstimate, VIConfig
from fastvi.evaluation.errors import ErrorParts
from fastvi.geometry.start import Start
from fastvi.results.parts import ChainValues, Curvature, DrawValues, Timings
from fastvi.results.work import RunWork


def begun(scale, core, rank):
    """Return a start of that scale and precision core, of which `rank` rows are used."""
    none, one, count = jnp.zeros((), scale.dtype), jnp.ones((), scale.dtype), jnp.asarray(rank)
    return Start(
        scale=scale,
        core=core,
        spectrum=jnp.zeros(core.shape[0], scale.dtype),
        rest=one,
        rank=count,
        wanted_rank=count,
        trace=none,
        explained=none,
        num_values=jnp.zeros_like(count),
        num_hvp=jnp.zeros_like(count),
        lowest=one,
        lowest_direction=jnp.zeros_like(scale),
    )


def finished(dim, config=None, **fields):
    """Return an estimate with llc 1 and empty arrays, but for the fields that are given."""
    numbers = dict.fromkeys(
        ("llc", "llc_sem", "elbo", "init_loss", "nbeta", "localization", "llc_vi", "llc_vi_sem"),
        1.0,
    )
    arrays = dict.fromkeys(("llc_per_chain", "llc_sem_per_chain", "log_weights"), np.zeros(0))
    rest = {
        "error_parts": ErrorParts(1.0),
        "curvature": Curvature(0, 0, 0.0, 0.0, [], 0.0, 0.0, "none"),
        "evaluation": ChainValues([], [], [], [], [], []),
        "work": RunWork(0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        "timings": Timings(0.0, 0.0, 0.0, 0.0, 0.0),
        "traces": {},
        "draws": DrawValues(*(np.zeros(0),) * 3),
        "n_data": 1,
        "dim": dim,
        "converged": None,
        "health": (),
        "config": config or VIConfig(),
    }
    return LLCEstimate(**{**numbers, **arrays, **rest, **fields})
