# pyright: strict
"""Each public name as people use it: pyright, strict here, knows the type of every result."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import assert_type

import jax
import numpy as np

import fastvi


def estimates(
    loss_fn: Callable[[dict[str, jax.Array], tuple[jax.Array, jax.Array]], jax.Array],
    params: dict[str, jax.Array],
    data: tuple[jax.Array, jax.Array],
    folder: Path,
) -> None:
    """Use what `estimate_llc` and its like return."""
    result = fastvi.estimate_llc(loss_fn, params, data, localization=1.0, error=0.05, steps=100)
    assert_type(result, fastvi.LLCEstimate)
    assert_type(result.llc, float)
    assert_type(result.summary(), str)
    assert_type([finding.name for finding in result.health], list[str])
    assert_type(result.more(0.01, time_limit=60.0), fastvi.LLCEstimate)
    assert_type(fastvi.correct(result, "sample"), fastvi.LLCEstimate)
    assert_type(result.work.total_fge, float)
    assert_type(result.timings.total, float)
    assert_type(fastvi.LLCEstimate.load(result.save(folder)), fastvi.LLCEstimate)
    assert_type(fastvi.write_report(result, folder / "report.html"), Path)
    curve = fastvi.llc_curve(loss_fn, [params, params], data)
    assert_type(curve.llc, np.ndarray)
    assert_type(curve.estimates, tuple[fastvi.LLCEstimate, ...])
    parts = fastvi.estimate_parts(loss_fn, params, data, parts={"first": ["w"]})
    assert_type(parts["first"].llc, float)
    draws = fastvi.sample_posterior(result, 100)
    assert_type(draws, fastvi.PosteriorDraws)
    assert_type(draws.num_walkers, int)
    assert_type(fastvi.profile(result).summary(), str)
    assert_type(fastvi.compare({"a": result, "b": result}), fastvi.LLCComparison)
    assert_type(
        fastvi.forecast_sgld(result, lr=1e-4, batch_size=32, num_steps=100), fastvi.SGLDForecast
    )
    assert_type(fastvi.VIConfig.create({"M": 4}, steps=10), fastvi.VIConfig)
    assert_type(fastvi.use_compilation_cache(folder), Path)
    assert_type(fastvi.split_llc(result).drift.value, np.ndarray)


def names(results: Mapping[str, fastvi.LLCEstimate], errors: Iterable[Exception]) -> None:
    """Use errors and mappings of results."""
    for name, result in results.items():
        assert_type((name, result.llc_text), tuple[str, str])
    known = (fastvi.ConfigError, fastvi.DataError, fastvi.NonFiniteError, fastvi.UnavailableError)
    assert_type([isinstance(error, known) for error in errors], list[bool])
