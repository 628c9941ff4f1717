"""Estimates of a part of the weights: the others stay where they are."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._modes import in_own_modes
from fastvi._typing import Batch, Given, PyTree
from fastvi.target.inputs import is_array
from fastvi.target.losses import RestrictedBatch, Shared
from fastvi.target.ravel import refuse_python_float


class Frozen:
    """An array that compares by content."""

    def __init__(self, array: Any):
        self._given = array

    @functools.cached_property
    def array(self) -> np.ndarray:
        """Return it on the host."""
        return np.asarray(self._given)

    @functools.cached_property
    def on_device(self) -> jax.Array:
        """Return it on the device, one copy for all restrictions that hold this object."""
        return jnp.asarray(self._given)

    @functools.cached_property
    def _content(self) -> tuple[Any, ...]:
        digest = hashlib.blake2b(np.ascontiguousarray(self.array).tobytes()).digest()
        return self.array.shape, str(self.array.dtype), digest

    def __hash__(self) -> int:
        return hash(self._content)

    def __eq__(self, other: Any) -> bool:
        return self is other or (isinstance(other, Frozen) and self._content == other._content)


@dataclasses.dataclass(frozen=True)
class RestrictedLoss:
    """`loss_fn` on the whole parameters, as a function of the entries that vary.

    Called on examples alone, what does not vary is part of the program. Called on what `beside`
    returns, it is an input of the program, which other restrictions of the same shapes then share.

    Attributes:
        loss_fn: The loss of the whole parameters.
        treedef: Their structure.
        whole: Every leaf.
        varying: Of each leaf: True, False, or which of its entries vary.
        sites: Of each leaf that varies, the leaves that the program lets take its place.
    """

    loss_fn: Callable[..., Any]
    treedef: Any
    whole: tuple[Any, ...]
    varying: tuple[bool | Frozen, ...]
    sites: tuple[tuple[int, ...], ...]

    def __call__(self, params: PyTree, batch: Batch) -> Any:
        """Evaluate the loss with the other entries at their places."""
        if isinstance(batch, RestrictedBatch):
            return self.loss_fn(self._put_among(params, *batch.shared.arrays), batch.examples)
        return self.loss_fn(self.put(params), batch)

    @property
    def own_sites(self) -> tuple[int, ...]:
        """Return the numbers of the leaves that vary."""
        return tuple(number for number, which in enumerate(self.varying) if which is not False)

    def beside(self, examples: Batch) -> RestrictedBatch:
        """Return examples with the weights that do not vary, and where those that vary belong."""
        own = self.own_sites
        # a leaf that is replaced in every program that shares it is not needed
        replaced = {
            site
            for site, sites in zip(own, self.sites, strict=True)
            if sites == (site,) and self.varying[site] is True
        }
        leaves = tuple(
            leaf.on_device if isinstance(leaf, Frozen) and number not in replaced else None
            for number, leaf in enumerate(self.whole)
        )
        entries = tuple(
            jnp.asarray(np.flatnonzero(which.array), jnp.int32)
            if isinstance(which := self.varying[site], Frozen)
            else None
            for site in own
        )
        slots = tuple(
            jax.device_put(np.int32(sites.index(site))) if len(sites) > 1 else None
            for site, sites in zip(own, self.sites, strict=True)
        )
        return RestrictedBatch(examples, Shared((leaves, entries, slots)))

    def _put_among(
        self, varying: PyTree, leaves: Sequence[Any], entries: Sequence[Any], slots: Sequence[Any]
    ) -> PyTree:
        """Return all parameters, of what `beside` returned."""
        pairs = zip(leaves, self.whole, strict=True)
        filled = [kept if leaf is None else leaf for leaf, kept in pairs]
        values = jax.tree_util.tree_leaves(varying)
        for value, sites, rows, slot in zip(values, self.sites, entries, slots, strict=True):
            for number, site in enumerate(sites):
                is_here = None if slot is None else slot == number
                filled[site] = _placed(filled[site], value, rows, is_here)
        return self.treedef.unflatten(filled)

    def put(self, varying: PyTree, axes: tuple[int, ...] | None = None) -> PyTree:
        """Return all parameters, with these values of those that vary.

        Args:
            varying: What `restrict` returned, or values in its place.
            axes: Leading axes of `varying`, along which the arrays that do not vary are repeated;
                None for the values of a loss, whose other arrays stay as they are.
        """
        leaves, free, lead = [], iter(jax.tree_util.tree_leaves(varying)), axes or ()
        for leaf, which in zip(self.whole, self.varying, strict=True):
            kept = leaf.on_device if isinstance(leaf, Frozen) else leaf
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
    leaves, treedef = jax.tree_util.tree_flatten(params)
    varying = read_mask(params, param_mask)
    free = _free_entries(leaves, varying)
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


def _placed(base: Any, value: jax.Array, rows: Any, is_here: Any) -> jax.Array:
    """Return an array with these values in it, all of it or some rows of its flat form.

    As it is, in the type of the values, where they belong elsewhere.
    """
    if rows is None:
        # one array has one dtype, that of the values: a fit may compute in more digits
        return value if is_here is None else jnp.where(is_here, value, base.astype(value.dtype))
    flat = base.astype(value.dtype).ravel()
    if is_here is not None:  # rows that are out of range are dropped
        rows = jnp.where(is_here, rows, flat.size)
    return flat.at[rows].set(value, mode="drop").reshape(base.shape)


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
