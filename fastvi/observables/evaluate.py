"""What is evaluated at draws: energies, losses of examples, and observables."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastvi._compilation import PROGRAMS
from fastvi._modes import call_in_their_modes
from fastvi._typing import Array, Float, PyTree, Scalar
from fastvi.observables.example_losses import losses_by_example
from fastvi.sampling.ensemble import Target
from fastvi.sampling.gradients import excess_and_grad
from fastvi.target.data import Problem
from fastvi.target.fingerprint import shapes_of


class Energies(NamedTuple):
    """Of each draw: n beta (L_n(w) - L_n(w*)), its derivative along w - w*, and |w - w*|^2."""

    llc: Float[Array, " draws"]
    slope: Float[Array, " draws"]
    radius2: Float[Array, " draws"]


def energies_at(target: Target) -> Callable[[Problem, Scalar, Float[Array, "draws dim"]], Energies]:
    """Return `(problem, L_n(w*), displacement) -> Energies`, compiled.

    Cost:
        A gradient on all data for each draw.
    """

    def build(objective: Any) -> Callable[..., Energies]:
        def at_draws(problem: Problem, reference: Scalar, displacement: Array) -> Energies:
            def at(v):
                excess, slope = excess_and_grad(objective, problem, v, reference)
                return excess, v @ slope

            excess, slope = jax.lax.map(at, displacement)
            nbeta = problem.posterior.nbeta
            return Energies(nbeta * excess, nbeta * slope, jnp.sum(displacement**2, axis=1))

        return jax.jit(at_draws)

    key = ("energies", shapes_of(target.problem))
    return PROGRAMS.find(target.loss, key, (target.objective,), build)


def example_losses_at(target: Target, problem: Problem) -> Callable[[Problem, Array], Array]:
    """Return `(problem, displacement) -> losses`, compiled for data of this problem's shapes.

    Cost:
        A loss of each example for each draw.
    """

    def build(objective: Any) -> Callable[..., Array]:
        return jax.jit(lambda problem, v: losses_by_example(objective, problem, v))

    key = ("example losses", shapes_of(problem))
    return PROGRAMS.find(target.loss, key, (target.objective,), build)


def observable_at(
    function: Callable[[PyTree, Any], Any], as_passed: Callable[[Array], PyTree]
) -> Callable[[Array, Any], Array]:
    """Return `(displacement, data) -> values`, compiled, of a function of parameters and data."""

    @jax.jit
    def at_draws(displacement: Array, data: Any) -> Array:
        def at(v):
            return jnp.asarray(call_in_their_modes(function, as_passed(v), data))

        return jax.lax.map(at, displacement)

    return at_draws
