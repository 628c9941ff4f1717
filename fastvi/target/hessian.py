"""Products with the Hessian of a mean loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fastvi._modes import their_products
from fastvi._typing import Array, Batch, Float
from fastvi.target.data import AbstractData
from fastvi.target.objective import FlatObjective

# What jax raises where it has no rule for a derivative.
NO_DERIVATIVE = (TypeError, ValueError, NotImplementedError)


def data_hvp(
    objective: FlatObjective, w: Float[Array, " dim"], data: AbstractData, copies: int = 1
) -> Callable[[Float[Array, " dim"]], Float[Array, " dim"]]:
    """Return `tangent -> H tangent` with H the Hessian of the mean loss of all examples.

    Args:
        objective: The loss.
        w: Where the Hessian is taken.
        data: The examples.
        copies: How many tangents a vmap pushes through side by side.

    Cost:
        2 gradients of the data per tangent; 3 where one pass does not take all examples.
    """
    # One linearisation serves all tangents; slices are linearised anew for each.
    if data.fits_a_pass(copies):
        return hvp_operator(objective, w, data.examples)
    return lambda tangent: data.mean(
        lambda batch: hvp_operator(objective, w, batch)(tangent), copies=copies
    )


def hvp_operator(
    objective: FlatObjective, w: Float[Array, " dim"], batch: Batch
) -> Callable[[Float[Array, " dim"]], Float[Array, " dim"]]:
    """Return `tangent -> H tangent` with H the Hessian of the batch's mean loss at `w`.

    Forward over reverse where the gradient allows it; reverse over reverse, as for losses with a
    custom VJP; where jax knows no second derivative, central differences of the gradient. An
    abstract evaluation tells which. The gradient is linearised once, so many tangents share one
    primal evaluation.

    Cost:
        2 gradients of the batch per tangent.
    """
    with their_products():
        return _product(lambda point: objective.grad(point, batch), w)


def _product(gradient: Callable, w: Float[Array, " dim"]) -> Callable:
    """Return the derivative of the gradient at `w`, in whichever way it has one."""
    try:
        push = jax.linearize(gradient, w)[1]
        # only a batch of tangents finds a function with a VJP alone
        jax.eval_shape(jax.vmap(push), w[None])
    except NO_DERIVATIVE:
        jax.eval_shape(gradient, w)  # which raises again what the loss itself raises
    else:
        return push
    try:
        pull = jax.vjp(gradient, w)[1]
        jax.eval_shape(jax.vmap(pull), w[None])
    except NO_DERIVATIVE:
        return their_products()(lambda tangent: _gradient_difference(gradient, w, tangent))
    return their_products()(lambda tangent: pull(tangent)[0])


def _gradient_difference(
    gradient: Callable, w: Float[Array, " dim"], tangent: Float[Array, " dim"]
):
    """Return `H tangent` by a central difference.

    Its step is the cube root of the precision, relative to the coordinates that it moves, where
    errors of rounding and of the third derivative balance.
    """
    relative: Array = jnp.linalg.norm(tangent / jnp.maximum(jnp.abs(w), 1.0))
    # The product with a tangent of zero is zero, whatever the step is.
    step = jnp.cbrt(jnp.finfo(w.dtype).eps).astype(w.dtype) / jnp.where(relative > 0, relative, 1.0)
    return (gradient(w + step * tangent) - gradient(w - step * tangent)) / (2 * step)
