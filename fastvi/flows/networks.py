"""Residual networks on columns.

The conditioners of transforms and the extractor of context features.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Array, Float, Key
from fastvi.flows._columns import check_features, from_columns, to_columns

Activation = Callable[[Array], Array]
Params = dict
# Scale of what a residual block adds at the start. Held-out nats of spline flows on two moons,
# rings and digits are best at 2, or level with 1.
RESIDUAL_GAIN = 2.0


class ResNet(eqx.Module):
    """Residual network.

    Dense, then `n_hidden_layers` times h + res_scale dense(activation(dense(h))), then dense.

    Attributes:
        in_dim: Inputs.
        hidden_dim: Width.
        out_dim: Outputs.
        n_hidden_layers: Residual blocks.
        activation: Function applied entry by entry.
        res_scale: Factor on what a block adds.
        autoregressive: Number of leading inputs that are ordered, or 0. Output j of the out_dim /
            autoregressive groups then sees ordered inputs before j only, and the rest of the inputs
            in full.
    """

    in_dim: int = eqx.field(static=True)
    hidden_dim: int = eqx.field(static=True)
    out_dim: int = eqx.field(static=True)
    n_hidden_layers: int = eqx.field(static=True, default=2)
    activation: Activation = eqx.field(static=True, default=jax.nn.tanh)
    res_scale: float = eqx.field(static=True, default=0.1)
    autoregressive: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        for name, least in (
            ("in_dim", 0),
            ("hidden_dim", 1),
            ("out_dim", 0),
            ("n_hidden_layers", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if self.autoregressive and self.out_dim % self.autoregressive:
            raise ConfigError(
                f"out_dim={self.out_dim} must be a multiple of "
                f"autoregressive={self.autoregressive}."
            )

    def init_params(self, key: Key, *, out_bias: np.ndarray | None = None) -> Params:
        """Draw kernels of variance 1 / fan-in and biases uniform within 1 / sqrt(fan-in).

        They are of JAX's default float type.

        What a residual block adds has `RESIDUAL_GAIN` times that scale at the start, whatever
        `res_scale` is: begun at `res_scale` itself, the network stays close to a linear one.
        Without biases all units of a network of one input bend at zero.

        Args:
            key: Random key.
            out_bias: Makes the output constant: the last kernel is zero and its bias this vector.
        """
        inner = [f"res_{i}_dense{j}" for i in range(self.n_hidden_layers) for j in (0, 1)]
        names = ["dense_in", *inner, "dense_out"]
        sizes = [self.in_dim, *[self.hidden_dim] * (len(inner) + 1), self.out_dim]
        params, dtype = {}, jnp.result_type(float)
        for name, fan_in, fan_out, layer_key in zip(
            names, sizes[:-1], sizes[1:], jax.random.split(key, len(names)), strict=True
        ):
            kernel = jax.random.truncated_normal(layer_key, -2, 2, (fan_in, fan_out), dtype)
            # A coupling that passes no feature has a network without inputs.
            spread = 1 / np.sqrt(max(fan_in, 1))
            gain = RESIDUAL_GAIN / (self.res_scale or 1) if name.endswith("_dense1") else 1
            bias = jax.random.uniform(
                jax.random.fold_in(layer_key, 1), (fan_out,), dtype, -spread, spread
            )
            # 0.8796 is the standard deviation of a standard normal truncated at 2.
            params[name] = {
                "kernel": (kernel * (gain * spread / 0.87962566103423978)).astype(dtype),
                "bias": bias,
            }
        # a constant output makes a transform the identity, whatever the layers before it are
        if out_bias is not None:
            last = params["dense_out"]["kernel"]
            params["dense_out"] = {
                "kernel": jnp.zeros_like(last),
                "bias": jnp.asarray(out_bias, dtype),
            }
        return params

    def apply(self, params: Params, x: Float[Array, "*batch in"]) -> Float[Array, "..."]:
        """Return outputs of shape (*batch, out_dim)."""
        check_features("x", x, self.in_dim)
        return from_columns(self.output(params, self.hidden(params, to_columns(x))), x.shape[:-1])

    def hidden(self, params: Params, *inputs: Float[Array, "_ _"]) -> Float[Array, "hidden size"]:
        """Run all but the last layer on inputs stacked by rows.

        One with a single column is shared by the batch.
        """
        kernel, row, total = (
            self._kernel(params, "dense_in"),
            0,
            params["dense_in"]["bias"][:, None],
        )
        # The parts are multiplied apart, so that a column that all share is multiplied once.
        for part in inputs:
            total = total + _matmul(kernel[row : row + part.shape[0]], part)
            row += part.shape[0]
        for i in range(self.n_hidden_layers):
            inner = self.activation(self._dense(params, f"res_{i}_dense0", total))
            total = total + self.res_scale * self._dense(params, f"res_{i}_dense1", inner)
        return total

    def output(
        self, params: Params, hidden: Float[Array, "hidden size"]
    ) -> Float[Array, "out size"]:
        """Run the last layer, its bias as a row of the kernel.

        Added after, XLA adds it again in every consumer.
        """
        kernel = jnp.concatenate(
            [self._kernel(params, "dense_out"), params["dense_out"]["bias"][None]]
        )
        ones = jnp.ones((1, hidden.shape[1]), hidden.dtype)
        return _matmul(kernel, jnp.concatenate([hidden, ones]))

    def output_of(
        self, params: Params, hidden: Float[Array, "hidden size"], index: Array
    ) -> Float[Array, "_ size"]:
        """Run the last layer for one ordered input, whose index may be traced."""
        # Outputs lie parameter by parameter, each for all features in turn.
        groups = (-1, self.autoregressive)
        kernel = self._kernel(params, "dense_out").reshape(self.hidden_dim, *groups)[:, :, index]
        return _matmul(kernel, hidden) + params["dense_out"]["bias"].reshape(groups)[:, index, None]

    def _dense(self, params, name, columns):
        return _matmul(self._kernel(params, name), columns) + params[name]["bias"][:, None]

    def _kernel(self, params, name):
        kernel: Array = params[name]["kernel"]
        if not self.autoregressive:
            return kernel
        return jnp.where(jnp.asarray(self._mask(name)), kernel, 0)

    def _mask(self, name):
        """Return which inputs a layer's outputs may see, in natural order.

        References:
            Germain et al., MADE (2015).
        """
        ordered = self.autoregressive
        free = self.in_dim - ordered
        # a unit of degree k sees ordered inputs up to k; those of the context have degree 0
        inputs = np.concatenate([np.arange(1, ordered + 1), np.zeros(free, int)])
        # Degree 0 sees the context alone: without it the first output would not depend on it.
        least = 0 if free or ordered == 1 else 1
        # Degrees go round, so that all are equally frequent among the units.
        hidden = least + np.arange(self.hidden_dim) % (ordered - least)
        if name == "dense_in":
            return inputs[:, None] <= hidden
        if name == "dense_out":
            outputs = np.tile(np.arange(1, ordered + 1), self.out_dim // ordered)
            return hidden[:, None] < outputs
        return hidden[:, None] <= hidden


def _matmul(kernel, columns):
    """Return kernel^T columns."""
    return jax.lax.dot_general(kernel, columns, (((0,), (0,)), ((), ())))
