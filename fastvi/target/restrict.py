"""Estimates of a part of the weights: the others stay where they are."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fastvi._errors import ConfigError
from fastvi._modes import in_own_modes
from fastvi._typing import Batch, Given, PyTree
from fastvi.target.inputs import is_array
from fastvi.target.ravel import refuse_python_float
from fastvi.target.restricted import Frozen, RestrictedLoss, free_entries
from fastvi.target.training_state import refuse_varying_optimiser


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
            such as `"['hidden']['w']"`, to bool.

    Returns:
        The loss, and the parameters that vary: what `estimate_llc` takes.

    Raises:
        ConfigError: If the mask does not fit the parameters, or lets none of them vary.
        DataError: If it lets a Python float vary, or the state of an optimiser.
    """
    leaves, treedef = jax.tree_util.tree_flatten(params)
    varying = read_mask(params, param_mask)
    refuse_varying_optimiser(params, varying)
    free = free_entries(leaves, varying)
    whole = tuple(Frozen(leaf) if is_array(leaf) else leaf for leaf in leaves)
    sites = tuple((number,) for number, which in enumerate(varying) if which is not False)
    return RestrictedLoss(loss_fn, treedef, whole, tuple(varying), sites), free


def read_mask(params: PyTree, param_mask: Any) -> list[bool | Frozen]:
    """Return of each leaf whether it varies, or which of its entries do.

    Raises:
        ConfigError: If the mask does not fit the parameters, or lets none of them vary.
        DataError: If it lets a Python float vary.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names, leaves = [jax.tree_util.keystr(path) for path, _ in paths], [leaf for _, leaf in paths]
    # the mask of a module that can be called can be called too
    is_function = callable(param_mask) and jax.tree_util.tree_structure(param_mask) != treedef
    chosen = [param_mask(name) for name in names] if is_function else _spread(param_mask, params)
    varying = [
        _read(name, mask, leaf) for name, mask, leaf in zip(names, chosen, leaves, strict=True)
    ]
    if not any(which is not False for which in varying):
        raise ConfigError(
            f"param_mask must let some parameter vary; it is False for all of {', '.join(names)}."
        )
    return varying


def restrict_to_each(
    loss_fn: Callable[..., Any], params: PyTree, masks: Sequence[Any]
) -> list[tuple[RestrictedLoss, tuple[jax.Array, ...]]]:
    """Restrict a loss to several sets of parameters, with one copy of what does not vary.

    Restrictions whose arrays have the same shapes get programs that serve all of them: in these,
    each array that varies may take the place of any that varies in one of them.

    Args:
        loss_fn: `(params, batch) -> mean loss per example`.
        params: Trained parameters.
        masks: As for `restrict`.

    Returns:
        What `restrict` returns, for each mask.

    Cost:
        A gradient is taken through all arrays that vary in some restriction of the same shapes.
    """
    made = [restrict(loss_fn, params, mask) for mask in masks]
    alike: dict[Any, list[int]] = {}
    for number, (loss, free) in enumerate(made):
        is_whole = tuple(loss.varying[site] is True for site in loss.own_sites)
        shapes = tuple((array.shape, array.dtype) for array in free)
        alike.setdefault((is_whole, shapes), []).append(number)
    shared = made[0][0].whole if made else ()
    found = list(made)
    for members in alike.values():
        columns = zip(*(made[number][0].own_sites for number in members), strict=True)
        sites = tuple(tuple(sorted(set(column))) for column in columns)
        for number in members:
            loss = dataclasses.replace(made[number][0], whole=shared, sites=sites)
            found[number] = loss, made[number][1]
    return found


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
            f"{which.dtype} of shape {which.shape}. fastvi.select_part(params, pattern) makes "
            "masks of names."
        )
    if which.all() or not which.any():
        return bool(which.all())
    return Frozen(which)
