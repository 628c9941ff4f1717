"""Draws of a fitted q, with its normalised log density.

As flat vectors or in the pytree that somebody passed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._modes import in_own_modes
from fastvi._typing import Array, Float, Given, Key, PyTree
from fastvi.families.base import AbstractFamily
from fastvi.target.keys import as_key
from fastvi.target.ravel import TreeObjective, TreeStructure
from fastvi.target.restricted import RestrictedLoss


class FittedQ(eqx.Module):
    """A fitted q, to draw from: of several chains, the mixture of theirs with equal weights.

    `result.q` of `estimate_llc` draws in the pytree that was passed as `params`, `extras["q"]` of
    `fit` draws flat vectors. It is a pytree of arrays, so that `jax.jit` and `jax.vmap` take it and
    return it.

    Means under the mixture are those that an estimate reports: `llc_vi` is nbeta (E_q[L_n(w)] -
    L_n(w*)).

    Attributes:
        family: What the parameters of q mean.
        params: Parameters of q, with a first axis of chains.
        center: w*, flat; of a fit under `jax.vmap` with its axes before, until that is mapped over
            too.
        structure: How parameters lie in a flat vector; None where w is flat.
        restriction: The loss that `fastvi.restrict` made, where some parameters are held fixed.
        form: What draws look like: flat vectors, the parameters that vary, or all of them.
    """

    family: AbstractFamily
    params: PyTree
    center: Float[Array, "*fits dim"]
    structure: TreeStructure | None = eqx.field(static=True, default=None)
    restriction: RestrictedLoss | None = eqx.field(static=True, default=None)
    form: Literal["flat", "varying", "whole"] = eqx.field(static=True, default="flat")

    @property
    def num_chains(self) -> int:
        """Count the chains that q is a mixture of."""
        return jax.tree_util.tree_leaves(self.params)[0].shape[0]

    def chain(self, index: Given[int]) -> "FittedQ":
        """Return the q of one chain."""
        # jax takes the nearest index where one is out of range.
        if not -self.num_chains <= index < self.num_chains:
            raise DataError(f"index must be that of one of {self.num_chains} chains; got {index}.")
        # The axis of chains stays, with one chain in it.
        one = jax.tree_util.tree_map(lambda leaf: leaf[index][None], self.params)
        return dataclasses.replace(self, params=one)

    @property
    def flat(self) -> "FittedQ":
        """The same q of flat vectors, those of the parameters that vary."""
        return dataclasses.replace(self, form="flat")

    @property
    def varying(self) -> "FittedQ":
        """The same q of the parameters that vary, as `fastvi.restrict` returns them.

        Of all, where none is fixed.
        """
        return self._as_tree("varying")

    @property
    def whole(self) -> "FittedQ":
        """The same q of all parameters, those that are held fixed in their places."""
        return self._as_tree("whole")

    def _as_tree(self, form: Literal["varying", "whole"]) -> "FittedQ":
        if self.structure is None:
            raise DataError(
                "this q knows flat vectors alone: fit() was given no pytree. Unravel its draws "
                "yourself."
            )
        return dataclasses.replace(self, form=form)

    @in_own_modes
    def sample_and_log_prob(
        self, key: Any, shape: Given[int | Sequence[int]] = ()
    ) -> tuple[PyTree, Float[Array, "..."]]:
        """Draw independently from q.

        Args:
            key: A jax random key, or an int seed.
            shape: Axes that lead every array of w; an int is one axis.

        Returns:
            w, and log q(w) in nats, of shape `shape`: normalised over the coordinates of w that
            vary. Arrays of a pytree have the dtypes that were passed in; log q is that of the draw
            before it is cast to them. What is no array comes back as it was.

        Raises:
            DataError: If the shape is none.

        Cost:
            No loss. Time grows with the number of chains.
        """
        self._check_one()
        axes, key = _axes(shape), as_key(key)
        num, dim, dtype = math.prod(axes), self.center.size, self.center.dtype
        # A shape with a 0 in it asks for no draw.
        w, log_prob = jnp.zeros((0, dim), dtype), jnp.zeros(0, dtype)
        if num:
            w, log_prob = _draw(self.family, self.params, self.center, key, num)
        return self._formed(w.reshape(*axes, dim)), log_prob.reshape(axes)

    def sample(self, key: Any, shape: Given[int | Sequence[int]] = ()) -> PyTree:
        """Draw the same w without log q; see `sample_and_log_prob`."""
        return self.sample_and_log_prob(key, shape)[0]

    @in_own_modes
    def log_prob(self, w: PyTree) -> Float[Array, "..."]:
        """Evaluate log q at any w.

        Args:
            w: What `sample_and_log_prob` returns: a flat vector or a pytree, with any leading axes.

        Returns:
            log q(w) in nats, of the shape of the leading axes. A w that differs from the parameters
            held fixed counts as its varying part.

        Raises:
            DataError: If w does not have the structure or the shapes of a draw.
        """
        self._check_one()
        flat = self._flattened(w)
        axes = flat.shape[:-1]
        displacement = flat.reshape(math.prod(axes), self.center.size) - self.center
        return _log_prob(self.family, self.params, displacement).reshape(axes)

    def _check_one(self) -> None:
        if self.center.ndim != 1:
            raise DataError(
                "this is a q for each key of a fit under jax.vmap. Map over it too: "
                "jax.vmap(lambda q, key: q.sample_and_log_prob(key, shape))(qs, keys)."
            )

    def _formed(self, w: Float[Array, "*axes dim"]) -> PyTree:
        """Turn flat draws to what this q is asked to return."""
        if self.form == "flat" or self.structure is None:
            return w
        return _as_tree(self.structure, self.restriction, self.form, w)

    def _flattened(self, w: PyTree) -> Float[Array, "*axes dim"]:
        """Undo `_formed`."""
        if self.form == "flat" or self.structure is None:
            flat = jnp.asarray(w, self.center.dtype)
            if flat.ndim == 0 or flat.shape[-1] != self.center.size:
                raise DataError(f"w must have shape (..., {self.center.size}); got {flat.shape}.")
            return flat
        # What is held fixed has no density.
        if self.form == "whole" and self.restriction is not None:
            w = self.restriction.take(w)
        return self.structure.ravel(w, self.center.dtype)


def fitted_q(
    family: AbstractFamily,
    params: PyTree,
    center: Float[Array, " dim"],
    objective: TreeObjective,
    is_masked: bool,
) -> FittedQ:
    """Return the q of a fit, which draws what the caller passed as parameters.

    Args:
        family: The family.
        params: Its fitted parameters, with a first axis of chains.
        center: w*, flat.
        objective: The loss, which knows the pytree of the parameters.
        is_masked: Whether the caller passed all parameters and a mask, not a restricted loss.
    """
    restriction, form = _restriction_and_form(objective, is_masked)
    return FittedQ(family, params, center, objective.structure, restriction, form)


def passed_form(objective: TreeObjective, is_masked: bool) -> Callable[[Array], PyTree]:
    """Return what turns flat parameters, with any leading axes, into what the caller passed."""
    restriction, form = _restriction_and_form(objective, is_masked)

    return functools.partial(_as_tree, objective.structure, restriction, form)


def _as_tree(
    structure: TreeStructure,
    restriction: RestrictedLoss | None,
    form: str,
    w: Float[Array, "*axes dim"],
) -> PyTree:
    """Turn flat draws into the parameters that vary, or with those that are held fixed."""
    tree = structure.unravel_as_given(w)
    if form == "varying" or restriction is None:
        return tree
    return restriction.put(tree, w.shape[:-1])


def _restriction_and_form(
    objective: TreeObjective, is_masked: bool
) -> tuple[RestrictedLoss | None, Literal["varying", "whole"]]:
    # A mask restricts the loss inside the package: the caller knows all parameters alone.
    restriction = objective.loss_fn if isinstance(objective.loss_fn, RestrictedLoss) else None
    return restriction, "whole" if is_masked or restriction is None else "varying"


def _axes(shape: Given[int | Sequence[int]]) -> tuple[int, ...]:
    axes = (shape,) if isinstance(shape, (int, np.integer)) else shape
    # A bool is an int to Python, and True would be one draw.
    if not isinstance(axes, Sequence) or any(
        isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 0
        for size in axes
    ):
        raise DataError(f"shape must be a tuple of sizes, such as () or (100,); got {shape!r}.")
    return tuple(int(size) for size in axes)


@functools.partial(jax.jit, static_argnames="num")
def _draw(
    family: AbstractFamily, params: PyTree, center: Float[Array, " dim"], key: Key, num: int
) -> tuple[Float[Array, "draws dim"], Float[Array, " draws"]]:
    """Draw `num` times: every chain turns all of the noise, and a label picks among them."""
    # Labels and noise are to be independent.
    key_label, key_noise = jax.random.split(key)
    chains = jax.tree_util.tree_leaves(params)[0].shape[0]
    noise = family.draw_noise(key_noise, num)

    def one(chain_params):
        drawn = family.transform(chain_params, noise, mirror=False)
        return drawn.displacement, drawn.log_prob

    # One chain after the other: side by side they would need the memory of all.
    displacements, own = jax.lax.map(one, params)
    if chains == 1:
        return center[None] + displacements[0], own[0]
    label = jax.random.randint(key_label, (num,), 0, chains)
    displacement = displacements[label, jnp.arange(num)]
    each = _each_log_prob(family, params, displacement)
    # A draw's own density comes from its noise, without the rounding of an inverse.
    each = jnp.where(jnp.arange(chains)[:, None] == label, own, each)
    return center[None] + displacement, _mixed(each)


@jax.jit
def _log_prob(family: AbstractFamily, params: PyTree, displacement: Float[Array, "draws dim"]):
    return _mixed(_each_log_prob(family, params, displacement))


def _each_log_prob(family, params, displacement) -> Float[Array, "chains draws"]:
    # One chain after the other, as in `_draw`.
    return jax.lax.map(
        lambda one: jax.vmap(lambda v: family.log_prob(one, v))(displacement), params
    )


def _mixed(log_probs: Float[Array, "chains draws"]) -> Float[Array, " draws"]:
    """Mix densities with equal weights."""
    # Densities of many dimensions leave the range of floats; their logarithms do not.
    return jax.scipy.special.logsumexp(log_probs, axis=0) - math.log(log_probs.shape[0])
