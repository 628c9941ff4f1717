"""The loss of a torch module as jax differentiates it: once in reverse, and forward over that.

The first derivative is one callback, in which torch runs forward and backward. For a loss per
example the callback takes the seeds of a mean for granted, and its gradient is scaled afterwards;
a second one runs only where the seeds are others. The derivative of the gradient is torch's double
backward.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fastvi._errors import UnavailableError
from fastvi.integrations.torch.host import Host

Arrays = tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses(host: Host, flat: jax.Array, batch: Arrays) -> Arrays:
    """Return what the loss returns: the mean, or losses, or losses and weights."""
    return _call(host, "values", _outputs(host, batch), flat, *batch)


def _forward(host: Host, flat: jax.Array, batch: Arrays) -> tuple[Arrays, Any]:
    *outputs, slope = _with_slope(host, flat, batch)
    weights = outputs[1] if host.tried.form.is_weighted else None
    return tuple(outputs), (flat, batch, jax.lax.stop_gradient(slope), slope, weights)


def _backward(host: Host, residuals: Any, cotangents: Arrays) -> tuple[jax.Array, None]:
    flat, batch, known, slope, weights = residuals
    seeds = cotangents[0]
    if host.tried.form.of_example is None:
        return seeds.astype(slope.dtype) * slope, None
    usual = jnp.full_like(seeds, 1 / seeds.size) if weights is None else weights
    return _pull(host, flat, known, seeds, usual, batch), None


losses.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_slope(host: Host, flat: jax.Array, batch: Arrays) -> Arrays:
    return _call(host, "slope", (*_outputs(host, batch), flat), flat, *batch)


@_with_slope.defjvp
def _with_slope_jvp(host: Host, primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
    (flat, batch), tangent = primals, tangents[0]
    shapes = (*_outputs(host, batch), flat)
    return _with_slope(host, flat, batch), _call(host, "turn", shapes, flat, tangent, *batch)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pull(
    host: Host,
    flat: jax.Array,
    slope: jax.Array,
    seeds: jax.Array,
    usual: jax.Array,
    batch: Arrays,
) -> jax.Array:
    return _call(host, "pull", (flat,), flat, slope, seeds, usual, *batch)[0]


@_pull.defjvp
def _pull_jvp(host: Host, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    flat, _, seeds, _, batch = primals
    tangent, _, change, *_ = tangents
    turned = _call(host, "turn_pull", (flat,), flat, seeds, tangent, change, *batch)[0]
    return _pull(host, *primals), turned


@jax.custom_jvp
def fixed(array: jax.Array) -> jax.Array:
    """Return an array of data, by which the loss has no derivative."""
    return array


@functools.partial(fixed.defjvp, symbolic_zeros=True)
def _fixed_jvp(primals: Any, tangents: Any) -> Any:
    if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
        raise UnavailableError(
            "a torch loss is differentiated by its parameters alone, and this derivative is by "
            "its data. Differentiate by params."
        )
    return primals[0], tangents[0]


def _outputs(host: Host, batch: Arrays) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shapes of what the loss returns."""
    form = host.tried.form
    shape = () if form.of_example is None else (batch[0].shape[0], *form.of_example)
    one = jax.ShapeDtypeStruct(shape, jnp.dtype(form.dtype))
    return (one, one) if form.is_weighted else (one,)


def _call(host: Host, method: str, like: Any, *arrays: Any) -> Arrays:
    """Call a method of the host from a program of jax."""
    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in like]
    found = jax.pure_callback(getattr(host, method), shapes, *arrays, vmap_method="expand_dims")
    return tuple(found)
