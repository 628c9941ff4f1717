"""`compare`: differences of estimates with errors."""

from collections.abc import Mapping

from fastvi._errors import ConfigError
from fastvi._typing import Given
from fastvi.results.differences import LLCComparison
from fastvi.results.estimate import LLCEstimate


def compare(estimates: Given[Mapping[str, LLCEstimate]]) -> LLCComparison:
    """Compare estimates: checkpoints, parts of a model, models, data sets.

    Walkers of estimates with one key step on the same noise. Where two posteriors are alike in as
    many dimensions, their walkers move side by side, and the difference over the steps that both
    average is known much better than either llc: it is *paired*, and says so. Elsewhere the two
    errors are added as if independent.

    Args:
        estimates: By name, two or more; from `estimate_llc`, a curve, or `LLCEstimate.load`. For
            paired differences make them with the same key and settings.

    Returns:
        The difference of every pair, with a table and a figure.

    Raises:
        ConfigError: If there are fewer than two.

    Cost:
        Nothing is evaluated.
    """
    if not isinstance(estimates, Mapping) or len(estimates) < 2:
        raise ConfigError(
            "compare takes two or more estimates by name, such as {'before': one, 'after': other}; "
            f"got {type(estimates).__name__}"
            + (f" of {len(estimates)}." if isinstance(estimates, Mapping) else ".")
        )
    return LLCComparison(dict(estimates))
