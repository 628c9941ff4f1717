"""Logarithmic tails.

References:
    Andrade, Stable Training of Normalizing Flows for High-Dimensional VI (2024).
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._errors import ConfigError
from fastvi._typing import Any, Array, Key
from fastvi.flows.transforms.base import AbstractFixed

_NEWTON_STEPS = 20  # float64's accuracy where log |x - tau| is below 40; a gate below 1 needs fewer


class LoftTransform(AbstractFixed):
    """y = sign(x) (min(|x|, tau) + log(1 + max(|x| - tau, 0))).

    The identity up to tau, logarithmic beyond.

    Attributes:
        dim: Features.
        tau: Where the tails begin.
    """

    dim: int = eqx.field(static=True)
    tau: float = eqx.field(static=True, default=1000.0)

    def __check_init__(self):
        if self.dim < 1 or self.tau <= 0:
            raise ConfigError(f"dim and tau must be positive, not {self.dim} and {self.tau}.")

    def push(self, params, columns, condition):
        """Compress the tails."""
        # without a gate the inverse has a closed form, which a mixture with the identity has not
        if condition.gate is None:
            return self._loft(columns), -jnp.sum(jnp.log1p(self._excess(columns)), axis=0)
        y = columns + condition.gate * (self._loft(columns) - columns)
        return y, jnp.sum(self._gated_log_slope(columns, condition.gate), axis=0)

    def pull(self, params, columns, condition):
        """Expand the tails.

        What exceeds tau by 88 in float32 overflows to infinity, as its preimage does.
        """
        if condition.gate is not None:
            x = self._solve_gated(columns, condition.gate)
            return x, -jnp.sum(self._gated_log_slope(x, condition.gate), axis=0)
        excess = self._excess(columns)
        x = jnp.where(excess > 0, jnp.sign(columns) * (self.tau + jnp.expm1(excess)), columns)
        return x, jnp.sum(excess, axis=0)

    def _excess(self, x):
        return jnp.maximum(jnp.abs(x) - self.tau, 0)

    def _loft(self, x: Array) -> Array:
        excess: Array = self._excess(x)
        return jnp.where(excess > 0, jnp.sign(x) * (self.tau + jnp.log1p(excess)), x)

    def _gated_log_slope(self, x, gate):
        # log(1 - g + g / (1 + excess)), exact where the excess is small
        return jnp.log1p(-gate * (1 - 1 / (1 + self._excess(x))))

    def _solve_gated(self, y, gate):
        """Solve (1 - g) x + g loft(x) = y by Newton's method.

        Beyond tau the left side is concave and y below x.
        """

        def step(x, _):
            residual = x + gate * (self._loft(x) - x) - y
            return x - residual * jnp.exp(-self._gated_log_slope(x, gate)), None

        # A fixed number of steps, so that the inverse can be differentiated backwards.
        return jax.lax.scan(step, y, length=_NEWTON_STEPS)[0]

    @classmethod
    def create(
        cls, key: Key | None, dim: int, tau: float = 1000.0
    ) -> tuple["LoftTransform", dict[str, Any]]:
        """Return the transform and its parameters, {}."""
        return cls(dim, tau), {}
