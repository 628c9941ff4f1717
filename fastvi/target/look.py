"""Look at a target before it is fitted.

Find the form of its loss, weigh its data, and check what both obey.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import PROGRAMS, compiler_options
from fastvi._devices import host_vector, place_like
from fastvi._errors import DataError
from fastvi._modes import their_product_eps
from fastvi._typing import Array, Batch, Given, Vector
from fastvi._vectors import Leaves
from fastvi.target.checks import (
    LossLook,
    LossPrograms,
    displacement,
    look_at_loss,
    on_host,
    take_rows,
)
from fastvi.target.data import AbstractData, Problem, default_max_batch
from fastvi.target.fingerprint import Fingerprint, fingerprint_loss, shapes_of
from fastvi.target.losses import (
    LossForm,
    Weighing,
    find_mean_weight,
    raw_examples,
    weigh_batch,
    weight_statistics,
)
from fastvi.target.narrow import narrow_dtype, spacing_seen
from fastvi.target.objective import FlatObjective, call_full_loss, value_and_grad
from fastvi.target.signature import Signature, check_loss, error_note, leading
from fastvi.target.stream import AbstractStream
from fastvi.target.work import LOSS

NARROW_EPS = 2.0**-7  # relative spacing of bfloat16, the coarsest dtype that a model computes in
# Examples on which a full-data loss is compared: all data up to there, else a sample in parts.
FULL_LOSS_EXAMPLES, FULL_LOSS_PARTS = 2048, 8
# Of a change of the loss, between a full-data loss that is given and the objective's. Twice as much
# would let a loss of other data pass more often; half would refuse means in half precision.
FULL_LOSS_MISMATCH = 0.01
WEIGHING_COST = 2 * LOSS  # sample gradients for each example: at w* and at a point near it


def look_at_target(
    objective: Given[FlatObjective],
    problem: Problem,
    stream: AbstractStream | None,
    name: str,
    *,
    budget_fge: float,
    max_batch: int | None = None,
    loss_full_flat: Callable[..., Array] | None = None,
) -> tuple[Problem, LossLook, Fingerprint]:
    """Return the problem with its data as the loss takes them, what was seen, and what it computes.

    Data are weighed where the loss is weighted, and learn how many examples a pass takes:
    `max_batch`, or what the size of an example and all that the loss computes of it allow.

    Under a trace, of jit or of data that are mapped over, only shapes are looked at.
    """
    signature = _signature(objective, problem, name)
    examples, is_weighted = problem.data.examples, signature.form is LossForm.WEIGHTED
    most = max_batch or default_max_batch(examples, signature.bytes_per_example)
    problem = dataclasses.replace(problem, data=dataclasses.replace(problem.data, max_batch=most))
    if stream is not None:
        stream.max_batch = most
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(problem))
    if is_weighted and traced:
        raise DataError(
            f"{name} returns (losses, weights), whose mean weight must be known before jit or vmap."
        )
    if is_weighted:
        problem, weighing, loss = _weigh(objective, problem, name, stream)
    else:
        weighing, loss = Weighing(), _fingerprint(objective, problem, name)
    if traced or loss.is_traced:
        return problem, LossLook(), loss
    if fingerprint_loss(objective, problem) != loss:
        raise DataError(
            f"{name} is not deterministic: traced twice, it computes different things. Draw "
            "random numbers with a "
            "fixed jax key, not with random or numpy.random, and change no state that it reads."
        )
    center, posterior = problem.posterior.center, problem.posterior
    programs = _programs(objective, problem, loss)
    look = look_at_loss(
        programs,
        host_vector(center),
        problem.data.examples,
        nbeta=float(posterior.nbeta),
        localization=float(posterior.gamma),
        resolution=_resolution(loss, center.dtype),
        weight_eps=spacing_seen(loss.uses, center),
        budget_fge=budget_fge,
        max_batch=most,
        name=name,
    )
    spent = look.sample_gradients + WEIGHING_COST * is_weighted * problem.num_data
    if loss_full_flat is not None:
        spent += _check_full_loss(programs, problem, loss_full_flat)
    look = look._replace(
        sample_gradients=spent,
        narrow_dtype=narrow_dtype(loss.uses),
        weight_error=weighing.error,
        effective_share=weighing.effective_share,
    )
    return problem, look, loss


def weigh(objective: Any, problem: Problem, name: str) -> Problem:
    """Return the problem with its data weighed, where the loss is weighted."""
    if _signature(objective, problem, name).form is not LossForm.WEIGHTED:
        return problem
    return _weigh(objective, problem, name, None)[0]


def _fingerprint(objective: Any, problem: Problem, name: str) -> Fingerprint:
    """Return what the loss computes; what differentiating it raises gets a note and passes."""
    rows = leading(raw_examples(problem.data.examples), problem.batch_size)
    with error_note(f"the gradient of {name}", rows):
        return fingerprint_loss(objective, problem)


def _weigh(
    objective: Any, problem: Problem, name: str, stream: AbstractStream | None
) -> tuple[Problem, Weighing, Fingerprint]:
    """Attach the mean weight of an example, found in one pass over all data.

    Returns:
        The problem, the weights, whose error is that of a sample where the data are one, and what
        the loss computes.
    """
    # The weight is an array of the program, so that any gives the program that all share.
    problem = _with_weight(problem, 1.0)
    loss = _fingerprint(objective, problem, name)
    source = stream or problem.data
    weigher = weigher_of(objective, problem, loss)
    weighing = find_mean_weight(weigher, problem.posterior.center, source.known_pieces(), name)
    # All data were weighed, so the mean is exact.
    if not source.is_sample:
        weighing = weighing._replace(error=0.0)
    if stream is None:
        return _with_weight(problem, weighing.mean), weighing, loss
    stream.mean_weight, stream.weight_error = weighing.mean, weighing.error
    return dataclasses.replace(problem, data=stream.window(0)), weighing, loss


def _signature(objective: Any, problem: Problem, name: str) -> Signature:
    rows = leading(problem.data.examples, problem.batch_size)
    return check_loss(objective, problem.posterior.center, rows, name)


def _with_weight(problem: Problem, mean_weight: float) -> Problem:
    examples = raw_examples(problem.data.examples)
    examples = weigh_batch(examples, mean_weight, problem.posterior.center.dtype)
    return dataclasses.replace(problem, data=dataclasses.replace(problem.data, examples=examples))


def weigher_of(
    objective: Any, problem: Problem, loss: Fingerprint
) -> Callable[[Vector, AbstractData], tuple[Array, Array, Array]]:
    """Return `(w, data) -> weight_statistics`; objectives that compute the same share it."""
    computed = loss.computed * problem.num_data
    build = functools.partial(_weigher, computed=computed)
    return PROGRAMS.find(loss, ("weigh", shapes_of(problem)), (objective,), build)


def _weigher(
    objective: Any, *, computed: float = 0.0
) -> Callable[[Vector, AbstractData], tuple[Array, Array, Array]]:
    """Compile it for a pass that computes so many bytes."""

    def of_data(w: Vector, data: AbstractData) -> tuple[Array, Array, Array]:
        return data.mean(lambda batch: weight_statistics(objective.outputs(w, batch), w.dtype))

    return jax.jit(of_data, compiler_options=compiler_options(computed))


def _check_full_loss(
    programs: LossPrograms, problem: Problem, loss_full_flat: Callable[..., Array]
) -> float:
    """Compare the full-data loss with the objective, by their change from w* to a point near it.

    Returns:
        The work, in sample gradients; that of `loss_full_flat` is not counted.

    Raises:
        DataError: If they differ by more than chance allows.
    """
    posterior, size = problem.posterior, problem.num_data
    center = np.asarray(jax.device_get(posterior.center))
    step = displacement(center, float(posterior.nbeta), float(posterior.gamma))
    points = posterior.center, jax.device_put(center + step)
    given = [
        float(call_full_loss(loss_full_flat, point, problem.data.examples)) for point in points
    ]
    # The seed is fixed, so that a loss is refused on every run or on none.
    order = np.random.default_rng(0).permutation(size)[:FULL_LOSS_EXAMPLES]
    sample = on_host(problem.data.examples, order)
    # The spread over parts is the error of a sample; no part is larger than a pass.
    count = min(size, max(FULL_LOSS_PARTS, -(-order.size // problem.data.max_batch)))
    parts = np.array_split(np.arange(order.size), count)
    changes = []
    for part in parts:
        before, after = (float(programs.loss(w, take_rows(sample, part))) for w in points)
        changes.append(after - before)
    change = float(np.average(changes, weights=[part.size for part in parts]))
    error = 0.0 if order.size == size else float(np.std(changes, ddof=1) / np.sqrt(len(changes)))
    # Both losses are sums of many terms in this dtype, and their difference is small beside them.
    rounding = 1e3 * float(jnp.finfo(posterior.center.dtype).eps) * max(map(abs, given))
    is_finite = np.isfinite(change) and all(map(np.isfinite, given))
    allowed = FULL_LOSS_MISMATCH * abs(change) + 5 * error + rounding
    if is_finite and abs(given[1] - given[0] - change) > allowed:
        raise DataError(
            "loss_full_flat is another loss than the objective: from w* to a point near it they "
            f"change by {given[1] - given[0]:.5g} and {change:.5g}. It must be the objective's "
            "mean over all data."
        )
    return 2 * LOSS * order.size


def _programs(objective: FlatObjective, problem: Problem, loss: Fingerprint) -> LossPrograms:
    """Return the loss and its gradient, compiled; objectives that compute the same share them."""

    def build(objective: Any) -> LossPrograms:
        # at two points, and on a few small batches
        computed = 4 * loss.computed * FULL_LOSS_EXAMPLES
        jit = functools.partial(jax.jit, compiler_options=compiler_options(computed))
        return LossPrograms(
            jit(lambda w, batch: value_and_grad(objective, w, batch)),
            jit(lambda w, batch: objective.loss(w, batch)),
        )

    center = problem.posterior.center
    programs = PROGRAMS.find(loss, ("look", shapes_of(problem)), (objective,), build)
    return _of_host_vectors(programs, center) if isinstance(center, Leaves) else programs


def _of_host_vectors(programs: LossPrograms, center: Leaves) -> LossPrograms:
    """Return programs on vectors of the host, whose arrays are put where those of w* lie."""

    def both(w: np.ndarray, batch: Batch) -> tuple[Array, np.ndarray]:
        value, gradient = programs.value_and_grad(place_like(center, w), batch)
        return value, host_vector(gradient)

    return LossPrograms(both, lambda w, batch: programs.loss(place_like(center, w), batch))


def _resolution(loss: Fingerprint, dtype: Any) -> float:
    """Return the relative spacing of the coarsest dtype in which the loss computes."""
    if loss.is_narrow:
        return NARROW_EPS
    eps = float(jnp.finfo(dtype).eps)
    # The precision of products is a setting of single precision alone.
    return eps if eps < 1e-10 else max(eps, their_product_eps())
