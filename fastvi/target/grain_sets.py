"""Data sets and loaders of grain: what they give, and which are refused."""

from typing import Any

from fastvi._errors import DataError
from fastvi.target.examples import by_iteration
from fastvi.target.leaves import kind_of
from fastvi.target.tables import is_a

# A data set that repeats for ever has the length sys.maxsize = 2^63, over the batch size after
# `batch`. Half of it takes batches of 65,536 for such a one, double only those of 16,384.
ENDLESS = 2**48


def by_dataset(data: Any) -> Any:
    """Read a `grain.MapDataset` or a `grain.IterDataset`."""
    if _is_endless(data):
        raise DataError(
            f"data is a {kind_of(data)} that repeats without an end. Leave repeat() out, or pass "
            "iter(data) and nbeta."
        )
    batched = _batch_step(data)
    if batched is None:
        return by_iteration(data)
    # grain has no public name for the option
    if getattr(batched, "_drop_remainder", False):
        _refuse_dropping(_left_out(batched), ".batch(size)")
    return data


def by_loader(loader: Any) -> Any:
    """Read a `grain.DataLoader`, whose sampler and operations have no public names."""
    sampler: Any = getattr(loader, "_sampler", None)
    if hasattr(sampler, "__len__") and len(sampler) >= ENDLESS:
        raise DataError(
            f"data is a DataLoader of grain whose {type(sampler).__name__} repeats without an end. "
            "Pass num_epochs=1 to the sampler, or pass iter(data) and nbeta."
        )
    for step in getattr(loader, "_operations", ()):
        if getattr(step, "drop_remainder", False):
            _refuse_dropping(None, "Batch(size)")
    return loader


def _is_endless(data: Any) -> bool:
    """Say whether a data set, or all that it is made from, repeat for ever."""
    if hasattr(data, "__len__"):
        return len(data) >= ENDLESS
    if is_a(data, "grain", "RepeatIterDataset"):
        return getattr(data, "_num_epochs", None) is None or _is_endless(data.parents[0])
    if is_a(data, "grain", "LimitIterDataset"):
        return False
    # a mixture ends with the first of its parts that does
    parents = getattr(data, "parents", ())
    return bool(parents) and all(map(_is_endless, parents))


def _batch_step(data: Any) -> Any:
    """Return the step that made batches, of those that a data set is made by, or None."""
    # each step that is no batch has one parent; a mixture or a concatenation has parents alike
    while not any(is_a(data, "grain", name) for name in ("BatchMapDataset", "BatchIterDataset")):
        parents = getattr(data, "parents", ())
        if not parents:
            return None
        data = parents[0]
    return data


def _left_out(batched: Any) -> int | None:
    """Return how many examples a step leaves out that drops the remainder, where that is known."""
    size, parent = getattr(batched, "_batch_size", None), batched.parents[0]
    return len(parent) % size if size and hasattr(parent, "__len__") else None


def _refuse_dropping(left_out: int | None, fix: str) -> None:
    if left_out != 0:
        which = "the last examples" if left_out is None else f"{left_out} examples"
        raise DataError(
            f"batches of grain with drop_remainder=True leave {which} of each pass out, so that "
            f"there is no one loss on all data. Make them with {fix}, without drop_remainder."
        )
