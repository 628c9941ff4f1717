"""What estimates of a curve or of parts are of, so that kept ones are known again."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from fastvi._typing import Given, PyTree
from fastvi.api.arguments import DEFAULT_BATCH_SIZE, check_dtype, make_problem
from fastvi.config import VIConfig
from fastvi.observables.split import Split
from fastvi.results.estimate import LLCEstimate
from fastvi.results.series import Series, held_series
from fastvi.target.containers import open_data
from fastvi.target.data import AbstractData, hold
from fastvi.target.identity import digest_tree, observe_loss
from fastvi.target.inputs import check_data, is_stream
from fastvi.target.keys import as_key
from fastvi.target.look import weigh
from fastvi.target.losses import take_examples
from fastvi.target.ravel import ravel_loss
from fastvi.target.stream import open_stream


def observed_data(data: Any, config: VIConfig) -> AbstractData:
    """Return what of the data is looked at: all in memory, or the first window of a stream.

    Raises:
        DataError: If they cannot be used.
    """
    if isinstance(data, AbstractData):
        return data
    dtype = check_dtype(config)
    opened = open_data(data, dtype)
    if is_stream(opened):
        return open_stream(opened, dtype, as_key(0), DEFAULT_BATCH_SIZE).window(0)
    return hold(check_data(opened, dtype=dtype)[0])


def identify_data(data: AbstractData) -> dict[str, Any]:
    """Say which data these are."""
    return {"data": digest_tree(data.examples), "n_data": data.num_data}


def observe_loss_of(
    loss_fn: Callable[..., Any], params: PyTree, data: AbstractData, config: VIConfig
) -> dict[str, Any]:
    """Say in a few numbers what parameters these are, and what a loss computes at and near them.

    Raises:
        DataError: If loss, parameters or data cannot be used.
    """
    objective, center = ravel_loss(loss_fn, params, check_dtype(config))
    # nbeta and localization are those of the run, not of what its target computes.
    target = make_problem(center, data, 1.0, 1.0, config, "nbeta")
    weighed = weigh(objective, target, "loss_fn").data.examples
    first = take_examples(weighed, slice(DEFAULT_BATCH_SIZE))
    return {"params": digest_tree(center), **observe_loss(objective, center, first)}


class Members:
    """Finished estimates of a series, in a folder or none, known again by what they are of.

    Attributes:
        series: The folder.
    """

    def __init__(self, series: Series, data: Any, config: VIConfig, settings: Mapping[str, Any]):
        self.series, self._config = series, config
        self._identity: dict[str, Any] = {}
        if series.folder is not None:
            self._data = observed_data(data, config)
            self._identity = {**config.to_dict(), **settings, **identify_data(self._data)}

    def find(
        self, name: str, loss_fn: Callable[..., Any], params: PyTree
    ) -> tuple[LLCEstimate, Split | None] | None:
        """Return an estimate that was finished, and its split; None where there is none.

        Raises:
            ConfigError: If the folder has one of something else.
            DataError: If a file is damaged, or the loss cannot be used.
        """
        if self.series.folder is None:
            return None
        self._identity |= observe_loss_of(loss_fn, params, self._data, self._config)
        return self.series.find(name, self._identity)

    def keep(self, name: str, estimate: LLCEstimate, split: Split | None = None) -> None:
        """Write an estimate of what was last looked for."""
        self.series.keep(name, self._identity, estimate, split)


@contextlib.contextmanager
def kept_members(
    folder: Given[str | os.PathLike[str] | None],
    data: Any,
    config: VIConfig,
    *,
    key: Any,
    **settings: Any,
) -> Iterator[Members]:
    """Hold a folder of estimates while the block runs.

    Args:
        folder: The folder; nothing is kept without one.
        data: What all estimates are on.
        config: Their configuration.
        key: Their key.
        **settings: What else they depend on, beside loss and parameters.

    Raises:
        ConfigError: If the folder cannot be made or written, or another process holds it.
    """
    with held_series(folder) as series:
        digest = digest_tree(jax.random.key_data(as_key(key)))
        yield Members(series, data, config, {"key": digest, **settings})
