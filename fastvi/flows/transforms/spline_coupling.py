"""Spline coupling (Durkan et al., Neural Spline Flows, 2019)."""

from collections.abc import Callable

import equinox as eqx
import jax

from fastvi._typing import Any, Key
from fastvi.flows.elementwise import RationalQuadratic
from fastvi.flows.networks import ResNet
from fastvi.flows.transforms.coupling import (
    AbstractCoupling,
    Mask,
    as_mask,
    check_mask,
    make_conditioner,
)


class SplineCoupling(AbstractCoupling):
    """Coupling that moves features by rational-quadratic splines with identity tails.

    Attributes:
        mask: 1 for features that pass, 0 for those that move.
        conditioner: Network that gives the raw parameters of the splines.
        num_bins: Bins of a spline.
        tail_bound: The splines act on [-tail_bound, tail_bound].
        min_bin_width: Least width of a bin, as a fraction of the interval.
        min_bin_height: Least height of a bin, as a fraction of the interval.
        min_derivative: Least derivative at a knot.
        max_derivative: Greatest derivative at a knot.
    """

    mask: Mask = eqx.field(static=True, converter=as_mask)
    conditioner: ResNet
    num_bins: int = eqx.field(static=True, default=8)
    tail_bound: float = eqx.field(static=True, default=5.0)
    min_bin_width: float = eqx.field(static=True, default=1e-2)
    min_bin_height: float = eqx.field(static=True, default=1e-2)
    min_derivative: float = eqx.field(static=True, default=1e-2)
    max_derivative: float = eqx.field(static=True, default=10.0)

    @property
    def elementwise(self) -> RationalQuadratic:
        """Return the spline."""
        return RationalQuadratic(
            self.num_bins,
            self.tail_bound,
            self.min_bin_width,
            self.min_bin_height,
            self.min_derivative,
            self.max_derivative,
        )

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
        num_bins: int = 8,
        tail_bound: float = 5.0,
        min_bin_width: float = 1e-2,
        min_bin_height: float = 1e-2,
        min_derivative: float = 1e-2,
        max_derivative: float = 10.0,
        activation: Callable = jax.nn.elu,
        res_scale: float = 0.1,
    ) -> tuple["SplineCoupling", dict[str, Any]]:
        """Return the coupling and its parameters, those of the identity.

        Args:
            key: Random key.
            dim: Features.
            mask: 1 for features that pass, 0 for those that move.
            hidden_dim: Width of the network.
            n_hidden_layers: Residual blocks of the network.
            context_dim: Size of the context, 0 for none.
            num_bins: Bins of a spline.
            tail_bound: The splines act on [-tail_bound, tail_bound].
            min_bin_width: Least width of a bin, as a fraction of the interval.
            min_bin_height: Least height of a bin, as a fraction of the interval.
            min_derivative: Least derivative at a knot.
            max_derivative: Greatest derivative at a knot.
            activation: Activation of the network.
            res_scale: Factor on what a residual block adds.

        Raises:
            ConfigError: If a value is out of range.
        """
        mask = check_mask(mask, dim)
        shape = (
            num_bins,
            tail_bound,
            min_bin_width,
            min_bin_height,
            min_derivative,
            max_derivative,
        )
        network = {
            "hidden_dim": hidden_dim,
            "n_hidden_layers": n_hidden_layers,
            "activation": activation,
            "res_scale": res_scale,
        }
        conditioner = make_conditioner(RationalQuadratic(*shape), mask, context_dim, network)
        coupling = cls(mask, conditioner, *shape)
        return coupling, coupling.init_params(key)
