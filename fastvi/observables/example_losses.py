"""Losses of single examples, and of their tokens, at points of the posterior."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fastvi._errors import DataError
from fastvi._typing import Array, Batch, Float
from fastvi.target.data import Problem
from fastvi.target.losses import WeightedBatch, by_kind, map_examples


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


def losses_by_token(
    objective: Any, problem: Problem, displacement: Float[Array, "draws dim"]
) -> Float[Array, "draws examples *tokens"]:
    """Evaluate the loss of each token of the problem's data, one draw after the other.

    Their mean over the tokens of an example is what `losses_by_example` has, and their mean over
    all tokens the loss of the data. Weights multiply: of `(losses, weights)` the loss of a token is
    `weight * loss` over the mean weight of a token, and one that is masked has 0.

    Raises:
        DataError: If the loss has no axis of tokens.
    """

    def at(v: Array) -> Array:
        point = problem.posterior.center + v
        return problem.data.each(lambda batch: _of_tokens(objective, point, batch))

    return jax.lax.map(at, displacement)


def _of_tokens(objective: Any, point: Array, batch: Batch) -> Float[Array, "..."]:
    """Evaluate the losses of the tokens of a batch, shape (batch, tokens...)."""
    value = objective.outputs(point, batch)
    is_weighted = isinstance(batch, WeightedBatch)
    losses = jnp.asarray(value[0] if is_weighted else value, point.dtype)
    if losses.ndim < 2:
        raise DataError(
            "token_losses are of a loss that returns one number for each token, an array of shape "
            f"(batch, tokens); this one returns an array of shape {losses.shape}. Name the data in "
            "losses."
        )
    if not is_weighted:
        return losses
    weights = jnp.asarray(value[1], point.dtype)
    # of all data's mean weight of an example, a token has its share
    share = math.prod(losses.shape[1:]) * batch.inverse_mean_weight.astype(point.dtype)
    return losses * weights * share.reshape(-1, *(1,) * (losses.ndim - 1))


def some_of(problem: Problem, start: Array, size: int) -> Problem:
    """Return the problem with so many of its examples, from one on."""
    data = problem.data
    some = map_examples(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), data.examples)
    return dataclasses.replace(problem, data=dataclasses.replace(data, examples=some))


def _one_by_one(objective: Any, point: Array, batch: Batch) -> Float[Array, " batch"]:
    """Evaluate the mean loss of each example as a batch of one."""

    def one(example: Batch) -> Array:
        return objective.loss(point, map_examples(lambda leaf: leaf[None], example))

    return jax.vmap(one, in_axes=(by_kind(batch, 0, None),))(batch)
