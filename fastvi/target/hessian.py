"""Products with the Hessian of a mean loss, in whichever way it has a second derivative."""

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fastvi._modes import their_products
from fastvi._typing import Array, Batch, Float, Scalar
from fastvi.target.data import AbstractData
from fastvi.target.losses import take_examples
from fastvi.target.objective import FlatObjective

# What jax raises where it has no rule for a derivative.
NO_DERIVATIVE = (TypeError, ValueError, NotImplementedError)


# Steps that differences are tried with: so many times the cube root of the precision, at which
# errors of rounding and of the third derivative balance where parameters and their effects are of
# size one. The shortest are for parameters that act a thousand times as strongly, the longest for
# gradients with an error of a thousandth, such as those of a solver.
STEPS = tuple(8.0**power for power in range(-3, 3))


class SecondDerivative(enum.Enum):
    """How products with the Hessian are found."""

    FORWARD = "derivatives of the gradient, forwards"
    REVERSE = "derivatives of the gradient, backwards"
    DIFFERENCES = "differences of gradients"


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
    few = take_examples(data.examples, slice(1))
    if second_derivative(objective, w, few) is SecondDerivative.DIFFERENCES:
        # one step for all slices
        return _differences(
            lambda point: data.mean(lambda batch: objective.grad(point, batch), copies=copies), w
        )
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
        2 gradients of the batch per tangent; differences take 12 more, to find their step.
    """
    with their_products():
        return _product(lambda point: objective.grad(point, batch), w)[1]


def second_derivative(
    objective: FlatObjective, w: Float[Array, " dim"], batch: Batch
) -> SecondDerivative:
    """Say how products with the Hessian are found, by an abstract evaluation."""
    found = []

    def look(point: Array) -> Array:
        found.append(_product(lambda at: objective.grad(at, batch), point)[0])
        return point

    with their_products():
        jax.eval_shape(look, w)
    return found[-1]


def _product(
    gradient: Callable, w: Float[Array, " dim"]
) -> tuple[SecondDerivative, Callable[[Float[Array, " dim"]], Float[Array, " dim"]]]:
    """Return the derivative of the gradient at `w`, and in which way it has one."""
    try:
        push = jax.linearize(gradient, w)[1]
        # only a batch of tangents finds a function with a VJP alone
        jax.eval_shape(jax.vmap(push), w[None])
    except NO_DERIVATIVE:
        jax.eval_shape(gradient, w)  # which raises again what the loss itself raises
    else:
        return SecondDerivative.FORWARD, push
    try:
        pull = jax.vjp(gradient, w)[1]
        jax.eval_shape(jax.vmap(pull), w[None])
    except NO_DERIVATIVE:
        return SecondDerivative.DIFFERENCES, _differences(gradient, w)
    return SecondDerivative.REVERSE, their_products()(lambda tangent: pull(tangent)[0])


def _differences(gradient: Callable, w: Float[Array, " dim"]) -> Callable:
    """Return `tangent -> H tangent` by central differences, with a step that is checked."""
    step = their_products()(find_step)(gradient, w)
    return their_products()(lambda tangent: _difference(gradient, w, tangent, step))


def find_step(gradient: Callable, w: Float[Array, " dim"]) -> Scalar:
    """Return the step at which differences of the gradient depend on it the least.

    Below it they are rounding, or the error of a gradient that is itself approximate; above it,
    what the curvature changes on the way. It is the length of the way, relative to the coordinates
    that it moves, and lies between those two of `STEPS` in a row whose differences along one random
    direction agree best.

    Cost:
        12 gradients.
    """
    signs = jax.random.rademacher(jax.random.key(0), w.shape, w.dtype)
    direction = signs * jnp.maximum(jnp.abs(w), 1.0)
    steps = jnp.cbrt(jnp.finfo(w.dtype).eps).astype(w.dtype) * jnp.asarray(STEPS, w.dtype)
    found = jax.lax.map(lambda step: _difference(gradient, w, direction, step), steps)
    length = jnp.linalg.norm(found, axis=1)
    apart = jnp.linalg.norm(found[1:] - found[:-1], axis=1) / (length[1:] + length[:-1])
    # a loss that does not curve has two products of zero, and one that overflows has none
    apart = jnp.where(length[1:] + length[:-1] == 0, 0.0, apart)
    best = jnp.argmin(jnp.where(jnp.isfinite(apart), apart, jnp.inf))
    return jnp.sqrt(steps[best] * steps[best + 1])


def _difference(
    gradient: Callable, w: Float[Array, " dim"], tangent: Float[Array, " dim"], step: Scalar
) -> Float[Array, " dim"]:
    """Return `H tangent` by a central difference."""
    relative: Array = jnp.linalg.norm(tangent / jnp.maximum(jnp.abs(w), 1.0))
    # The product with a tangent of zero is zero, whatever the step is.
    step = step / jnp.where(relative > 0, relative, 1.0)
    return (gradient(w + step * tangent) - gradient(w - step * tangent)) / (2 * step)
