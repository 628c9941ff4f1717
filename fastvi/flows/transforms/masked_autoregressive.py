"""Masked autoregressive layers: each feature is moved by a map of those before it."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._errors import ConfigError
from fastvi._typing import Any, Array, Float, Key
from fastvi.flows._columns import Order
from fastvi.flows.elementwise import AbstractElementwise, BoundedAffine
from fastvi.flows.networks import ResNet
from fastvi.flows.transforms.conditioned import AbstractConditioned

FastDirection = Literal["inverse", "forward"]


class MaskedAutoregressive(AbstractConditioned):
    """Feature i is moved by a map whose parameters a masked network gives.

    The network sees features before i and the context.

    In the fast direction all parameters come from one pass of the network; the other takes `dim`
    passes in turn.

    Attributes:
        dim: Features.
        conditioner: Network with `autoregressive` = dim.
        elementwise: The map: `BoundedAffine` (MAF, IAF) or `RationalQuadratic` (autoregressive
            spline flows).
        fast: "inverse": one pass for `inverse`, hence for densities; "forward": one pass for
            `forward`, for samples.
        reverse: Count the features from the last.

    References:
        Papamakarios et al., Masked Autoregressive Flow (2017); Durkan et al., Neural Spline Flows
        (2019).
    """

    dim: int = eqx.field(static=True)
    conditioner: ResNet
    elementwise: AbstractElementwise = BoundedAffine()
    fast: FastDirection = eqx.field(static=True, default="inverse")
    reverse: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if self.fast not in ("inverse", "forward"):
            raise ConfigError(f'fast must be "inverse" or "forward", not {self.fast!r}.')
        if self.dim < 1:
            raise ConfigError(f"dim must be positive, not {self.dim}.")

    # The network sees, orders and moves all features; its masks hide the later ones.
    num_seen = num_moved = num_ordered = property(lambda self: self.dim)

    @property
    def order(self) -> Order:
        """Return the order in which the features come."""
        return tuple(range(self.dim))[:: -1 if self.reverse else 1]

    def core(self) -> "MaskedAutoregressive":
        """Return the layer that counts from the first feature."""
        # `order` has reversed the rows already.
        return dataclasses.replace(self, reverse=False)

    def push(self, params, columns, condition):
        """Map forward."""
        move = self._at_once if self.fast == "forward" else self._in_turn
        return move(params["mlp"], columns, condition)

    def pull(self, params, columns, condition):
        """Map back."""
        move = self._at_once if self.fast == "inverse" else self._in_turn
        return move(params["mlp"], columns, condition)

    def _at_once(self, params, columns, condition):
        raw = self.raw(params, columns, condition.context)
        moved, log_slopes = self.elementwise.forward(raw, columns, condition.gate)
        return moved, jnp.sum(log_slopes, axis=0)

    def _in_turn(self, params, columns: Float[Array, "dim size"], condition):
        """Undo `_at_once`.

        Find feature i from those before it, for which the network needs no later one.
        """

        def step(carry, i):
            found, log_det = carry
            hidden = self.hidden(params, found, condition.context)
            raw = self.conditioner.output_of(params, hidden, i)[:, None]
            row, log_slope = self.elementwise.inverse(raw, columns[i][None], condition.gate)
            return (found.at[i].set(row[0]), log_det + log_slope[0]), None

        # features that are not found yet are zero, and masked from every output in use
        start = (jnp.zeros_like(columns), jnp.zeros_like(columns[0]))
        return jax.lax.scan(step, start, jnp.arange(self.dim))[0]

    @classmethod
    def create(
        cls,
        key: Key,
        dim: int,
        hidden_dim: int,
        n_hidden_layers: int,
        *,
        elementwise: AbstractElementwise | None = None,
        context_dim: int = 0,
        activation: Callable = jax.nn.elu,
        res_scale: float = 0.1,
        fast: FastDirection = "inverse",
        reverse: bool = False,
    ) -> tuple["MaskedAutoregressive", dict[str, Any]]:
        """Return the layer and its parameters, those of the identity.

        Args:
            key: Random key.
            dim: Features.
            hidden_dim: Width of the network.
            n_hidden_layers: Residual blocks of the network.
            elementwise: The map of a feature; None: `BoundedAffine()`.
            context_dim: Size of the context, 0 for none.
            activation: Activation of the network.
            res_scale: Factor on what a residual block adds.
            fast: Direction that takes one pass of the network.
            reverse: Count the features from the last.

        Raises:
            ConfigError: If a value is out of range.
        """
        elementwise = BoundedAffine() if elementwise is None else elementwise
        outputs = dim * elementwise.num_params
        network = ResNet(
            dim + context_dim,
            hidden_dim,
            outputs,
            n_hidden_layers,
            activation,
            res_scale,
            autoregressive=dim,
        )
        layer = cls(
            dim=dim, conditioner=network, elementwise=elementwise, fast=fast, reverse=reverse
        )
        return layer, layer.init_params(key)
