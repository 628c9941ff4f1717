"""Coupling layers: part of the features pass, and a network of them moves the others."""

import abc
import dataclasses
from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Any, Array, Float, Key
from fastvi.flows._columns import Order
from fastvi.flows.elementwise import AbstractElementwise
from fastvi.flows.networks import ResNet
from fastvi.flows.transforms.base import AbstractTransform

Mask = tuple[int, ...]


def as_mask(mask: Any) -> Mask:
    """Turn an array of zeros and ones to a tuple.

    Raises:
        ConfigError: If it has other entries or more axes.
    """
    array = np.asarray(mask)
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise ConfigError(f"A mask must be a vector of 1 (passed) and 0 (moved), not {array!r}.")
    return tuple(int(entry) for entry in array)


class AbstractCoupling(AbstractTransform):
    """y_pass = x_pass; y_move = f(x_move; network(x_pass, context)) with f applied entry by entry.

    The network sees only what passes and gives parameters only for what moves.

    Attributes:
        mask: 1 for features that pass, 0 for those that move.
        conditioner: The network.
    """

    if not TYPE_CHECKING:  # see AbstractTransform
        mask: eqx.AbstractVar[Mask]
        conditioner: eqx.AbstractVar[ResNet]
    else:

        @property
        def mask(self) -> Mask:
            """Return the mask."""
            ...

        @property
        def conditioner(self) -> ResNet:
            """Return the network."""
            ...

    @property
    @abc.abstractmethod
    def elementwise(self) -> AbstractElementwise:
        """Return f."""

    def __check_init__(self):
        moved = self.dim - sum(self.mask)
        if (
            self.conditioner.out_dim != moved * self.elementwise.num_params
            or self.conditioner.autoregressive
        ):
            raise ConfigError(
                f"The conditioner must have {moved * self.elementwise.num_params} outputs, "
                f"{self.elementwise.num_params} for each of {moved} moved features; it has "
                f"{self.conditioner.out_dim}."
            )
        if self.context_dim < 0:
            raise ConfigError(
                f"The conditioner must have at least {sum(self.mask)} inputs, the features that "
                "pass; "
                f"it has {self.conditioner.in_dim}."
            )

    @property
    def dim(self) -> int:
        """Count the features."""
        return len(self.mask)

    @property
    def context_dim(self) -> int:
        """Count the inputs of the network that are not features."""
        return self.conditioner.in_dim - sum(self.mask)

    @property
    def order(self) -> Order:
        """Put what passes first."""
        return tuple(int(i) for i in np.argsort(1 - np.asarray(self.mask), kind="stable"))

    def core(self) -> "AbstractCoupling":
        """Return the coupling whose mask is sorted.

        Couplings with equally many features passing share it.
        """
        return dataclasses.replace(self, mask=tuple(sorted(self.mask, reverse=True)))

    def init_params(self, key: Key, context_dim: int = 0) -> dict[str, Any]:
        """Return {"mlp": network} whose output is that of the identity whatever its input."""
        if context_dim not in (0, self.context_dim):
            raise ConfigError(
                f"context_dim must be {self.context_dim}, that of the conditioner, not "
                f"{context_dim}."
            )
        bias = np.repeat(self.elementwise.identity(), self.dim - sum(self.mask))
        return {"mlp": self.conditioner.init_params(key, out_bias=bias)}

    def push(self, params, columns, condition):
        """Move the rows that come last."""
        return self._move(self.elementwise.forward, params, columns, condition)

    def pull(self, params, columns, condition):
        """Move the rows that come last, back."""
        return self._move(self.elementwise.inverse, params, columns, condition)

    def _move(self, function, params, columns, condition):
        passed = sum(self.mask)
        fixed, moved = columns[:passed], columns[passed:]
        raw = self._raw(params["mlp"], fixed, condition.context)
        moved, log_slopes = function(raw, moved, condition.gate)
        return jnp.concatenate([fixed, moved]), jnp.sum(log_slopes, axis=0)

    def _raw(
        self, params, fixed: Float[Array, "passed size"], context
    ) -> Float[Array, "params moved size"]:
        seen = self.elementwise.seen(fixed)
        inputs = (seen,) if context is None else (seen, context)
        raw = self.conditioner.output(params, self.conditioner.hidden(params, *inputs))
        return raw.reshape(self.elementwise.num_params, self.dim - fixed.shape[0], fixed.shape[1])


def make_conditioner(
    elementwise: AbstractElementwise, mask: Mask, context_dim: int, network: dict[str, Any]
) -> ResNet:
    """Return a network of the right size for a coupling.

    Args:
        elementwise: The map whose parameters it gives.
        mask: The mask of the coupling.
        context_dim: Size of the context.
        network: Other fields of `ResNet`.
    """
    passed = sum(mask)
    return ResNet(
        passed + context_dim, out_dim=(len(mask) - passed) * elementwise.num_params, **network
    )


def check_mask(mask: Any, dim: int) -> Mask:
    """Turn a mask to a tuple of length `dim`.

    Raises:
        ConfigError: If it has another length.
    """
    mask = as_mask(mask)
    if dim < 1 or len(mask) != dim:
        raise ConfigError(f"mask must have dim={dim} entries, at least one; it has {len(mask)}.")
    return mask
