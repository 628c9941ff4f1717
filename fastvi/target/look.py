"""Look at a target before it is fitted.

Find the form of its loss, weigh its data, and check what both obey.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fastvi._compilation import PROGRAMS, quick_compilation
from fastvi._errors import DataError
from fastvi._typing import Array, Batch, Float, Given
from fastvi.target.checks import (
    LossLook,
    LossPrograms,
    displacement,
    look_at_loss,
    on_host,
    take_rows,
)
from fastvi.target.data import Problem
from fastvi.target.fingerprint import Fingerprint, fingerprint_loss, shapes_of
from fastvi.target.losses import LossForm, first_rows, num_examples, weigh_batch, weigh_data
from fastvi.target.objective import (
    EVALUATION_CHUNK,
    FlatObjective,
    TreeObjective,
    call_full_loss,
    check_loss,
    value_and_grad,
)
from fastvi.target.stream import AbstractStream
from fastvi.target.work import LOSS

NARROW = re.compile(r"\b(bf16|f16|f8_\w+|f4_\w+)\[")  # dtypes as jaxprs write them
NARROW_EPS = 2.0**-7  # of bfloat16
ACCELERATOR_EPS = 2.0**-10  # single-precision products are rounded so on GPUs and TPUs by default
FULL_LOSS_EXAMPLES, FULL_LOSS_PARTS = (
    2048,
    8,
)  # on which it is compared: all data up to there, else a sample in parts
FULL_LOSS_MISMATCH = (
    0.01  # of a change of the loss, between a full-data loss that is given and the objective's
)


def look_at_target(
    objective: Given[FlatObjective],
    problem: Problem,
    stream: AbstractStream | None,
    name: str,
    *,
    budget_fge: float,
    loss_full_flat: Callable[..., Array] | None = None,
) -> tuple[Problem, LossLook]:
    """Return the problem, its data weighed where the loss is weighted, and what was seen.

    Under a trace, of jit or of data that are mapped over, only shapes are looked at.
    """
    form = check_loss(
        objective, problem.posterior.center, first_rows(problem.data, problem.batch_size), name
    )
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(problem))
    passes = 0.0
    if form is LossForm.WEIGHTED:
        if traced:
            raise DataError(
                f"{name} returns (losses, weights), whose mean weight must be known before jit or "
                "vmap."
            )
        problem, passes = _weigh(objective, problem, stream, name), LOSS
    loss = fingerprint_loss(objective, problem)
    if traced or loss.is_traced:
        return problem, LossLook()
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
        center,
        problem.data,
        nbeta=float(posterior.nbeta),
        localization=float(posterior.gamma),
        resolution=_resolution(objective, center, first_rows(problem.data, problem.batch_size)),
        weight_eps=_weight_eps(objective, center),
        budget_fge=budget_fge,
        name=name,
    )
    spent = look.sample_gradients + passes * problem.num_data
    if loss_full_flat is not None:
        spent += _check_full_loss(programs, problem, loss_full_flat)
    return problem, look._replace(sample_gradients=spent)


def weigh_other_data(objective: Any, center: Float[Array, " dim"], data: Batch, name: str) -> Batch:
    """Return other data as the loss takes them, with their own mean weight where it is weighted."""
    if check_loss(objective, center, data, name) is not LossForm.WEIGHTED:
        return data
    return _weigh_held(objective, center, data, name)


def _weigh_held(objective: Any, center: Float[Array, " dim"], data: Batch, name: str) -> Batch:
    return weigh_batch(
        data, weigh_data(objective.outputs, center, _chunks(data), name), center.dtype
    )


def _weigh(objective: Any, problem: Problem, stream: Any, name: str) -> Problem:
    """Attach the mean weight of an example to the data, found in one pass."""
    center = problem.posterior.center
    if stream is None:
        return dataclasses.replace(problem, data=_weigh_held(objective, center, problem.data, name))
    stream.mean_weight = weigh_data(objective.outputs, center, stream.chunks(), name)
    return dataclasses.replace(problem, data=stream.window(0))


def _chunks(data: Batch) -> Iterator[tuple[Batch, int]]:
    size = num_examples(data)
    for start in range(0, size, EVALUATION_CHUNK):
        stop = min(size, start + EVALUATION_CHUNK)
        yield (
            jax.tree_util.tree_map(lambda leaf, at=slice(start, stop): leaf[at], data),
            stop - start,
        )


def _check_full_loss(
    programs: LossPrograms, problem: Problem, loss_full_flat: Callable[..., Array]
) -> float:
    """Compare the change of the full-data loss from w* to a point near it with that of the objective.

    Returns:
        The work, in sample gradients; that of `loss_full_flat` is not counted.

    Raises:
        DataError: If they differ by more than chance allows.
    """
    posterior, size = problem.posterior, problem.num_data
    points = (
        posterior.center,
        posterior.center
        + displacement(posterior.center, float(posterior.nbeta), float(posterior.gamma)),
    )
    given = [float(call_full_loss(loss_full_flat, point, problem.data)) for point in points]
    order = np.random.default_rng(0).permutation(size)[:FULL_LOSS_EXAMPLES]
    sample, parts = (
        on_host(problem.data, order),
        np.array_split(np.arange(order.size), min(FULL_LOSS_PARTS, size)),
    )
    changes = []
    for part in parts:
        rows = take_rows(sample, part)
        changes.append(
            float(programs.loss(points[1], rows)) - float(programs.loss(points[0], rows))
        )
    weights = np.array([part.size for part in parts])
    change = float(np.average(changes, weights=weights))
    is_all = order.size == size
    error = 0.0 if is_all else float(np.std(changes, ddof=1) / np.sqrt(len(changes)))
    rounding = 1e3 * float(jnp.finfo(posterior.center.dtype).eps) * max(map(abs, given))
    if not np.isfinite(change) or not all(map(np.isfinite, given)):
        return 2 * LOSS * order.size
    if abs(given[1] - given[0] - change) > FULL_LOSS_MISMATCH * abs(change) + 5 * error + rounding:
        raise DataError(
            "loss_full_flat is another loss than the objective: from w* to a point near it they "
            "change by "
            f"{given[1] - given[0]:.5g} and {change:.5g}. It must be the objective's mean over "
            "all data."
        )
    return 2 * LOSS * order.size


def _programs(objective: FlatObjective, problem: Problem, loss: Fingerprint) -> LossPrograms:
    """Return the loss and its gradient, compiled; objectives that compute the same share them."""

    def build(objective: Any) -> LossPrograms:
        jit = functools.partial(jax.jit, compiler_options=quick_compilation())
        return LossPrograms(
            jit(lambda w, batch: value_and_grad(objective, w, batch)),
            jit(lambda w, batch: objective.loss(w, batch)),
        )

    return PROGRAMS.find(loss, ("look", shapes_of(problem)), (objective,), build)


def _resolution(objective: FlatObjective, center: Float[Array, " dim"], batch: Batch) -> float:
    """Return the relative spacing of the coarsest dtype in which the loss computes."""
    if NARROW.search(str(jax.make_jaxpr(objective.loss)(center, batch))):
        return NARROW_EPS
    eps = float(jnp.finfo(center.dtype).eps)
    return eps if jax.default_backend() == "cpu" or eps < 1e-10 else ACCELERATOR_EPS


def _weight_eps(
    objective: FlatObjective, center: Float[Array, " dim"]
) -> float | Float[np.ndarray, " dim"]:
    """Return the relative spacing of each parameter as the model sees it."""
    eps = float(jnp.finfo(center.dtype).eps)
    if not isinstance(objective, TreeObjective):
        return eps
    structure = objective.structure
    dtypes = [dtype for dtype in structure.dtypes if dtype is not None]
    narrow = [
        max(eps, float(jnp.finfo(dtype).eps)) if dtype.itemsize <= 2 else eps for dtype in dtypes
    ]
    return np.repeat(narrow, structure.leaf_sizes)
