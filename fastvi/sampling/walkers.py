"""Walkers from draws of q.

Where they start, what they are measured by, and their compiled stages.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import PROGRAMS, quick_compilation
from fastvi._typing import Array, Float, Int, Key, Keys, Scalar
from fastvi.evaluation.llc import EVALUATION_BLOCK
from fastvi.families.base import AbstractFamily, LinearMap
from fastvi.sampling.dynamics import (
    Record,
    Tuning,
    Walker,
    make_potential,
    refresh,
    run_steps,
    start_tuning,
)
from fastvi.sampling.gradients import Anchor, gradient_noise, make_anchor
from fastvi.target.data import Problem
from fastvi.target.fingerprint import fingerprint_loss, shapes_of
from fastvi.target.objective import FlatObjective

BINS, BIN_LENGTH = 4, 4  # records of a round, and the steps averaged in each
ROUND = BINS * BIN_LENGTH
EFFECTIVE_SHARE = 0.5  # part of q's draws that must count when walkers are chosen among them
MAX_COLUMNS = 12  # parameter blocks with a virial column of their own
WALK_BLOCK = 2**31 + 2**17  # counters of a chain's key beyond those of its evaluation


class Walk(NamedTuple):
    """Where the walkers are, and how they move."""

    linear_map: LinearMap
    walkers: Walker
    tuning: Tuning
    keys: Keys


def start_walk(
    family: AbstractFamily,
    problem: Problem,
    params: Any,
    keys: Keys,
    log_weight: Float[Array, "chains draws"],
    excess: Float[Array, "chains draws"],
    num_walkers: int,
) -> Walk:
    """Place walkers at the evaluation's draws from the q of every chain, the likelier ones under the posterior.

    Cost:
        None: the draws have been evaluated.
    """
    chains, num_draws = log_weight.shape
    per_chain = num_walkers // chains
    linear_map = _common_map(family, params)

    def chain(inputs):
        chain_params, key, weights, energies = inputs
        draws = family.sample(chain_params, key, num_draws, antithetic=True, block=EVALUATION_BLOCK)
        chosen = resample(jax.random.fold_in(key, WALK_BLOCK - 1), weights, per_chain)
        return jax.vmap(linear_map.round)(draws.displacement[chosen]), energies[chosen]

    x, energies = jax.lax.map(chain, (params, keys, log_weight, excess))
    x, energies = x.reshape(num_walkers, -1), energies.reshape(-1)
    walk_keys = jax.random.split(jax.random.fold_in(keys[0], WALK_BLOCK), num_walkers)
    return _set_off(linear_map, x, energies, walk_keys)


def move_walk(
    family: AbstractFamily,
    problem: Problem,
    params: Any,
    walk: Walk,
    center: Float[Array, " dim"],
    shift: Int[Array, ""],
) -> Walk:
    """Take walkers over to another posterior.

    To the coordinates of its q, at the points where they are.

    Args:
        family: That of the new q.
        problem: The new target.
        params: The new q's, with a leading axis of chains.
        walk: The walkers.
        center: The w* that they were about.
        shift: Distinguishes their keys from the old ones.
    """
    linear_map = _common_map(family, params)
    moved = jax.vmap(walk.linear_map.displacement)(walk.walkers.x) + (
        center - problem.posterior.center
    )
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(walk.keys, shift)
    set_off = _set_off(linear_map, jax.vmap(linear_map.round)(moved), walk.walkers.excess, keys)
    return set_off._replace(tuning=set_off.tuning._replace(step=walk.tuning.step))


def _common_map(family: AbstractFamily, params: Any) -> LinearMap:
    """Return the coordinates of the first chain's q, which all walkers share."""
    return family.linear_map(jax.tree_util.tree_map(lambda leaf: leaf[0], params))


def _set_off(
    linear_map: LinearMap, x: Float[Array, "walkers dim"], excess: Float[Array, " walkers"], keys
) -> Walk:
    """Give walkers at these points a momentum.

    Their gradients are unknown until they enter a level.
    """
    momentum = jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, WALK_BLOCK), x.shape[1:], x.dtype)
    )(keys)
    walkers = Walker(x, momentum, jnp.zeros_like(x), jnp.zeros_like(excess), excess)
    return Walk(linear_map, walkers, start_tuning(x.shape[1], x.dtype), keys)


def resample(key: Key, log_weight: Float[Array, " candidates"], num: int) -> Int[Array, " num"]:
    """Choose `num` candidates by importance weights, flattened until a good part of the candidates counts."""
    log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
    log_weight = log_weight - jnp.max(log_weight)
    powers = jnp.append(2.0 ** -jnp.arange(10), 0.0).astype(log_weight.dtype)
    flattened = jnp.where(jnp.isfinite(log_weight), powers[:, None] * log_weight, -jnp.inf)
    weights = jax.nn.softmax(flattened, axis=-1)
    effective = 1 / jnp.sum(weights**2, axis=-1)
    enough = effective >= EFFECTIVE_SHARE * log_weight.size
    level = jnp.argmax(enough.at[-1].set(True))
    return jax.random.categorical(key, flattened[level], shape=(num,))


