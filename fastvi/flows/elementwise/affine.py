"""Scale and shift, both bounded."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi.flows.elementwise.base import AbstractElementwise


class BoundedAffine(AbstractElementwise):
    """y = exp(s) x + t with |s| < max_log_scale and |t| < max_shift.

    Raw parameters are t and s before the bounds, max tanh(raw / max).

    Attributes:
        max_log_scale: Bound on the log of the scale.
        max_shift: Bound on the shift; None: exp(max_log_scale).
    """

    max_log_scale: float = eqx.field(static=True, default=5.0)
    max_shift: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.max_log_scale <= 0 or (self.max_shift is not None and self.max_shift <= 0):
            raise ConfigError(
                f"max_log_scale and max_shift must be positive, not {self.max_log_scale} and "
                f"{self.max_shift}."
            )

    @property
    def num_params(self):
        """Count shift and log scale."""
        return 2

    def identity(self):
        """Return zeros."""
        return np.zeros(2)

    def forward(self, raw, x, gate):
        """Return exp(s) x + t and s."""
        shift, log_scale = self._bounded(raw, gate)
        return x * jnp.exp(log_scale) + shift, log_scale

    def inverse(self, raw, y, gate):
        """Return exp(-s) (y - t) and -s."""
        shift, log_scale = self._bounded(raw, gate)
        return (y - shift) * jnp.exp(-log_scale), -log_scale

    def _bounded(self, raw, gate):
        # tanh is linear near 0, so that small raw parameters are the shift and log scale themselves
        max_shift = float(np.exp(self.max_log_scale)) if self.max_shift is None else self.max_shift
        shift = jnp.tanh(raw[0] / max_shift) * max_shift
        log_scale = jnp.tanh(raw[1] / self.max_log_scale) * self.max_log_scale
        # A gated scale is exp(g s), which stays positive.
        return (shift, log_scale) if gate is None else (gate * shift, gate * log_scale)
