"""Loaders of torch: what they give, and which of them leave examples out."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fastvi._errors import DataError
from fastvi.target.examples import by_iteration
from fastvi.target.tables import is_a


def by_loader(loader: Any) -> Iterable[Any]:
    """Read a `torch.utils.data.DataLoader`."""
    sampler = getattr(loader, "batch_sampler", None)
    if loader.drop_last or getattr(sampler, "drop_last", False):
        _refuse_dropping(sampler)
    _refuse_shares(getattr(sampler, "sampler", loader.sampler))
    return by_iteration(loader) if _gives_examples(loader) else loader


def _refuse_dropping(sampler: Any) -> None:
    """Refuse a loader that leaves examples out, others in each pass where it shuffles."""
    try:
        rest = len(sampler.sampler) % sampler.batch_size
    except (TypeError, AttributeError):  # neither size nor sampler are known
        rest = None
    if rest != 0:
        left_out = "the last examples" if rest is None else f"{rest} examples"
        raise DataError(
            f"a DataLoader with drop_last=True leaves {left_out} of each pass out, so that there "
            "is no one loss on all data. Pass a DataLoader with drop_last=False, or its dataset."
        )


def _refuse_shares(sampler: Any) -> None:
    """Refuse a loader of one process among several, which repeats examples to fill its share."""
    if is_a(sampler, "torch", "DistributedSampler") and sampler.num_replicas > 1:
        raise DataError(
            f"a DataLoader with a DistributedSampler gives the share of one process of "
            f"{sampler.num_replicas}, not all data. Pass its dataset, or a DataLoader without "
            "this sampler."
        )


def _gives_examples(loader: Any) -> bool:
    """Say whether a loader without a batch size gives the examples of a data set one by one.

    A sampler of lists asks the data set for batches, and an iterable one may give them.
    """
    if loader.batch_sampler is not None or is_a(loader.dataset, "torch", "IterableDataset"):
        return False
    return np.ndim(next(iter(loader.sampler), 0)) == 0
