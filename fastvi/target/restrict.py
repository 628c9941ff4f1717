"""Estimates of a part of the weights: the others stay where they are."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._modes import in_own_modes
from fastvi._typing import Batch, Given, PyTree
from fastvi.target.inputs import is_array
from fastvi.target.ravel import refuse_python_float


class Frozen:
    """An array that compares by content, so that equal restrictions share compiled programs."""

    def __init__(self, array: Any):
        self.array = np.asarray(array)
        self._content = (self.array.shape, str(self.array.dtype), self.array.tobytes())

    def __hash__(self) -> int:
        return hash(self._content)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Frozen) and self._content == other._content


@dataclasses.dataclass(frozen=True)
class RestrictedLoss:
    """`loss_fn` on the whole parameters, as a function of the entries that vary.

    `whole` holds every leaf; `varying` says of each: True, False, or which of its entries vary.
    """

    loss_fn: Callable[..., Any]
    treedef: Any
    whole: tuple[Any, ...]
    varying: tuple[bool | Frozen, ...]

    def __call__(self, params: PyTree, batch: Batch) -> Any:
        """Evaluate the loss with the other entries at their places."""
        return self.loss_fn(self.put(params), batch)

    def put(self, varying: PyTree, axes: tuple[int, ...] | None = None) -> PyTree:
        """Return all parameters, with these values of those that vary.

        Args:
            varying: What `restrict` returned, or values in its place.
            axes: Leading axes of `varying`, along which the arrays that do not vary are repeated;
                None for the values of a loss, whose other arrays stay as they are.
        """
        leaves, free, lead = [], iter(jax.tree_util.tree_leaves(varying)), axes or ()
        for leaf, which in zip(self.whole, self.varying, strict=True):
            kept = jnp.asarray(leaf.array) if isinstance(leaf, Frozen) else leaf
            if which is True:
                leaves.append(next(free))
            elif which is False:
                is_repeated = axes is not None and is_array(kept)
                leaves.append(jnp.broadcast_to(kept, (*lead, *kept.shape)) if is_repeated else kept)
            else:
                # One array has one dtype, that of the values: a fit may compute in more digits.
                values = next(free)
                flat = jnp.broadcast_to(kept.astype(values.dtype).ravel(), (*lead, kept.size))
                flat = flat.at[..., np.flatnonzero(which.array)].set(values)
                leaves.append(flat.reshape(*lead, *kept.shape))
        return self.treedef.unflatten(leaves)

    def take(self, params: PyTree) -> tuple[jax.Array, ...]:
        """Return the parameters that vary out of all of them.

        The reverse of `put`, with any leading axes.

        Raises:
            DataError: If the structure is another one.
        """
        leaves, treedef = jax.tree_util.tree_flatten(params)
        if treedef != self.treedef:
            raise DataError(
                f"w must have the structure of the parameters, {self.treedef}; got {treedef}."
            )
        return _free_entries(leaves, self.varying)


@in_own_modes
def restrict(
    loss_fn: Given[Callable[[PyTree, Batch], Any]],
    params: PyTree,
    param_mask: Given[PyTree | Callable[[str], bool]],
) -> tuple[RestrictedLoss, tuple[jax.Array, ...]]:
    """Make a loss a function of some parameters, for their weight-restricted learning coefficient.

    The others, and the localizer of the others, drop out of the posterior.

    Args:
        loss_fn: `(params, batch) -> mean loss per example`.
        params: Trained parameters.
        param_mask: A pytree of bools, or of boolean arrays in the shapes of the parameters, in the
            structure of the parameters or of the top of it; or a function of a parameter's path,
            such as "['hidden']['w']", to bool.

    Returns:
        The loss, and the parameters that vary: what `estimate_llc` takes.

    Raises:
        ConfigError: If the mask does not fit the parameters, or lets none of them vary.
        DataError: If it lets a Python float vary.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names, leaves = [jax.tree_util.keystr(path) for path, _ in paths], [leaf for _, leaf in paths]
    chosen = (
        [param_mask(name) for name in names]
        if callable(param_mask)
        else _spread(param_mask, params)
    )
    varying = [
        _read(name, mask, leaf) for name, mask, leaf in zip(names, chosen, leaves, strict=True)
    ]
    free = _free_entries(leaves, varying)
    if not free:
        raise ConfigError(
            f"param_mask must let some parameter vary; it is False for all of {', '.join(names)}."
        )
    # a leaf that varies as a whole is not needed again, and would keep restrictions from sharing
    # programs
    whole = [
        leaf if not is_array(leaf) else None if which is True else Frozen(leaf)
        for leaf, which in zip(leaves, varying, strict=True)
    ]
    return RestrictedLoss(loss_fn, treedef, tuple(whole), tuple(varying)), free


def _free_entries(leaves: Sequence[Any], varying: Sequence[Any]) -> tuple[jax.Array, ...]:
    """Return what varies of each leaf, after any leading axes; nothing of leaves that do not."""

    def read(leaf: Any, which: Any) -> jax.Array:
        array = jnp.asarray(leaf)
        if which is True:
            return array
        mask = which.array
        rows = array.reshape(*array.shape[: array.ndim - mask.ndim], mask.size)
        return rows[..., np.flatnonzero(mask)]

    pairs = zip(leaves, varying, strict=True)
    return tuple(read(leaf, which) for leaf, which in pairs if which is not False)


def _spread(mask: PyTree, params: PyTree) -> list[Any]:
    """Repeat each entry of the mask for the leaves below it."""
    spread: list[Any] = []
    try:
        jax.tree_util.tree_map(
            lambda one, part: spread.extend([one] * len(jax.tree_util.tree_leaves(part))),
            mask,
            params,
        )
    except ValueError as error:
        raise ConfigError(
            f"param_mask must have the structure of params: {str(error).splitlines()[0]}"
        ) from error
    return spread


def _read(name: str, mask: Any, leaf: Any) -> bool | Frozen:
    if not is_array(leaf):
        if isinstance(leaf, (float, complex)) and np.any(mask):
            refuse_python_float(leaf, "params" + name)
        return False
    which = np.asarray(mask)
    if which.dtype != bool or which.shape not in ((), leaf.shape):
        raise ConfigError(
            f"param_mask at {name} must be a bool or a boolean array of shape {leaf.shape}; got "
            f"{which.dtype} of shape {which.shape}."
        )
    if which.all() or not which.any():
        return bool(which.all())
    return Frozen(which)
