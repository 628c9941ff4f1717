"""Readers of checkpoint files: arrays by name, as the file has them."""

import json
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._optional import import_optional
from fastvi.integrations.names import few

INDEX = ".index.json"
# What a folder of Hugging Face's libraries holds, in the order in which they look for it.
FOLDER_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
ORBAX_TREE = "_METADATA"  # a file that orbax writes into the folder of each pytree
# In the name of a folder that orbax has not finished, as after a kill.
UNFINISHED = ".orbax-checkpoint-tmp"


def read_checkpoint(path: Path) -> Any:
    """Read a file, or the folder of one checkpoint, as nested dicts and lists of arrays.

    Raises:
        DataError: If it is missing, of no kind that is known, damaged, or needs code to be read.
        MissingExtraError: If the package of the format is not installed.
    """
    if not path.exists():
        raise DataError(f"there is no checkpoint {path}.")
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(INDEX):
        return _read_shards(path)
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(
            f"{path} has the suffix {path.suffix!r}; known are {', '.join(READERS)}, *{INDEX} and "
            "folders of orbax."
        )
    return reader(path)


def is_checkpoint(path: Path) -> bool:
    """Say whether a path looks like one checkpoint, by its name and, of a folder, its files."""
    if path.is_dir():
        has_files = file_of(path) is not None or bool(_orbax_trees(path))
        return has_files and UNFINISHED not in path.name
    return path.suffix in READERS or path.name.endswith(INDEX)


def file_of(folder: Path) -> Path | None:
    """Return the file that Hugging Face's libraries would read of a folder."""
    return next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)


def _read_folder(folder: Path) -> Any:
    file = file_of(folder)
    if file is not None:
        return read_checkpoint(file)
    trees = _orbax_trees(folder)
    if len(trees) == 1:
        return _read_orbax(trees[0])
    if trees:
        raise DataError(
            f"{folder} holds the items {', '.join(tree.name for tree in trees)}. Pass one of them, "
            f"such as {trees[0]}."
        )
    raise DataError(
        f"{folder} is not a checkpoint: it holds neither {', '.join(FOLDER_FILES)} nor a pytree "
        "that orbax has finished. Of a folder of checkpoints pass one, or use open_checkpoints."
    )


def _orbax_trees(folder: Path) -> list[Path]:
    """Return the folder, or the items in the folder of a step, that orbax can read as pytrees."""
    items = [folder, *sorted(one for one in folder.iterdir() if one.is_dir())]
    trees = [item for item in items if (item / ORBAX_TREE).is_file()]
    return trees[:1] if trees[:1] == [folder] else trees


def _damaged(path: Path, error: BaseException) -> DataError:
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path} is damaged, or not what its name says: {words}. Save it again.")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is damaged, or no .npz file. Save it again with numpy.savez.")
    try:
        # opened here, for np.load leaves a file open that it cannot read
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except ValueError as error:
        raise _needs_code(path, "numpy.savez of arrays of numbers") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise _damaged(path, error) from error
    for name, array in arrays.items():
        if array.dtype.kind == "V":
            raise DataError(
                f"{path} holds {name} without its dtype, as numpy writes bfloat16. Save it as "
                ".safetensors, or as float32."
            )
    return arrays


def _needs_code(path: Path, save: str) -> DataError:
    return DataError(
        f"{path} holds Python objects, which may run any code when they are read, and are not "
        f"read. Save it again with {save}."
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    options = {
        "extra": "checkpoints",
        "distribution": "safetensors",
        "purpose": "reading .safetensors",
    }
    safetensors = import_optional("safetensors", **options)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = file.metadata() or {}
        arrays = import_optional("safetensors.numpy", **options).load_file(path)
    except safetensors.SafetensorError as error:
        raise _damaged(path, error) from error
    # the words of safetensors for a dtype that numpy has not, such as float8
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds numbers that cannot be read as NumPy arrays: {error}. Save it in "
            "float32, float16 or bfloat16."
        ) from error
    # safetensors.torch.save_model writes a tied weight once, and its other names here.
    tied = {name: kept for name, kept in names.items() if kept in arrays and name not in arrays}
    return arrays | {name: arrays[kept] for name, kept in tied.items()}


def _read_torch(path: Path) -> Any:
    torch = import_optional("torch", extra="torch", distribution="torch", purpose=f"reading {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _needs_code(path, "torch.save(module.state_dict(), path)") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error
    try:
        return _from_torch(torch, found)
    except TypeError as error:  # of tensors that are sparse, quantised or in eight bits
        raise DataError(
            f"{path} holds a tensor that cannot be a NumPy array: {error}. Save it dense, in "
            "float32, float16 or bfloat16."
        ) from error


def _from_torch(torch: Any, node: Any) -> Any:
    """Return a copy with arrays in place of tensors."""
    if isinstance(node, Mapping):
        return {str(name): _from_torch(torch, value) for name, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_from_torch(torch, value) for value in node]
    if not isinstance(node, torch.Tensor):
        return node
    tensor = node.detach()
    if tensor.dtype == torch.bfloat16:  # which torch's numpy() refuses
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _read_shards(path: Path) -> dict[str, Any]:
    """Read the files that an index names, each once."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(named.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path} is no index: it must hold {{"weight_map": {{name: file}}}}.'
        ) from (error)
    found: dict[str, Any] = {}
    for file in files:
        # a name with a folder could be any file of this machine
        if not isinstance(file, str) or Path(file).name != file or file.endswith(INDEX):
            raise DataError(f"{path} names {file!r}, which is no file beside it.")
        found |= read_checkpoint(path.with_name(file))
    absent = sorted(set(named) - set(found))
    if absent:
        raise DataError(f"{path} names {few(absent)}, which its files do not hold.")
    return {name: found[name] for name in named}


def _read_orbax(path: Path) -> Any:
    orbax = import_optional(
        "orbax.checkpoint",
        extra="checkpoints",
        distribution="orbax-checkpoint",
        purpose=f"reading {path}",
    )
    try:
        with orbax.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(path.absolute()).item_metadata.tree
            # On the host: the devices that it was saved from may not be here.
            wanted = jax.tree_util.tree_map(
                lambda _: orbax.RestoreArgs(restore_type=np.ndarray), saved
            )
            arguments = orbax.args.PyTreeRestore(restore_args=wanted)
            return checkpointer.restore(path.absolute(), args=arguments)
    except (ValueError, KeyError, OSError, RuntimeError, AttributeError) as error:
        raise _damaged(path, error) from error


READERS: Mapping[str, Callable[[Path], Any]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
    ".ckpt": _read_torch,
}
