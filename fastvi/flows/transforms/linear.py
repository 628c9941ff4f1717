"""A linear map in LU form (Oliva et al., Transformation Autoregressive Networks, 2018)."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Any, Key
from fastvi.flows.networks import ResNet
from fastvi.flows.transforms.base import AbstractTransform


class LinearTransform(AbstractTransform):
    """y = L (U + diag(s)) x with s = softplus(raw_diag + network).

    L is unit lower and U strictly upper triangular.
    A gate g takes L to I + g (L - I), U to g U and s to 1 + g (s - 1).

    Attributes:
        dim: Features.
        conditioner: Network from the context to what is added to `raw_diag`; None: no context is
            used.
    """

    dim: int = eqx.field(static=True)
    conditioner: ResNet | None = None

    def __check_init__(self):
        if self.dim < 1:
            raise ConfigError(f"dim must be positive, not {self.dim}.")
        if self.conditioner is not None and self.conditioner.out_dim != self.dim:
            raise ConfigError(
                f"The conditioner must have dim={self.dim} outputs, not {self.conditioner.out_dim}."
            )

    @property
    def context_dim(self) -> int | None:
        """Count the inputs of the network; any context is ignored without one."""
        return None if self.conditioner is None else self.conditioner.in_dim

    def init_params(self, key: Key | None = None, context_dim: int = 0) -> dict[str, Any]:
        """Return {"lower", "upper", "raw_diag"} of the identity, and "mlp" with a network."""
        self.check_context_dim(context_dim)
        dtype = jnp.result_type(float)
        params: dict[str, Any] = {
            name: jnp.zeros((self.dim, self.dim), dtype) for name in ("lower", "upper")
        }
        # softplus of it is 1
        params["raw_diag"] = jnp.full(self.dim, np.log(np.expm1(1.0)), dtype)
        if self.conditioner is not None:
            if key is None:
                raise ConfigError("A conditional LinearTransform needs a key to draw its network.")
            params["mlp"] = self.conditioner.init_params(key, out_bias=np.zeros(self.dim))
        return params

    def push(self, params, columns, condition):
        """Multiply by U + diag(s), then by L."""
        lower, upper, diagonal, gate = self._factors(params, condition)
        # L has ones on its diagonal, so that of U + diag(s) is all of the determinant.
        inner = diagonal * columns + gate * (upper @ columns)
        return inner + gate * (lower @ inner), jnp.sum(jnp.log(diagonal), axis=0)

    def pull(self, params, columns, condition):
        """Solve with L, then with U + diag(s)."""
        lower, upper, diagonal, gate = self._factors(params, condition)
        # one matrix for all columns is solved at once; a context or a gate gives each its own
        if diagonal.shape[1] == 1:
            eye = jnp.eye(self.dim, dtype=lower.dtype)
            solve = jax.scipy.linalg.solve_triangular
            inner = solve(eye + gate * lower, columns, lower=True, unit_diagonal=True)
            x = solve(gate * upper + diagonal * eye, inner, lower=False)
        else:
            inner = _substitute(lower, jnp.ones_like(diagonal), gate, columns, reverse=False)
            x = _substitute(upper, diagonal, gate, inner, reverse=True)
        return x, -jnp.sum(jnp.log(diagonal), axis=0)

    def _factors(self, params, condition):
        """Return strict triangles, the gated diagonal and the gate.

        The triangles are of shape (dim, dim), the diagonal (dim, 1 or size), the gate (1 or size,).
        """
        raw = params["raw_diag"][:, None]
        if self.conditioner is not None:
            network, inputs = params["mlp"], condition.context
            raw = raw + self.conditioner.output(network, self.conditioner.hidden(network, inputs))
        diagonal = jax.nn.softplus(raw)
        gate = jnp.ones(1, raw.dtype) if condition.gate is None else condition.gate
        # A gated diagonal lies between that of the map and 1, and so stays positive.
        return (
            jnp.tril(params["lower"], -1),
            jnp.triu(params["upper"], 1),
            1 + gate * (diagonal - 1),
            gate,
        )

    @classmethod
    def create(
        cls,
        key: Key | None,
        dim: int,
        *,
        context_dim: int = 0,
        hidden_dim: int = 64,
        n_hidden_layers: int = 2,
        activation: Callable = jax.nn.tanh,
        res_scale: float = 0.1,
    ) -> tuple["LinearTransform", dict[str, Any]]:
        """Return the transform and its parameters, those of the identity.

        Args:
            key: Random key of the network; None is enough without a context.
            dim: Features.
            context_dim: Size of the context that moves the diagonal, 0 for none.
            hidden_dim: Width of the network.
            n_hidden_layers: Residual blocks of the network.
            activation: Activation of the network.
            res_scale: Factor on what a residual block adds.

        Raises:
            ConfigError: If a value is out of range.
        """
        network = (
            ResNet(context_dim, hidden_dim, dim, n_hidden_layers, activation, res_scale)
            if context_dim
            else None
        )
        transform = cls(dim, network)
        return transform, transform.init_params(key)


def _substitute(strict, diagonal, gate, y, *, reverse):
    """Solve (diag(diagonal) + gate strict) x = y row by row.

    Each column has a diagonal and a gate of its own.
    """

    def step(x, i):
        row = (y[i] - gate * (strict[i] @ x)) / diagonal[i]
        return x.at[i].set(row), None

    return jax.lax.scan(step, jnp.zeros_like(y), jnp.arange(y.shape[0]), reverse=reverse)[0]
