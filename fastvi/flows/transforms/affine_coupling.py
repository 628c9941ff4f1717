"""Affine coupling (Dinh et al., Density estimation using Real NVP, 2017)."""

from collections.abc import Callable

import equinox as eqx
import jax

from fastvi._typing import Any, Key
from fastvi.flows.elementwise import BoundedAffine
from fastvi.flows.networks import ResNet
from fastvi.flows.transforms.coupling import (
    AbstractCoupling,
    Mask,
    as_mask,
    check_mask,
    make_conditioner,
)


class AffineCoupling(AbstractCoupling):
    """Coupling that scales and shifts.

    Attributes:
        mask: 1 for features that pass, 0 for those that move.
        conditioner: Network that gives shifts and log scales before their bounds.
        max_log_scale: Bound on the log of a scale.
        max_shift: Bound on a shift; None: exp(max_log_scale).
    """

    mask: Mask = eqx.field(static=True, converter=as_mask)
    conditioner: ResNet
    max_log_scale: float = eqx.field(static=True, default=5.0)
    max_shift: float | None = eqx.field(static=True, default=None)

    @property
    def elementwise(self) -> BoundedAffine:
        """Return the bounded affine map."""
        return BoundedAffine(self.max_log_scale, self.max_shift)

    @classmethod
    def create(
        cls,
        key: Key,
        dim: int,
        mask: Any,
        hidden_dim: int,
        n_hidden_layers: int,
        *,
        context_dim: int = 0,
        activation: Callable = jax.nn.elu,
        res_scale: float = 0.1,
        max_log_scale: float = 5.0,
        max_shift: float | None = None,
    ) -> tuple["AffineCoupling", dict[str, Any]]:
        """Return the coupling and its parameters, those of the identity.

        Args:
            key: Random key.
            dim: Features.
            mask: 1 for features that pass, 0 for those that move.
            hidden_dim: Width of the network.
            n_hidden_layers: Residual blocks of the network.
            context_dim: Size of the context, 0 for none.
            activation: Activation of the network.
            res_scale: Factor on what a residual block adds.
            max_log_scale: Bound on the log of a scale.
            max_shift: Bound on a shift; None: exp(max_log_scale).

        Raises:
            ConfigError: If a value is out of range.
        """
        mask = check_mask(mask, dim)
        network = {
            "hidden_dim": hidden_dim,
            "n_hidden_layers": n_hidden_layers,
            "activation": activation,
            "res_scale": res_scale,
        }
        conditioner = make_conditioner(
            BoundedAffine(max_log_scale, max_shift), mask, context_dim, network
        )
        coupling = cls(mask, conditioner, max_log_scale, max_shift)
        return coupling, coupling.init_params(key)
