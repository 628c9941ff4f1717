"""Estimates of a part of the weights: the others stay where they are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Batch, PyTree
from fastvi.objective import refuse_python_float


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
        leaves, free = [], iter(jax.tree_util.tree_leaves(params))
        for leaf, which in zip(self.whole, self.varying, strict=True):
            kept = jnp.asarray(leaf.array) if isinstance(leaf, Frozen) else leaf
            if which is True:
                leaves.append(next(free))
            elif which is False:
                leaves.append(kept)
            else:
                values = next(free)
                flat = kept.astype(values.dtype).ravel().at[np.flatnonzero(which.array)].set(values)
                leaves.append(flat.reshape(kept.shape))
        return self.loss_fn(self.treedef.unflatten(leaves), batch)


def restrict(
    loss_fn: Callable[[PyTree, Batch], Any], params: PyTree, param_mask: PyTree | Callable[[str], bool]
) -> tuple[RestrictedLoss, tuple[jax.Array, ...]]:
    """Make a loss a function of some of its parameters, for their weight-restricted learning coefficient.

    The others, and the localizer of the others, drop out of the posterior.

    Args:
        loss_fn: `(params, batch) -> mean loss per example`.
        params: Trained parameters.
        param_mask: A pytree of bools, or of boolean arrays in the shapes of the parameters, in the structure of the
            parameters or of the top of it; or a function of a parameter's path, such as "['hidden']['w']", to bool.

    Returns:
        The loss, and the parameters that vary: what `estimate_llc` takes.

    Raises:
        ConfigError: If the mask does not fit the parameters, or lets none of them vary.
        DataError: If it lets a Python float vary.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names, leaves = [jax.tree_util.keystr(path) for path, _ in paths], [leaf for _, leaf in paths]
    chosen = [param_mask(name) for name in names] if callable(param_mask) else _spread(param_mask, params)
    varying = [_read(name, mask, leaf) for name, mask, leaf in zip(names, chosen, leaves, strict=True)]
    free = tuple(
        jnp.asarray(leaf) if which is True else jnp.asarray(leaf).ravel()[np.flatnonzero(which.array)]
        for leaf, which in zip(leaves, varying, strict=True)
        if which is not False
    )
    if not free:
        raise ConfigError(f"param_mask must let some parameter vary; it is False for all of {', '.join(names)}.")
    # a leaf that varies as a whole is not needed again, and would keep restrictions from sharing programs
    whole = [
        leaf if not _is_array(leaf) else None if which is True else Frozen(leaf)
        for leaf, which in zip(leaves, varying, strict=True)
    ]
    return RestrictedLoss(loss_fn, treedef, tuple(whole), tuple(varying)), free


def _spread(mask: PyTree, params: PyTree) -> list[Any]:
    """Repeat each entry of the mask for the leaves below it."""
    spread: list[Any] = []
    try:
        jax.tree_util.tree_map(
            lambda one, part: spread.extend([one] * len(jax.tree_util.tree_leaves(part))), mask, params
        )
    except ValueError as error:
        raise ConfigError(f"param_mask must have the structure of params: {str(error).splitlines()[0]}") from error
    return spread


def _read(name: str, mask: Any, leaf: Any) -> bool | Frozen:
    if not _is_array(leaf):
        if isinstance(leaf, (float, complex)) and np.any(mask):
            refuse_python_float(leaf, "params" + name)
        return False
    which = np.asarray(mask)
    if which.dtype != bool or which.shape not in ((), leaf.shape):
        raise ConfigError(
            f"param_mask at {name} must be a bool or a boolean array of shape {leaf.shape}; got {which.dtype} of shape "
            f"{which.shape}."
        )
    if which.all() or not which.any():
        return bool(which.all())
    return Frozen(which)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