def virial_columns(blocks: tuple[int, ...]) -> Callable[..., Float[Array, " columns"]]:
    """Return functions of mean zero under the posterior.

    `tr G - (G v) . grad(-log p)` for a few fixed G.

    G is the identity on each parameter block, and the projection on the span of q's low-rank
    directions; one more column is the slope along q's mean.

    Args:
        blocks: Lengths of the blocks, in order.
    """

    def columns(linear_map: LinearMap, displacement, gradient, x, pulled):
        own = block_virials(displacement * gradient, blocks)
        along = linear_map.basis.shape[0] - (linear_map.basis @ x) @ (linear_map.basis @ pulled)
        return jnp.stack([*own, along, linear_map.center @ gradient])

    return columns


def block_virials(work, blocks: tuple[int, ...]) -> list:
    """Return `length - sum of v * grad(-log p)` of each block, for v * grad(-log p) of shape (..., dim)."""
    ends = np.cumsum(blocks)
    return [
        length - work[..., end - length : end].sum(axis=-1)
        for length, end in zip(blocks, ends, strict=True)
    ]


def parameter_blocks(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Merge neighbouring leaves until at most `MAX_COLUMNS` are left."""
    merged = list(sizes)
    while len(merged) > MAX_COLUMNS:
        pairs = [a + b for a, b in zip(merged, merged[1:], strict=False)]
        at = int(np.argmin(pairs))
        merged[at : at + 2] = [pairs[at]]
    return tuple(merged)


class WalkPrograms(NamedTuple):
    """Compiled stages of a walk.

    Attributes:
        start: `(family, problem, params, keys, log_weight, excess, num_walkers) -> Walk`.
        move: `(family, problem, params, walk, center, shift) -> Walk`.
        noise: `(problem, linear_map, x of some walkers, reference_loss, index) -> noise of the
            gradients`.
        enter: `(problem, walk, reference_loss, index, first) -> (Anchor, Walk)`: from now on by
            these blocks.
        advance: `(problem, anchor, walk, reference_loss, energy_error, friction_time, first) ->
            (Walk, Record)`.
    """

    start: Callable[..., Walk]
    move: Callable[..., Walk]
    noise: Callable[..., Scalar]
    enter: Callable[..., tuple[Anchor, Walk]]
    advance: Callable[..., tuple[Walk, Record]]


def walk_programs(
    objective: FlatObjective, problem: Problem, blocks: tuple[int, ...]
) -> WalkPrograms:
    """Return the stages.

    Objectives that compute the same share them, compiled, for the same shapes and blocks.
    """
    key = ("walk", blocks, shapes_of(problem))
    return PROGRAMS.find(
        fingerprint_loss(objective, problem), key, (objective,), lambda one: _build(one, blocks)
    )


def _build(objective: Any, blocks: tuple[int, ...]) -> WalkPrograms:
    column_fn, jit = (
        virial_columns(blocks),
        functools.partial(jax.jit, compiler_options=quick_compilation()),
    )

    def potential(problem, walk: Walk, reference_loss):
        copies = walk.walkers.x.shape[0]
        return make_potential(objective, problem, walk.linear_map, reference_loss, copies)

    def noise(problem, linear_map, x, reference_loss, index):
        anchor = make_anchor(objective, problem, linear_map.center, reference_loss, index)
        return gradient_noise(
            objective, problem, anchor, jax.vmap(linear_map.displacement)(x), linear_map.pull_back
        )

    def enter(problem, walk: Walk, reference_loss, index, first):
        center = walk.linear_map.displacement(jnp.mean(walk.walkers.x, axis=0))
        anchor = make_anchor(objective, problem, center, reference_loss, index)
        evaluate = potential(problem, walk, reference_loss)
        return anchor, walk._replace(
            walkers=refresh(evaluate, anchor, walk.walkers, walk.keys, first)
        )

    def advance(problem, anchor, walk: Walk, reference_loss, energy_error, friction_time, first):
        walkers, tuning, record = run_steps(
            potential(problem, walk, reference_loss),
            walk.linear_map,
            anchor,
            walk.walkers,
            walk.tuning,
            walk.keys,
            first,
            functools.partial(column_fn, walk.linear_map),
            friction_time=friction_time,
            energy_error=energy_error,
            bins=BINS,
            bin_length=BIN_LENGTH,
        )
        llc = problem.posterior.learning_coefficient(record.llc)
        return walk._replace(walkers=walkers, tuning=tuning), record._replace(llc=llc)

    start = jit(start_walk, static_argnames=("num_walkers",))
    return WalkPrograms(start, jit(move_walk), jit(noise), jit(enter), jit(advance))
