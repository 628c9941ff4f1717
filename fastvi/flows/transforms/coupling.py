"""Coupling layers: part of the features pass, and a network of them moves the others."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Key
from fastvi.flows._columns import Order
from fastvi.flows.elementwise import AbstractElementwise, BoundedAffine
from fastvi.flows.networks import ResNet
from fastvi.flows.transforms.conditioned import AbstractConditioned

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


class Coupling(AbstractConditioned):
    """y_pass = x_pass; y_move = f(x_move; network(x_pass, context)) with f applied entry by entry.

    The network sees only what passes and gives parameters only for what moves. With
    `BoundedAffine` it is that of RealNVP, with `RationalQuadratic` that of neural spline flows.

    Attributes:
        mask: 1 for features that pass, 0 for those that move.
        conditioner: The network.
        elementwise: f.

    References:
        Dinh et al., Density estimation using Real NVP (2017); Durkan et al., Neural Spline Flows
        (2019).
    """

    mask: Mask = eqx.field(static=True, converter=as_mask)
    conditioner: ResNet
    elementwise: AbstractElementwise = BoundedAffine()

    @property
    def dim(self) -> int:
        """Count the features."""
        return len(self.mask)

    @property
    def num_seen(self) -> int:
        """Count the features that pass."""
        return sum(self.mask)

    @property
    def num_moved(self) -> int:
        """Count the others."""
        return self.dim - self.num_seen

    @property
    def order(self) -> Order:
        """Put what passes first."""
        return tuple(int(i) for i in np.argsort(1 - np.asarray(self.mask), kind="stable"))

    def core(self) -> "Coupling":
        """Return the coupling whose mask is sorted.

        Couplings with equally many features passing share it.
        """
        return dataclasses.replace(self, mask=tuple(sorted(self.mask, reverse=True)))

    def push(self, params, columns, condition):
        """Move the rows that come last."""
        return self._move(self.elementwise.forward, params, columns, condition)

    def pull(self, params, columns, condition):
        """Move the rows that come last, back."""
        return self._move(self.elementwise.inverse, params, columns, condition)

    def _move(self, function, params, columns, condition):
        # `order` put the features that pass first
        fixed, moved = columns[: self.num_seen], columns[self.num_seen :]
        raw = self.raw(params["mlp"], fixed, condition.context)
        moved, log_slopes = function(raw, moved, condition.gate)
        return jnp.concatenate([fixed, moved]), jnp.sum(log_slopes, axis=0)

    @classmethod
    def create(
        cls,
        key: Key,
        dim: int,
        mask: Any,
        hidden_dim: int,
        n_hidden_layers: int,
        *,
        elementwise: AbstractElementwise | None = None,
        context_dim: int = 0,
        activation: Callable = jax.nn.elu,
        res_scale: float = 0.1,
    ) -> tuple["Coupling", dict[str, Any]]:
        """Return the coupling and its parameters, those of the identity.

        Args:
            key: Random key.
            dim: Features.
            mask: 1 for features that pass, 0 for those that move.
            hidden_dim: Width of the network.
            n_hidden_layers: Residual blocks of the network.
            elementwise: The map of a feature; None: `BoundedAffine()`.
            context_dim: Size of the context, 0 for none.
            activation: Activation of the network.
            res_scale: Factor on what a residual block adds.

        Raises:
            ConfigError: If a value is out of range.
        """
        mask, elementwise = as_mask(mask), elementwise or BoundedAffine()
        if dim < 1 or len(mask) != dim:
            raise ConfigError(
                f"mask must have dim={dim} entries, at least one; it has {len(mask)}."
            )
        passed = sum(mask)
        outputs = (dim - passed) * elementwise.num_params
        network = ResNet(
            passed + context_dim, hidden_dim, outputs, n_hidden_layers, activation, res_scale
        )
        coupling = cls(mask=mask, conditioner=network, elementwise=elementwise)
        return coupling, coupling.init_params(key)
