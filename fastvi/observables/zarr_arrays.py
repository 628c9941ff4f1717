"""Arrays of draws on disk, as zarr keeps them: in chunks, and read a slice at a time."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from fastvi._optional import import_optional

# Numbers of a file: 256 KiB in float32. Half makes twice as many files; with double, a covariance
# of some examples reads more of others.
CHUNK_NUMBERS = 2**16

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array on disk, of which is read what is asked for.

    It has the first so many draws of what the file has. Integers, slices and an ellipsis select
    from it as from an array of numpy's; `numpy.asarray` reads all of it.
    """

    source: Any
    draws: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Walkers, draws, and the shape of a draw."""
        walkers, _, *rest = self.source.shape
        return walkers, self.draws, *rest

    @property
    def ndim(self) -> int:
        """Count the axes."""
        return len(self.source.shape)

    @property
    def size(self) -> int:
        """Count the numbers."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Return the type of the numbers."""
        return np.dtype(self.source.dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Read a part."""
        key = key if isinstance(key, tuple) else (key,)
        place = next((i for i, part in enumerate(key) if part is Ellipsis), len(key))
        fill = (slice(None),) * (self.ndim - len(key) + (place < len(key)))
        walker, draw, *rest = (*key[:place], *fill, *key[place + 1 :])
        # the file may have more draws than are shown
        chosen = range(self.draws)[draw]
        if isinstance(chosen, range):
            chosen = slice(chosen.start, chosen.stop, chosen.step)
        return np.asarray(self.source[(walker, chosen, *rest)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read all."""
        return np.asarray(self[...], dtype)


class ZarrArrays:
    """The zarr arrays of a folder, in float32."""

    def __init__(self, folder: Path, mode: str):
        zarr = import_optional("zarr", extra="store", distribution="zarr", purpose="store")
        self.group = zarr.open_group(str(folder), mode=mode)

    def create(self, walkers: int, draws: int, block: int, shapes: Shapes) -> None:
        """Make arrays without values, in place of those that are there."""
        for name, shape in shapes.items():
            inner = math.prod(shape[1:])
            rows = max(1, CHUNK_NUMBERS // (walkers * block * max(1, inner)))
            self.group.create_array(
                key_of(name),
                shape=(walkers, draws, *shape),
                chunks=(walkers, block, *(min(rows, size) for size in shape[:1]), *shape[1:]),
                dtype="float32",
                fill_value=float("nan"),
                # the digits of losses are noise: to compress them takes time and saves a tenth
                compressors=None,
                dimension_names=("walker", "draw", *(f"{name}_{i}" for i in range(len(shape)))),
                overwrite=True,
            )

    def put_whole(self, name: str, values: np.ndarray) -> None:
        """Write an array that all draws share."""
        self.group.create_array(
            key_of(name), data=np.asarray(values, np.float32), compressors=None, overwrite=True
        )

    def whole(self, name: str) -> np.ndarray:
        """Read an array that all draws share."""
        return np.asarray(self[name][...])

    def __contains__(self, name: str) -> bool:
        """Say whether there is such an array."""
        return key_of(name) in self.group

    def __getitem__(self, name: str) -> Any:
        """Return an array of the folder."""
        return self.group[key_of(name)]

    def grow(self, names: list[str], draws: int) -> None:
        """Make room for more draws."""
        for name in names:
            array = self[name]
            if array.shape[1] < draws:
                array.resize((array.shape[0], draws, *array.shape[2:]))


def key_of(name: str) -> str:
    """Return the name of an array in its folder, whatever a person has called it."""
    return quote(name, safe="").replace(".", "%2E")
