"""Several processes that run one program (`jax.distributed`), each on devices of its own.

All of them run the same Python, and must decide alike. A fit is made by every process for itself;
what it found is then the first one's, so that processors that round differently go on alike. The
library never starts `jax.distributed`: a person does, or the command line.
"""

import pickle
from typing import Any

import jax
import numpy as np

from fastvi._devices import as_before, words_of

FAILED = -1  # in the place of a length: what a process says that cannot go on


def is_several() -> bool:
    """Say whether there are several processes, without starting jax where nobody has."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Say whether this process is the one that writes and tells."""
    return not is_several() or jax.process_index() == 0


def exchange(content: bytes | None) -> list[bytes | None]:
    """Return what every process has passed, in their order; None of one that cannot go on.

    All processes must call it. Two collectives, on host arrays.
    """
    # jax's functions for several processes are of no use to one
    from jax.experimental import multihost_utils

    length = FAILED if content is None else len(content)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(length)))
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: max(length, 0)] = np.frombuffer(content or b"", np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        None if length == FAILED else row[:length].tobytes()
        for length, row in zip(lengths, rows, strict=True)
    ]


def agree(tree: Any) -> Any:
    """Return the first process's values of a pytree of arrays and numbers."""
    if not is_several():
        return tree
    leaves, structure = jax.tree_util.tree_flatten(tree)
    plain = [words_of(leaf) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
    first = exchange(pickle.dumps(plain))[0]
    assert first is not None
    return structure.unflatten(
        as_before(leaf, value) if isinstance(leaf, jax.Array) else value
        for leaf, value in zip(leaves, pickle.loads(first), strict=True)
    )
