"""What llc has of products of matrices that keep few digits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import PROGRAMS
from fastvi._modes import exact_products, their_product_eps
from fastvi._typing import Scalar, Vectors
from fastvi._vectors import Leaves
from fastvi.evaluation.llc import losses_at
from fastvi.target.data import Problem
from fastvi.target.fingerprint import Fingerprint, shapes_of
from fastvi.target.losses import take_examples
from fastvi.target.objective import FlatObjective

# Examples that the two losses are compared on. They are paired: half gives twice the variance of a
# difference that is the same for most.
COMPARED_EXAMPLES = 1024


def nats_of_rounded_products(
    objective: FlatObjective,
    loss: Fingerprint,
    problem: Problem,
    displacement: Callable[[], Vectors],
) -> float:
    """Return what the rounding of a model's products adds to llc where walkers are.

    Accelerators by default multiply matrices of single precision with 11 or 8 bits. The errors of
    layers that multiply are proportional to what they cancel, and square in the loss. They are not
    of the model, and a walk among them samples a rougher loss.

    Args:
        objective: The loss.
        loss: What it computes.
        problem: The target.
        displacement: Gives w - w* of the walkers; not called where products are exact.

    Returns:
        The mean over walkers of nbeta (L(w) - L(w*)) as the model multiplies, less the same with
        all digits. 0 where it keeps them.

    Cost:
        Two losses of `COMPARED_EXAMPLES` examples for each walker; none where products are exact.
    """
    if not their_product_eps():
        return 0.0

    def build(objective: Any) -> tuple[Any, Any]:
        def excess(problem: Problem, v: Vectors) -> Scalar:
            rows = jnp.arange(min(COMPARED_EXAMPLES, problem.data.num_examples))
            batch = take_examples(problem.data.examples, rows)
            if isinstance(v, Leaves):  # which are many, so that one walker comes after another
                center = problem.posterior.center
                losses = jax.lax.map(lambda one: objective.loss(center + one, batch), v)
                return jnp.mean(losses - objective.loss(center, batch))
            return jnp.mean(losses_at(objective, problem.posterior.center, v, batch).excess)

        # two functions, as one would be traced once for both
        return jax.jit(excess), jax.jit(functools.partial(excess))

    v = displacement()
    key = ("products", shapes_of((problem, v)))
    theirs, exact = PROGRAMS.find(loss, key, (objective,), build)
    seen = float(theirs(problem, v))
    with exact_products():
        right = float(exact(problem, v))
    return float(np.asarray(problem.posterior.nbeta)) * (seen - right)
