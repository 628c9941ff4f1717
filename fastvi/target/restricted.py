"""A loss of some of the weights, with the others at their places."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Batch, PyTree
from fastvi.target.inputs import is_array
from fastvi.target.losses import RestrictedBatch, Shared


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
        """Return it on the device, one copy for all restrictions that hold this object.

        What is kept must not be of a trace, so this is not for the inside of a loss.
        """
        # an array of numpy may change in place
        return self._given if isinstance(self._given, jax.Array) else jnp.array(self._given)

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
        return free_entries(leaves, self.varying)


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


def free_entries(leaves: Sequence[Any], varying: Sequence[Any]) -> tuple[jax.Array, ...]:
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
