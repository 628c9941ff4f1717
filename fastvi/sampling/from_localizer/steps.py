"""The compiled steps of walkers on fresh minibatches."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fastvi._compilation import PROGRAMS, QUICK_BYTES, compiler_options
from fastvi._devices import (
    BY_WALKER,
    SHARED,
    AbstractLayout,
    Axes,
    DividedLayout,
    Layout,
    gather,
    layout_for,
)
from fastvi._typing import Array, Float, Int, Keys, Scalar, Vector, Vectors
from fastvi._vectors import Leaves, scale_rows, shape_of, sum_rows
from fastvi.kernels.noise import normal, normal_stretch, streams
from fastvi.sampling.dynamics import Evaluation, State, first_half_step, second_half_step
from fastvi.sampling.from_localizer.batches import AbstractSource
from fastvi.target.data import Problem
from fastvi.target.fingerprint import Fingerprint, shapes_of
from fastvi.target.losses import by_kind, take_examples
from fastvi.target.objective import FlatObjective, value_and_grad
from fastvi.target.posterior import LocalPosterior

# Dimension up to which walkers step side by side. Beyond, each fills the processor by itself, and
# a step of one in place has an eighth of the temporaries; at half and double: the same.
LARGEST_SIDE_BY_SIDE = 2**19


class Observed(NamedTuple):
    """What a batch says of a walker's position, for each walker, and step by step in a record.

    Attributes:
        excess: L_B(w) - L_B(w*), both on the same examples.
        reference: L_B(w*).
        radius2: |w - w*|^2.
        virial: (w - w*) . grad of -log p.
    """

    excess: Float[Array | np.ndarray, "*shape"]
    reference: Float[Array | np.ndarray, "*shape"]
    radius2: Float[Array | np.ndarray, "*shape"]
    virial: Float[Array | np.ndarray, "*shape"]


class Steps(NamedTuple):
    """What a round keeps of each step; `returned` of those that were taken back."""

    observed: Observed
    returned: Float[Array | np.ndarray, "steps walkers"]


class RoundInputs(NamedTuple):
    """What all steps of a round read.

    Attributes:
        posterior: The target.
        scale: What one unit of each round coordinate is in model coordinates.
        source: Gives the examples.
        anchor: Gradient of L_n at w*, where batches are anchored there; None where they are not.
        keys: One for each walker.
        parts: Parts of a batch.
    """

    posterior: LocalPosterior
    scale: Vector
    source: AbstractSource
    anchor: Vector | None
    keys: Keys
    parts: Int[Array, ""]


class MinibatchPrograms(NamedTuple):
    """Compiled; where no batch is anchored, one program that holds the model.

    Attributes:
        layout: The devices that `advance` is divided over.
        advance: `(inputs, state, step_size, friction_time, first, start, stop) -> (State, Steps)`.
            A round of steps from `start` to `stop`; step -1 evaluates the walkers where they are,
            on the batch of step `first`. It uses up the state.
        full_gradient: `(problem) -> gradient` of L_n at w*, for an anchor.
        length: Steps of a round, at most.
    """

    layout: AbstractLayout
    advance: Any
    full_gradient: Any
    length: int


def evaluate_minibatches(
    objective: FlatObjective,
    inputs: RoundInputs,
    position: Vectors,
    step: Int[Array, ""],
    some: Int[Array, " some"] | slice = slice(None),
    axis: str | None = None,
) -> Evaluation:
    """Evaluate each walker, or `some` of those that have keys, on its batch of this step.

    Devices along `axis` divide the examples of a part, or the parts where these do not divide.

    The loss at w* on the same examples is taken off, which leaves the noise of a difference. With
    an anchor, the gradient at w* on the same examples is taken off too, and the anchor put in its
    place: that of all data. The loss follows: less the slope that was taken off, which has mean
    zero over batches that the position does not depend on.

    Cost:
        For each example a gradient, and a loss; with an anchor, two gradients.
    """
    posterior, scale, source, anchor, keys, parts = inputs
    center, displacement = posterior.center, scale * position
    radius2 = sum_rows(displacement**2)

    def one(x, batch):
        v = scale * x
        loss, slope = value_and_grad(objective, center + v, batch)
        if anchor is None:
            reference = objective.loss(center, batch)
            return loss - reference, reference, slope
        reference, own = value_and_grad(objective, center, batch)
        tilt = anchor - own
        return loss - reference + tilt @ v, reference, slope + tilt

    devices = 1 if axis is None else jax.lax.axis_size(axis)
    column = 0 if axis is None else jax.lax.axis_index(axis)
    share, divides = source.part_size // devices, source.part_size % devices == 0
    # this device's parts: all, or each `devices`-th
    place, stride = (0, 1) if divides else (column, devices)
    turns = parts if divides else (parts - column + devices - 1) // devices

    def add(part, total):
        # without the barrier XLA holds the parameters of a walker from before the loop on
        part, at = jax.lax.optimization_barrier((part, position))
        rows = source.rows(keys, step, place + part * stride, parts)[some]
        if divides:
            rows = jax.lax.dynamic_slice_in_dim(rows, column * share, share, axis=1)
        batches = take_examples(source.examples, rows)
        found = jax.vmap(one, in_axes=(0, by_kind(batches, 0, None)))(at, batches)
        # losses of half precision are summed in that of the parameters
        return jax.tree_util.tree_map(lambda a, b: a + b.astype(a.dtype), total, found)

    zeros = jnp.zeros_like(radius2)
    blank = jax.tree_util.tree_map(jnp.zeros_like, position)
    sums = jax.lax.fori_loop(0, turns, add, (zeros, zeros, blank))
    excess, reference, slope = jax.tree_util.tree_map(lambda leaf: leaf / parts, sums)
    if axis is not None:
        mean = jax.lax.pmean if divides else jax.lax.psum
        excess, reference, slope = mean((excess, reference, slope), axis)
    # without the barrier XLA holds the displacement through the loop
    slope, at = jax.lax.optimization_barrier((slope, position))
    gradient = scale * -jax.vmap(posterior.log_density_grad)(scale * at, slope)
    virial = sum_rows(position * gradient)
    observed = Observed(excess, reference, radius2, virial)
    potential = -jax.vmap(posterior.log_density)(displacement, excess)
    return Evaluation(potential, gradient, observed)


def blank_state(
    shape: tuple[int, int], dtype: np.dtype, layout: AbstractLayout = Layout()
) -> State:
    """Return walkers at w* without momentum, and nothing evaluated, on the devices of a layout."""

    def vectors() -> Vectors:
        if not isinstance(layout, DividedLayout):
            return _zeros(shape, dtype)
        places = layout.of_rows(shape[0])
        return Leaves(tuple(_zeros(of_array, dtype, place) for of_array, place in places))

    # each an array of its own, since a donated one may be given once alone
    position, momentum, gradient = (vectors() for _ in range(3))
    potential, *each = (_zeros(shape[:1], dtype) for _ in range(5))
    state = State(position, momentum, Evaluation(potential, gradient, Observed(*each)))
    return layout.deal(state, shape[0])


def blank(rows: Vectors) -> Vectors:
    """Return zeros in the place of vectors, which are used up."""

    def of_array(array: Array) -> Array:
        shape, dtype, sharding = array.shape, array.dtype, array.sharding
        array.delete()
        return _zeros(shape, dtype, sharding)

    return jax.tree_util.tree_map(of_array, rows)


def fill(rows: Vectors, by: Iterable[Any]) -> Vectors:
    """Return vectors that come from the host one by one in the place of others, which are used up.

    Those of a model that is divided come array by array, each as an iterable of them.
    """
    for walker, row in enumerate(by):
        # rows that wait for the device are held on the host
        rows = jax.block_until_ready(put_row(rows, np.int32(walker), row))
    return rows


def put_row(rows: Vectors, walker: Any, row: Any) -> Vectors:
    """Put the vector of one walker, on the host, in its place among vectors that are used up."""
    if not isinstance(rows, Leaves):
        return _put_row(rows, walker, row)
    arrays = []
    for array, values in zip(rows.arrays, row.arrays, strict=True):
        # to its own place first: an array of the host would be put on every device whole
        place = NamedSharding(array.sharding.mesh, PartitionSpec(*array.sharding.spec[1:]))
        arrays.append(_put_divided_row(array, walker, jax.device_put(values, place)))
    return Leaves(tuple(arrays))


@functools.partial(jax.jit, donate_argnames=("rows",))
def _put_row(rows: Array, walker: Any, row: Any) -> Array:
    return rows.at[walker].set(row)


@functools.partial(jax.jit, donate_argnames=("rows",))
def _put_divided_row(rows: Array, walker: Any, row: Any) -> Array:
    # a choice, of each device for its own walkers: nothing is passed
    return jnp.where(jnp.arange(rows.shape[0]).reshape(-1, *(1,) * row.ndim) == walker, row, rows)


@functools.partial(jax.jit, donate_argnames=("rows",))
def add_multiples(rows: Vectors, factors: Float[Array, " walkers"], others: Vectors) -> Vectors:
    """Add to each vector a multiple of another, in the place of those that are used up."""
    return rows + scale_rows(factors.astype(rows.dtype), others)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: Any = None) -> Float[Array, "*shape"]:
    # nothing is compiled for it; zeros that nobody has written take no memory on the host
    return jax.device_put(np.zeros(shape, dtype), device, may_alias=False)


def minibatch_programs(
    objective: Any, loss: Fingerprint, posterior: LocalPosterior, source: Any, length: int
) -> MinibatchPrograms:
    """Return the programs, shared by objectives that compute the same."""
    layout = layout_for(posterior.center)
    key = ("minibatches", length, shapes_of((posterior, source)), layout)

    def build(objective: FlatObjective) -> MinibatchPrograms:
        def full_gradient(problem: Problem):
            center = problem.posterior.center
            mean = problem.data.mean(lambda batch: value_and_grad(objective, center, batch)[1])
            return layout.hold(mean, Axes())

        # it runs once, on data whose number is not known here
        quick = jax.jit(full_gradient, compiler_options=compiler_options(QUICK_BYTES))
        return MinibatchPrograms(layout, _advance(objective, length, layout), quick, length)

    return PROGRAMS.find(loss, key, (objective,), build)


def _advance(objective: FlatObjective, length: int, layout: AbstractLayout) -> Any:
    @functools.partial(jax.jit, donate_argnames=("state",))
    def advance(
        inputs: RoundInputs,
        state: State,
        step_size: Scalar,
        friction_time: Scalar,
        first: Int[Array, ""],
        start: Int[Array, ""],
        stop: Int[Array, ""],
    ) -> tuple[State, Steps]:
        axes = layout.axes(shape_of(state.position)[0])
        stage = functools.partial(_run_round, objective, length, layout, axes)
        spread = layout.map(stage, axes, (SHARED, BY_WALKER, SHARED), (BY_WALKER, SHARED))
        return spread(inputs, state, (step_size, friction_time, first, start, stop))

    return advance


def _run_round(
    objective: FlatObjective,
    length: int,
    layout: AbstractLayout,
    axes: Axes,
    inputs: RoundInputs,
    state: State,
    numbers: tuple[Scalar, Scalar, Int[Array, ""], Int[Array, ""], Int[Array, ""]],
) -> tuple[State, Steps]:
    """Make steps of the walkers of this device; all devices have the record of all."""
    step_size, friction_time, first, start, stop = numbers
    (walkers, dim), dtype = shape_of(state.position), state.position.dtype
    # the numbers of the walkers, whose keys all devices have
    place = 0 if axes.walkers is None else jax.lax.axis_index(axes.walkers) * walkers
    own = place + jnp.arange(walkers)

    def one_step(number, carry):
        state, kept = carry
        # step -1 evaluates: it has no length, and writes where step 0 writes next
        index, at = first + jnp.maximum(number, 0), jnp.maximum(number, 0)
        size = jnp.where(number < 0, 0, step_size)
        move = functools.partial(_move, objective, layout, inputs, index, size, friction_time, axes)
        if dim > LARGEST_SIDE_BY_SIDE:
            state, returned = _move_in_turn(move, state, own)
        else:
            state, returned = move(slice(None) if axes.walkers is None else own, state)
        said = Steps(state.here.observed, returned)
        state = layout.hold(state, axes)
        return state, jax.tree_util.tree_map(lambda a, b: a.at[at].set(b), kept, said)

    blank = Steps(state.here.observed, jnp.zeros(walkers, dtype))
    kept = jax.tree_util.tree_map(lambda leaf: jnp.zeros((length, *leaf.shape), dtype), blank)
    state, kept = jax.lax.fori_loop(start, stop, one_step, (state, kept))
    return state, jax.tree_util.tree_map(lambda leaf: gather(leaf, axes.walkers, axis=1), kept)


def _move(
    objective: FlatObjective,
    layout: AbstractLayout,
    inputs: RoundInputs,
    index: Int[Array, ""],
    step_size: Scalar,
    friction_time: Scalar,
    axes: Axes,
    some: Int[Array, " some"] | slice,
    state: State,
) -> tuple[State, Float[Array, " some"]]:
    """Make step `index` of some walkers, whose states these are; say which were taken back."""
    dtype, keys = state.position.dtype, inputs.keys[some]
    noise = _draw_noise(layout, keys, state.position, streams.walker_noise(index))
    half = first_half_step(state, step_size, friction_time, noise)
    there = evaluate_minibatches(objective, inputs, half.position, index, some, axes.data)
    state, info = second_half_step(state, half, there, step_size, is_same_data=False)
    return state, info.is_returned.astype(dtype)


def _draw_noise(
    layout: AbstractLayout, keys: Keys, like: Vectors, block: Int[Array, ""]
) -> Vectors:
    """Draw standard normals for each key: the same numbers however parameters lie."""
    dtype = like.dtype
    if not isinstance(layout, DividedLayout) or not isinstance(like, Leaves):
        shape = like.shape[1:]
        return jax.vmap(lambda key: normal(key, shape, dtype, block=block))(keys)
    # arrays that lie alike are drawn together, as each loop of the hash is compiled for itself
    alike: dict[Any, list[int]] = {}
    places = streams.stretches(map(math.prod, layout.shapes))
    for number, (page, _) in enumerate(places):
        alike.setdefault((page, layout.shapes[number], layout.specs[number]), []).append(number)
    arrays: list[Any] = [None] * len(places)
    for (page, shape, _), members in alike.items():
        draw = functools.partial(normal_stretch, shape=shape, dtype=dtype, block=block, page=page)
        starts = jnp.asarray([places[number][1] for number in members], jnp.uint32)
        of_walkers = jax.vmap(lambda key, start, draw=draw: draw(key, start=start), (0, None))
        drawn = jax.vmap(of_walkers, (None, 0))(keys, starts)
        for place, number in enumerate(members):
            arrays[number] = drawn[place]
    return Leaves(tuple(arrays))


def _move_in_turn(
    move: Callable, state: State, numbers: Int[Array, " walkers"]
) -> tuple[State, Float[Array, " walkers"]]:
    """Make a step of one walker after the other, in place: the memory of one step."""

    def one(walker, carry):
        row = jax.tree_util.tree_map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, walker, 1), carry[0]
        )
        return jax.tree_util.tree_map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, walker, 0),
            carry,
            move(numbers[walker][None], row),
        )

    (count, _), dtype = shape_of(state.position), state.position.dtype
    return jax.lax.fori_loop(0, count, one, (state, jnp.zeros(count, dtype)))
