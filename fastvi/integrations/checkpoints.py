"""Checkpoints as parameters: safetensors, npz, orbax and torch's state dicts, one or a folder."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fastvi._errors import ConfigError, DataError
from fastvi._typing import PyTree
from fastvi.integrations.checkpoint_files import is_checkpoint, read_checkpoint
from fastvi.integrations.checkpoint_names import fit_to, nest, part_of
from fastvi.integrations.checkpoint_steps import order_by_step

# Files of numpy are written with "/" between keys; torch's names are left as torch knows them.
SEPARATORS = {".npz": "/"}
# One of several files of a checkpoint, which its index names.
SHARD = re.compile(r"-\d+-of-\d+\.")


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    part: str | None = None,
    separator: str | None = None,
    like: PyTree = None,
    ignore: Sequence[str] = (),
) -> PyTree:
    """Read parameters that another program has saved; no code of the file is run.

    Args:
        path: A file `.npz`, `.safetensors`, `.safetensors.index.json` with its shards, or of
            torch's state dict, `.pt`, `.pth`, `.bin` or `.ckpt`; or a folder of orbax (a pytree, or
            a step of a `CheckpointManager`) or of Hugging Face's `save_pretrained`.
        part: Keys that lead to the parameters within what was saved, such as "params" or
            "state/params"; all of it when left out.
        separator: What stands between the keys in names of a file of flat names, which become
            nested dicts. When left out it is "/" for `.npz`, and others stay flat, as torch has
            them.
        like: Parameters of the same model. The arrays are put into their structure by name, whether
            levels are attributes, keys or numbers, or joined by "." or "/". A second name of one
            of them, as torch's state dicts have for tied weights, is left out where it has the
            same bits.
        ignore: Patterns of other names that the file may hold beside those of `like`, such as
            "*running_mean". What has such a name is left out, so that the loss keeps its own.

    Returns:
        The parameters, NumPy arrays in the dtypes of the file; nested dicts, or the structure of
        `like`.

    Raises:
        ConfigError: If `separator` is given for names that are nested already, or `ignore` without
            `like`.
        DataError: If the file is missing, damaged, of no known kind, needs code to be read, or does
            not fit `like`: the error lists the names.
        MissingExtraError: If the package of its format is not installed.

    Cost:
        Memory of what was saved, once.
    """
    _check_ignore(ignore, like)
    path = Path(path)
    tree = read_checkpoint(path)
    between = SEPARATORS.get(path.suffix) if separator is None else separator
    # Flat names say which part they are of; a dict that holds such names is a part itself.
    nests = between is not None and _is_flat(tree)
    if between is not None and nests:
        tree = nest(tree, between)
    if part is not None:
        tree = part_of(tree, part, str(path))
    if between is not None and not nests:
        tree = _nested(tree, between, path)
    return tree if like is None else fit_to(like, tree, str(path), ignore)


def _check_ignore(ignore: Sequence[str], like: PyTree) -> None:
    if isinstance(ignore, str):
        raise ConfigError(f'ignore is a list of patterns; got {ignore!r}. Pass ["{ignore}"].')
    if ignore and like is None:
        raise ConfigError("ignore is for names beside those of like. Pass like too.")


def _is_flat(tree: PyTree) -> bool:
    return isinstance(tree, Mapping) and not any(
        isinstance(leaf, (Mapping, list)) for leaf in tree.values()
    )


def _nested(tree: PyTree, separator: str, path: Path) -> PyTree:
    if not _is_flat(tree):
        raise ConfigError(
            f"separator={separator!r} is for flat names, and {path} is nested. Leave it out, or "
            "name the part that has flat names."
        )
    return nest(tree, separator)


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoints:
    """Checkpoints of one run in the order of their steps, each read when it is asked for.

    What `llc_curve` takes; `steps` is what `LLCCurve.plot` takes.

    Attributes:
        paths: The files or folders.
        steps: The steps that their names tell.
        part: As for `load_checkpoint`.
        separator: As for `load_checkpoint`.
        like: As for `load_checkpoint`.
        ignore: As for `load_checkpoint`.
    """

    paths: tuple[Path, ...]
    steps: tuple[int, ...]
    part: str | None = None
    separator: str | None = None
    like: PyTree = None
    ignore: Sequence[str] = ()

    def __len__(self) -> int:
        """Count them."""
        return len(self.paths)

    def __getitem__(self, number: int) -> PyTree:
        """Read one."""
        return load_checkpoint(
            self.paths[number],
            part=self.part,
            separator=self.separator,
            like=self.like,
            ignore=self.ignore,
        )

    def __iter__(self) -> Iterator[PyTree]:
        """Read one after the other."""
        return (self[number] for number in range(len(self)))


def open_checkpoints(
    folder: str | os.PathLike[str],
    *,
    pattern: str = "*",
    part: str | None = None,
    separator: str | None = None,
    like: PyTree = None,
    ignore: Sequence[str] = (),
) -> Checkpoints:
    """List the checkpoints of a run, in the order of their steps; none is read yet.

    Args:
        folder: Where they are: files of the kinds that `load_checkpoint` reads, folders of steps of
            orbax, or folders such as `checkpoint-500`.
        pattern: Which of its entries, such as "step_*.npz".
        part: As for `load_checkpoint`.
        separator: As for `load_checkpoint`.
        like: As for `load_checkpoint`.
        ignore: As for `load_checkpoint`.

    Returns:
        The checkpoints. The step is the number after "step" in a name; else after "epoch", "iter",
        "ckpt" or "checkpoint", in this order; else the only number. Numbers with a fraction, such
        as a loss, and versions, such as v2, are no steps.

    Raises:
        ConfigError: If `ignore` is given without `like`.
        DataError: If there are none, a name tells no step or several, names count by different
            words, or two tell the same step.
    """
    _check_ignore(ignore, like)
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}.")
    found = [path for path in folder.glob(pattern) if is_checkpoint(path)]
    found = [path for path in found if not SHARD.search(path.name)]
    if not found:
        raise DataError(f"{folder} holds no checkpoint with a name like {pattern!r}.")
    by_step = order_by_step(found)
    return Checkpoints(
        tuple(by_step.values()), tuple(by_step), part, separator, like, tuple(ignore)
    )
