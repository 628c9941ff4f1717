"""Transforms whose network gives the parameters of a map of single numbers."""

import abc
from typing import Any

import equinox as eqx
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Array, Float, Key
from fastvi.flows.elementwise import AbstractElementwise
from fastvi.flows.networks import ResNet
from fastvi.flows.transforms.base import AbstractTransform


class AbstractConditioned(AbstractTransform):
    """A transform that moves features by `elementwise`, with raw parameters of `conditioner`.

    The inputs of the network are the features that it sees, then the context.

    Attributes:
        conditioner: The network.
        elementwise: The map of a feature.
    """

    conditioner: eqx.AbstractVar[ResNet]
    elementwise: eqx.AbstractVar[AbstractElementwise]

    @property
    @abc.abstractmethod
    def num_seen(self) -> int:
        """Count the features that the network sees."""

    @property
    @abc.abstractmethod
    def num_moved(self) -> int:
        """Count the features that move."""

    @property
    def num_ordered(self) -> int:
        """Count the inputs of which an output sees only those before it."""
        return 0

    def __check_init__(self):
        outputs, net = self.num_moved * self.elementwise.num_params, self.conditioner
        if (net.out_dim, net.autoregressive) != (outputs, self.num_ordered):
            raise ConfigError(
                f"The conditioner must have {outputs} outputs, {self.elementwise.num_params} for "
                f"each of {self.num_moved} moved features, and autoregressive="
                f"{self.num_ordered}; it has {net.out_dim} and {net.autoregressive}."
            )
        if self.context_dim < 0:
            raise ConfigError(
                f"The conditioner must have at least {self.num_seen} inputs, the features that it "
                f"sees; it has {net.in_dim}."
            )

    @property
    def context_dim(self) -> int:
        """Count the inputs of the network that are not features."""
        return self.conditioner.in_dim - self.num_seen

    def init_params(self, key: Key, context_dim: int = 0) -> dict[str, Any]:
        """Return {"mlp": network} whose output is that of the identity whatever its input."""
        self.check_context_dim(context_dim)
        # raw parameters lead and features follow, as `raw` reshapes them
        bias = np.repeat(self.elementwise.identity(), self.num_moved)
        return {"mlp": self.conditioner.init_params(key, out_bias=bias)}

    def hidden(
        self, params: Any, features: Float[Array, "seen size"], context: Array | None
    ) -> Float[Array, "hidden size"]:
        """Run all but the last layer of the network."""
        # The context stays a part of its own: one column of it is multiplied once for the batch.
        seen = self.elementwise.seen(features)
        return self.conditioner.hidden(params, *((seen,) if context is None else (seen, context)))

    def raw(
        self, params: Any, features: Float[Array, "seen size"], context: Array | None
    ) -> Float[Array, "params moved size"]:
        """Return the raw parameters of all moved features, in one pass of the network."""
        raw = self.conditioner.output(params, self.hidden(params, features, context))
        return raw.reshape(self.elementwise.num_params, self.num_moved, features.shape[1])
