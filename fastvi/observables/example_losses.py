"""Losses of single examples at points of the posterior."""

from typing import Any

import jax

from fastvi._typing import Array, Batch, Float
from fastvi.target.data import Problem
from fastvi.target.losses import by_kind, map_examples


def losses_by_example(
    objective: Any, problem: Problem, displacement: Float[Array, "draws dim"]
) -> Float[Array, "draws examples"]:
    """Evaluate the loss of each example of the problem's data, one draw after the other.

    Their mean over the examples is the loss of the data: of a weighted loss each has its share.
    """

    def at(v: Array) -> Array:
        point = problem.posterior.center + v

        def of_batch(batch: Batch) -> Array:
            found = objective.example_losses(point, batch)
            return _one_by_one(objective, point, batch) if found is None else found

        return problem.data.each(of_batch)

    return jax.lax.map(at, displacement)


def _one_by_one(objective: Any, point: Array, batch: Batch) -> Float[Array, " batch"]:
    """Evaluate the mean loss of each example as a batch of one."""

    def one(example: Batch) -> Array:
        return objective.loss(point, map_examples(lambda leaf: leaf[None], example))

    return jax.vmap(one, in_axes=(by_kind(batch, 0, None),))(batch)
