"""Compiled stages of a run: two of them hold the model, each of these once.

`anchor` evaluates every block of data at one point; `advance` moves walkers. All that sets lengths,
tolerances or budgets is an argument.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import PROGRAMS, compiler_options
from fastvi._devices import BY_WALKER, SHARED, Axes, Layout, gather, layout_in_use
from fastvi._typing import Array, Float, Int, Scalar
from fastvi.kernels.noise import normal, streams
from fastvi.sampling.dynamics import Evaluation, State, first_half_step, second_half_step
from fastvi.sampling.gradients import (
    Anchor,
    Blocks,
    block_variances,
    draw_pair,
    estimate_gradient,
    make_anchor,
)
from fastvi.sampling.settings import SamplerSettings
from fastvi.sampling.tuning import HOLD, adapt_step_size
from fastvi.sampling.virial import parameter_blocks, virial_columns
from fastvi.sampling.walkers import DEALT, Walkers, keep_walkers, move_walkers, place_walkers
from fastvi.target.data import Problem
from fastvi.target.fingerprint import Fingerprint, shapes_of
from fastvi.target.objective import FlatObjective


class Observed(NamedTuple):
    """What is averaged over the steps.

    L_n - L_n(w*), |w - w*|^2, the virial columns, and the squared width along q's low-rank
    directions, in round coordinates.
    """

    excess: Float[Array, " walkers"]
    radius2: Float[Array, " walkers"]
    core_radius2: Float[Array, " walkers"]
    virial: Float[Array, "walkers columns"]


class Record(NamedTuple):
    """What a round keeps: means over the bins of its steps.

    `llc` is of nbeta (L_n - L_n(w*)). `energy_error` is the mean square in nats^2, NaN for a bin
    without a step on the same data; `returned` the share of steps that were taken back. `noise` is
    the variance of the gradient over all round directions, as the spreads show it; `width` the root
    mean square of the positions at the end.
    """

    llc: Float[Array, "walkers bins"]
    radius2: Float[Array, "walkers bins"]
    core_radius2: Float[Array, "walkers bins"]
    virial: Float[Array, "walkers bins columns"]
    energy_error: Float[Array, " bins"]
    returned: Float[Array, " bins"]
    noise: Float[Array, " bins"]
    width: Scalar


def make_evaluate(
    objective: FlatObjective,
    problem: Problem,
    linear_map: Any,
    anchor: Anchor | None,
    reference_loss: Scalar,
    columns_fn: Callable[..., Float[Array, "walkers columns"]],
    axes: Axes = Axes(),
) -> Callable[..., Evaluation]:
    """Return `(position, blocks of each walker) -> Evaluation`."""
    posterior = problem.posterior

    def one(displacement, blocks, copies):
        found = estimate_gradient(
            objective, problem, anchor, reference_loss, displacement, blocks, copies, axes.data
        )
        # The gradient is the exact one of the surrogate, so that a step keeps that energy.
        gradient = -posterior.log_density_grad(displacement, found.gradient)
        return found, -posterior.log_density(displacement, found.surrogate), gradient

    def evaluate(position, blocks) -> Evaluation:
        displacement = linear_map.displacement(position)
        walkers = jax.vmap(functools.partial(one, copies=blocks.size))
        estimate, potential, gradient = walkers(displacement, blocks)
        columns = columns_fn(linear_map, position, displacement, gradient)
        radius2 = jnp.sum(displacement**2, axis=-1)
        core_radius2 = jnp.sum(linear_map.project(position) ** 2, axis=-1)
        observed = Observed(estimate.excess, radius2, core_radius2, columns)
        spread = estimate.spread
        if spread is not None:
            spread = linear_map.pull_back(posterior.nbeta * spread)
        found = Evaluation(potential, linear_map.pull_back(gradient), observed, spread)
        # the loss may know float64 alone
        return jax.tree_util.tree_map(lambda leaf: leaf.astype(position.dtype), found)

    return evaluate


def blank_evaluation(walkers: Walkers, columns: int, *, is_noisy: bool) -> Evaluation:
    """Return an evaluation to call step -1 with, which reads nothing of it."""
    (count, dim), dtype = walkers.position.shape, walkers.position.dtype

    def zeros(*shape: int) -> Any:
        return np.zeros((count, *shape), dtype)  # of numpy, so that nothing is compiled for it

    observed = Observed(zeros(), zeros(), zeros(), zeros(columns))
    return Evaluation(zeros(), zeros(dim), observed, zeros(dim) if is_noisy else None)


def run_steps(
    evaluate: Callable[..., Evaluation],
    walkers: Walkers,
    here: Evaluation,
    first: Int[Array, ""],
    start: Int[Array, ""],
    stop: Int[Array, ""],
    *,
    num_blocks: int,
    friction_time: Scalar,
    energy_error: Scalar,
    bins: int,
    bin_length: int,
    axes: Axes = Axes(),
) -> tuple[Walkers, Evaluation, Record]:
    """Run steps of every walker side by side, adapting one step size for all.

    Step -1 of a round moves nothing: it evaluates the walkers where they are.

    Args:
        evaluate: From `make_evaluate`.
        walkers: The walkers.
        here: What they were told where they are.
        first: Index of the round's first step in the run.
        start: The first step of the round to make.
        stop: The step to stop before.
        num_blocks: Blocks that each walker draws a pair of; it keeps it for `HOLD` steps.
        friction_time: Time after which a momentum is forgotten, in standard deviations of q.
        energy_error: Mean square of the energy error of a step, in nats^2.
        bins: Records to keep.
        bin_length: Steps averaged in each.
        axes: Of a mesh: each device has its own walkers, and all have the record of all.
    """
    held = HOLD if num_blocks > 1 else 1  # all data are the same data at every step
    dim, dtype = walkers.position.shape[1], walkers.position.dtype

    def draw_noise(index):
        block = streams.walker_noise(index)
        return jax.vmap(lambda key: normal(key, (dim,), dtype, block=block))(walkers.keys)

    def draw_blocks(index):
        counter = streams.walker_data(index // held)
        return jax.vmap(lambda key: draw_pair(key, num_blocks, counter))(walkers.keys)

    def one_step(number, carry):
        state, step_size, kept = carry
        # step -1 draws the blocks of step 0, whose first half kicks by the gradient found here
        index = first + jnp.maximum(number, 0)
        step = jnp.where(number < 0, 0, jnp.asarray(step_size.step))
        # a walker draws a block at the start of a hold, so the last step of one has the same data
        is_same_data = index % held == held - 1
        half = first_half_step(state, step, friction_time, draw_noise(index))
        there = evaluate(half.position, draw_blocks(index))
        state, info = second_half_step(state, half, there, step, is_same_data)
        # a step that was taken back says nothing of how long steps may be
        counts = (~info.is_returned).astype(dtype)
        squares = jnp.where(info.is_returned, 0.0, info.energy_error**2)
        squares, counts = gather(jnp.stack([squares, counts]), axes.walkers, axis=1)
        error = jnp.sum(squares) / jnp.maximum(jnp.sum(counts), 1)
        adapted = adapt_step_size(step_size, error, energy_error)
        # elsewhere the error is that of the change of data, of which no step size is to blame
        step_size = jax.tree_util.tree_map(
            lambda new, old: jnp.where(is_same_data & (number >= 0), new, old), adapted, step_size
        )
        error = jnp.where(is_same_data, error, jnp.nan)
        returned = info.is_returned.astype(dtype)
        values = (*state.here.observed, returned, _seen_noise(state.here), error)
        kept = tuple(
            all_steps.at[number].set(value) for all_steps, value in zip(kept, values, strict=True)
        )
        return state, step_size, kept

    # what every step says, of which bins are made at the end
    blanks = (*here.observed, here.potential, here.potential, walkers.step_size.step)
    kept = tuple(jnp.zeros((bins * bin_length, *leaf.shape), dtype) for leaf in blanks)
    state = State(walkers.position, walkers.momentum, here, walkers.owed)
    state, step_size, kept = jax.lax.fori_loop(
        start, stop, one_step, (state, walkers.step_size, kept)
    )
    moved = walkers._replace(
        position=state.position,
        momentum=state.momentum,
        excess=state.here.observed.excess,
        step_size=step_size,
        owed=state.owed,
    )
    squares = gather(jnp.mean(state.position**2, axis=1), axes.walkers)
    width = jnp.sqrt(jnp.mean(squares))
    return moved, state.here, _make_record(kept, (bins, bin_length), width, axes)


def _seen_noise(here: Evaluation) -> Float[Array, " walkers"]:
    """Return the variance of the gradient over all directions, by one draw of each walker."""
    if here.spread is None:
        return jnp.zeros_like(here.potential)
    return jnp.sum(here.spread**2, axis=-1)


def _make_record(
    kept: tuple[Array, ...], shape: tuple[int, int], width: Scalar, axes: Axes
) -> Record:
    """Average what every step said over `shape` = (bins, steps of each)."""
    *by_walker, error = (leaf.reshape(*shape, *leaf.shape[1:]) for leaf in kept)
    excess, radius2, core_radius2, virial, returned, noise = (
        gather(jnp.swapaxes(leaf.mean(1), 0, 1), axes.walkers) for leaf in by_walker
    )
    error = jnp.nanmean(error, axis=1)
    returned, noise = jnp.mean(returned, axis=0), jnp.mean(noise, axis=0)
    return Record(excess, radius2, core_radius2, virial, error, returned, noise, width)


# Draws and walkers that are placed, and anchors that are made, in one or a few runs. At half and
# double, programs compile longer and run faster, or the reverse, for twice or half as large models.
MOST_PLACED, MOST_ANCHORS = 64, 8


class SamplerPrograms(NamedTuple):
    """Compiled stages of a run.

    Attributes:
        layout: The devices that `anchor` and `advance` are divided over. Walkers are dealt out by
            it, and what all devices read is shared.
        columns: Virial columns of a record.
        place: As `place_walkers`.
        move: As `move_walkers`.
        keep: As `keep_walkers`.
        anchor: `(problem, linear_map, position, reference_loss, blocks) -> Anchor`: the loss of
            every block at one position.
        noise: As `block_variances`.
        advance: `(problem, anchor, walkers, here, reference_loss, energy_error, friction_time,
            first, start, stop) -> (Walkers, Evaluation, Record)`.
    """

    layout: Layout
    columns: int
    place: Callable[..., Walkers]
    move: Callable[..., Walkers]
    keep: Callable[..., Walkers]
    anchor: Callable[..., Anchor]
    noise: Callable[..., Float[Array, " blocks"]]
    advance: Callable[..., tuple[Walkers, Evaluation, Record]]


def sampler_programs(
    objective: Any, loss: Fingerprint, problem: Problem, settings: SamplerSettings
) -> SamplerPrograms:
    """Return the stages.

    Objectives that compute the same share them, compiled, for the same shapes and settings.
    """
    # Neighbouring leaves share a column, since each coefficient takes records to be fitted.
    parts = parameter_blocks(objective.structure.leaf_sizes, settings.max_columns)
    shaping = (parts, settings.bins, settings.bin_length)
    key = ("sampler", shaping, shapes_of(problem))
    placed = MOST_PLACED * loss.bytes_at_draw(problem.posterior.center.size, 0)
    anchored = MOST_ANCHORS * loss.computed * problem.num_data
    return PROGRAMS.find(
        loss, key, (objective,), lambda one: _build(one, placed, anchored, *shaping)
    )


def _build(
    objective: FlatObjective,
    placed: float,
    anchored: float,
    parts: tuple[int, ...],
    bins: int,
    bin_length: int,
) -> SamplerPrograms:
    """Compile for bytes that are computed where walkers are placed and moved, and for anchors."""
    columns_fn, layout = virial_columns(parts), layout_in_use()

    def anchor(problem, linear_map, position, reference_loss, blocks: Blocks):
        def stage(problem, linear_map, position, reference_loss, blocks):
            displacement = linear_map.displacement(position)
            return make_anchor(objective, problem, displacement, reference_loss, blocks, axes)

        # blocks are divided over all devices, whatever the number of walkers
        axes = layout.axes(0)
        call = layout.map(stage, axes, (SHARED,) * 5, SHARED)
        return call(problem, linear_map, position, reference_loss, blocks)

    def advance(problem, anchor, walkers: Walkers, here: Evaluation, *numbers):
        def stage(problem, anchor, walkers, here, numbers):
            reference_loss, energy_error, friction_time, *steps = numbers
            walkers, here, record = run_steps(
                make_evaluate(
                    objective, problem, walkers.linear_map, anchor, reference_loss, columns_fn, axes
                ),
                walkers,
                here,
                *steps,
                num_blocks=1 if anchor is None else anchor.rows.shape[0],
                friction_time=friction_time,
                energy_error=energy_error,
                bins=bins,
                bin_length=bin_length,
                axes=axes,
            )
            # Steps average the excess loss, of which llc is a multiple.
            llc = problem.posterior.learning_coefficient(record.llc)
            return walkers, here, record._replace(llc=llc)

        axes = layout.axes(walkers.position.shape[0])
        call = layout.map(
            stage, axes, (SHARED, SHARED, DEALT, BY_WALKER, SHARED), (DEALT, BY_WALKER, SHARED)
        )
        return call(problem, anchor, walkers, here, numbers)

    # what runs a few times compiles sooner; `advance` runs thousands of times, so it does not
    of_walkers = functools.partial(jax.jit, compiler_options=compiler_options(placed))
    return SamplerPrograms(
        layout,
        len(parts) + 2,
        of_walkers(place_walkers, static_argnames=("num_walkers",)),
        of_walkers(move_walkers),
        of_walkers(keep_walkers, static_argnames=("number", "chains")),
        jax.jit(anchor, compiler_options=compiler_options(anchored)),
        of_walkers(block_variances, static_argnames=("is_about_mean",)),
        jax.jit(advance),
    )
