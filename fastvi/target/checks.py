"""A look at the loss before anything is compiled for long.

Is it what the posterior's formula takes it for?

Two small programs, the loss with its gradient on a few rows and the loss on half of them, at w* and
at points near it. What they show is refused with what was seen, or kept as numbers that the
findings of the estimate are read from.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Array, Batch, Float
from fastvi.target.losses import (
    example_bytes,
    example_leaves,
    map_examples,
    num_examples,
    take_examples,
)
from fastvi.target.work import LOSS, Work

# The look takes at most so many sample gradients, full gradients, and parts of the budget. Half of
# any leaves the last checks out on data as small as that; twice as many are never used.
MOST_EXAMPLES, MOST_FGE, BUDGET_SHARE = 4096, 2.0, 0.05
# Examples of each of the two batches: twice as many double the cost and see more of rare rows.
HALF_ROWS = 32
# Examples, and their bytes, among which the unlike ones are chosen. Half miss kinds of rows that
# are twice as frequent; twice as many double the copy to the host.
RANKED_ROWS, RANKED_BYTES = 4096, 2**26
# Units in the last place by which sums in another order may differ: random rounding of 2^16 terms,
# at half of 2^14. At twice, a dependence on the order that is twice as strong passes.
ROUNDING_UNITS = 256
# Of a change of the loss by which its gradient may disagree, beyond the error that Simpson's rule
# shows. A wrong sign or a factor of two is off by 0.5 or more. At twice, a factor of 1.4 passes.
MISMATCH = 0.2
# Of the root mean square of w*: a displacement beyond it leaves the neighbourhood of the model. At
# half a gradient is checked closer to w*, where rounding hides more of the change.
SHARE_OF_WEIGHTS = 0.3
# How often, and by how much, the displacement is made smaller where the loss overflows.
SHRINKS, SHRINK = 3, 0.1
# Fixed, so that a loss is refused on every run or on none.
DISPLACEMENT_SEED = 0


class LossLook(NamedTuple):
    """What a look found that is not refused at once.

    Attributes:
        sample_gradients: Work: gradients of single examples, a loss counted as a third.
        weight_rounding: Nats that rounding w to the dtypes in which the loss sees it adds to nbeta
            L_n, on average.
        narrow_dtype: The half-precision type in which the loss sees parameters, if it does.
        loss_rounding: Nats of nbeta L_n that one unit in the last place of the loss stands for.
        weight_error: Relative error of the mean weight of a weighted loss, found on a sample.
        effective_share: Kish's effective sample size of the weights over the number of examples; 1
            for equal weights.
    """

    sample_gradients: float = 0.0
    weight_rounding: float = 0.0
    narrow_dtype: str | None = None
    loss_rounding: float = 0.0
    weight_error: float = 0.0
    effective_share: float = 1.0


class LossPrograms(NamedTuple):
    """Compiled: `(w, rows) -> (loss, gradient)` and `(w, rows) -> loss`."""

    value_and_grad: Callable[[Any, Batch], tuple[Array, Array | np.ndarray]]
    loss: Callable[[Any, Batch], Array]


@dataclasses.dataclass
class _Meter:
    """Evaluates the loss and counts the work; `allowed` bounds it."""

    programs: LossPrograms
    allowed: float
    spent: float = 0.0
    loss_eps: float = 0.0

    def affords(self, batch: Batch, calls: float = 1.0) -> bool:
        return self.spent + calls * num_examples(batch) <= self.allowed

    def value_and_grad(self, w: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
        self.spent += num_examples(batch)
        loss, gradient = jax.device_get(self.programs.value_and_grad(w, batch))
        self.loss_eps = float(jnp.finfo(loss.dtype).eps)
        return float(loss), np.asarray(gradient, np.float64)

    def loss(self, w: np.ndarray, batch: Batch) -> float:
        self.spent += LOSS * num_examples(batch)
        return float(jax.device_get(self.programs.loss(w, batch)))


class _Rows(NamedTuple):
    """Two batches of unlike examples, both together, and both in reverse order."""

    first: Batch
    second: Batch
    union: Batch
    reverse: Batch


def look_at_loss(
    programs: LossPrograms,
    center: Float[np.ndarray, " dim"],
    data: Batch,
    *,
    nbeta: float,
    localization: float,
    resolution: float,
    weight_eps: float | Float[np.ndarray, " dim"],
    budget_fge: float = float("inf"),
    max_batch: int = 2 * HALF_ROWS,
    name: str = "loss_fn",
) -> LossLook:
    """Evaluate the loss at w* and near it, and hold it to what an estimate takes for granted.

    It must be finite at w* with its gradient, a mean over examples, deterministic, and change as
    its gradient says.

    Args:
        programs: The loss, compiled.
        center: w*.
        data: All data, or of a stream the first window.
        nbeta: n times the inverse temperature.
        localization: Strength of the localizer.
        resolution: Relative spacing of the coarsest dtype that the loss computes in.
        weight_eps: Relative spacing of the dtype in which the loss sees each parameter.
        budget_fge: Full gradients that the estimate may take.
        max_batch: The most examples at once; of one alone, no mean can be checked.
        name: Of the function, for errors.

    Raises:
        DataError: If the loss is none that an estimate could be right for.

    Cost:
        At most 2 full gradients, 4,096 sample gradients and 5 % of the budget.
    """
    size = num_examples(data)
    allowed = min(MOST_FGE * size, MOST_EXAMPLES, BUDGET_SHARE * budget_fge * size)
    # The loss at w* itself is looked at in any case, on two rows at least.
    half = int(min(HALF_ROWS, size // 2, max_batch // 2, allowed // _FULL_COST)) or 1
    if min(size, max_batch) > 1:
        rows = _choose_rows(data, half)
    else:
        one = take_rows(on_host(data, np.arange(1)), slice(1))
        rows = _Rows(one, one, one, one)
    meter = _Meter(programs, allowed)
    tolerance = ROUNDING_UNITS * resolution
    at_center = meter.value_and_grad(center, rows.union)
    _check_finite(at_center, name)
    resolved = LossLook(loss_rounding=nbeta * float(_last_place(at_center[0], meter.loss_eps)))
    if not meter.affords(rows.union, 2.0) or num_examples(rows.union) < 2:
        return resolved._replace(sample_gradients=meter.spent)
    step = displacement(center, nbeta, localization)
    displaced, step = _find_finite(meter, center, step, rows.union)
    if displaced is not None:
        moved = center + step
        scale = max(abs(at_center[0]), abs(displaced[0]))
        # a model that interpolates has nothing but rounding for a loss at w*: the displaced one is
        # its scale
        _check_mean(meter, moved, displaced[0], rows, tolerance, tolerance * scale, name)
        _check_mean(meter, center, at_center[0], rows, tolerance, tolerance * scale, name)
        if meter.affords(rows.union):
            way = _as_seen(moved, weight_eps) - _as_seen(center, weight_eps)
            ends = at_center, displaced
            _check_gradient(meter, center, step, way, rows.union, ends, tolerance, name)
        if meter.affords(rows.union):
            _check_deterministic(meter, moved, rows.union, displaced[0], tolerance * scale, name)
        if meter.affords(rows.reverse):
            _check_order(meter, moved, rows.reverse, displaced[0], tolerance * scale, name)
    rounding = _weight_rounding(meter, center, step, rows.union, nbeta, weight_eps)
    return resolved._replace(sample_gradients=meter.spent, weight_rounding=rounding)


# w*, three times displaced, half way and two more, of two halves; four halves' losses
_FULL_COST = Work(gradients=7 * 2, losses=4).sample_gradients


def _last_place(values: Any, eps: Any) -> np.ndarray:
    """Return the distance to the next number of a dtype whose relative spacing is `eps`; 0 at 0."""
    size = np.abs(np.asarray(values, np.float64))
    return np.where(size > 0, eps * np.exp2(np.floor(np.log2(np.where(size > 0, size, 1.0)))), 0.0)


def _as_seen(points: np.ndarray, eps: Any) -> np.ndarray:
    """Round to the numbers whose relative spacing is `eps`."""
    units = _last_place(points, eps)
    scale = np.where(units > 0, units, 1.0)
    return np.round(points.astype(np.float64) / scale) * scale


def _choose_rows(data: Batch, half: int) -> _Rows:
    """Choose two batches as unlike as a cheap ranking finds.

    Padding, masks and sorted data then show.
    """
    size = num_examples(data)
    rng = np.random.default_rng(DISPLACEMENT_SEED)
    most = max(2 * half, min(RANKED_ROWS, RANKED_BYTES // max(example_bytes(data), 1)))
    candidates = np.arange(size) if size <= most else np.sort(rng.choice(size, most, replace=False))
    sample = on_host(data, candidates)
    ranks = [np.argsort(_row_sums(leaf), kind="stable") for leaf in example_leaves(sample)]
    # Each array takes turns to name its lowest and highest row, so that none decides alone.
    low: list[int] = []
    high: list[int] = []
    for place in range(candidates.size):
        for order in ranks:
            for chosen, other, at in ((low, high, place), (high, low, -1 - place)):
                row = int(order[at])
                if len(chosen) < half and row not in chosen and row not in other:
                    chosen.append(row)
        if len(low) == len(high) == half:
            break
    both = [*low, *high]
    return _Rows(*(take_rows(sample, chosen) for chosen in (low, high, both, both[::-1])))


def _row_sums(leaf: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):  # a sum that overflows is as good for a rank
        return np.real(leaf).astype(np.float32).reshape(leaf.shape[0], -1).sum(axis=1)


def on_host(data: Batch, rows: np.ndarray) -> Batch:
    """Copy rows to the host: there choosing among them compiles nothing."""
    if rows.size == num_examples(data):
        return map_examples(lambda leaf: jax.device_get(leaf)[rows], data)
    index = jnp.asarray(rows)
    return map_examples(lambda leaf: jax.device_get(jnp.take(leaf, index, axis=0)), data)


def take_rows(sample: Batch, rows: Any) -> Batch:
    """Move rows of a sample on the host, a slice or a list of their numbers, to the device."""
    return jax.device_put(take_examples(sample, rows))


def displacement(
    center: Float[np.ndarray, " dim"], nbeta: float, localization: float
) -> Float[np.ndarray, " dim"]:
    """Return a random step as long as the posterior is wide where the loss curves by about one."""
    # The posterior of a loss with curvature h has the variance 1 / (nbeta h + localization).
    width = 1 / np.sqrt(nbeta + localization)
    values = np.asarray(center, np.float64)
    typical = np.sqrt(np.mean(values**2))
    if typical > 0:
        width = min(width, SHARE_OF_WEIGHTS * typical)
    noise = np.random.default_rng(DISPLACEMENT_SEED).standard_normal(values.size)
    return (width * noise).astype(center.dtype)


def _find_finite(
    meter: _Meter, center: np.ndarray, step: np.ndarray, batch: Batch
) -> tuple[Any, np.ndarray]:
    """Evaluate at the displaced point, at a nearer one where the loss overflows.

    None where all of them do.
    """
    for _ in range(SHRINKS):
        found = meter.value_and_grad(center + step, batch)
        if _is_finite(found):
            return found, step
        if not meter.affords(batch):
            break
        step = (step * SHRINK).astype(step.dtype)
    return None, step


def _is_finite(found: tuple[float, np.ndarray]) -> bool:
    return bool(np.isfinite(found[0]) and np.all(np.isfinite(found[1])))


def _check_finite(found: tuple[float, np.ndarray], name: str) -> None:
    value, gradient = found
    if not np.isfinite(value):
        raise DataError(
            f"{name} is {value} at w* itself. The estimate needs a finite loss there: look for "
            "log(0), 0/0 or an overflow on these data, and check that params are the trained ones."
        )
    bad = int(np.sum(~np.isfinite(gradient)))
    if bad:
        raise DataError(
            f"the gradient of {name} at w* is not finite in {bad} of {gradient.size} parameters, "
            f"though the loss is {value:.4g}. Look for sqrt, norm or log at 0, or a where() whose "
            "unused branch is not finite."
        )


def _check_deterministic(
    meter: _Meter, w: np.ndarray, batch: Batch, before: float, tolerance: float, name: str
) -> None:
    again = meter.value_and_grad(w, batch)[0]
    if not abs(again - before) <= tolerance:
        raise DataError(
            f"{name} is not deterministic: the same parameters and batch gave {before:.7g}, then "
            f"{again:.7g}. Switch off dropout and noise (evaluation mode), or fix their random key."
        )


def _check_mean(
    meter: _Meter,
    w: np.ndarray,
    together: float,
    rows: _Rows,
    relative: float,
    least: float,
    name: str,
) -> None:
    """Compare a batch with its two halves.

    A mean over examples is the mean of both, but for rounding.
    """
    if not meter.affords(rows.union, LOSS):
        return
    first, second = meter.loss(w, rows.first), meter.loss(w, rows.second)
    mean, tolerance = (
        0.5 * (first + second),
        max(least, relative * max(abs(first), abs(second), abs(together))),
    )
    # An overflow near w* says nothing of the form of the loss.
    if not np.isfinite(mean) or abs(together - mean) <= tolerance:
        return
    _check_deterministic(meter, w, rows.union, together, tolerance, name)  # noise fails here too
    half = num_examples(rows.first)
    seen = (
        f"{name} is not a mean over the examples of the batch: {half} examples gave {first:.6g}, "
        f"{half} others {second:.6g}, all {2 * half} together {together:.6g} and not {mean:.6g}."
    )
    if abs(together - (first + second)) <= tolerance:
        raise DataError(
            f"{seen} It is their sum. Divide by the number of examples, or return one loss for "
            "each."
        )
    raise DataError(
        f"{seen} Examples must not weigh each other: for masks, padding and class weights return "
        "(losses, weights), batch axis first; use batch statistics and dropout in evaluation mode; "
        "a contrastive loss needs its negatives inside each example."
    )


def _check_order(
    meter: _Meter, w: np.ndarray, reverse: Batch, before: float, tolerance: float, name: str
) -> None:
    turned = meter.value_and_grad(w, reverse)[0]
    if np.isfinite(turned) and abs(turned - before) > tolerance:
        raise DataError(
            f"{name} depends on the order of the examples: a batch gave {before:.7g}, in reverse "
            f"order {turned:.7g}. It must be a mean over examples: is noise or a weight drawn by "
            "the position in the batch?"
        )


def _check_gradient(
    meter: _Meter,
    center: np.ndarray,
    step: np.ndarray,
    way: np.ndarray,
    batch: Batch,
    ends: tuple[tuple[float, np.ndarray], tuple[float, np.ndarray]],
    tolerance: float,
    name: str,
) -> None:
    """Compare the change of the loss with its gradient's integral on the way, by Simpson's rule.

    `way` is the step as the loss sees it: rounding takes much of it from large weights, and all of
    it where a model in half precision does not resolve it.
    """
    middle = meter.value_and_grad(center + step / 2, batch)
    if not _is_finite(middle):
        return
    at_center, displaced = ends
    ends_and_middle = at_center, middle, displaced
    slopes = [float(gradient @ way) for _, gradient in ends_and_middle]
    change = displaced[0] - at_center[0]
    simpson = (slopes[0] + 4 * slopes[1] + slopes[2]) / 6
    trapezoid = (slopes[0] + slopes[2]) / 2
    # Where the slope is smooth, Simpson's rule errs by less than the two rules differ.
    noise = tolerance * max(abs(value) for value, _ in ends_and_middle)
    allowed = MISMATCH * max(abs(change), abs(simpson)) + 4 * abs(simpson - trapezoid) + noise
    if abs(simpson - change) > allowed:
        raise DataError(
            f"the gradient of {name} disagrees with the loss: from w* to a point near it the loss "
            f"changes by {change:.4g}, and its gradient says {simpson:.4g}. Check the gradient "
            "that is given (its sign, its scale, a mean over the same examples), custom "
            "derivatives, stop_gradient and rounding inside the loss."
        )


def _weight_rounding(
    meter: _Meter, center: np.ndarray, step: np.ndarray, batch: Batch, nbeta: float, eps: Any
) -> float:
    """Return nbeta/2 E[r' H r] for the rounding errors r of w.

    The errors are uniform over a unit in the last place.
    `r' H r` is read off gradients at `w* +- c r`, with c such that the points lie as far as the
    displaced one.
    """
    if not meter.affords(batch, 2.0):
        return 0.0
    # The mean over random signs is that of independent errors: the diagonal of H (Hutchinson).
    units = _last_place(center, eps)
    direction = units * np.random.default_rng(DISPLACEMENT_SEED + 1).choice([-1.0, 1.0], units.size)
    length = float(np.linalg.norm(direction))
    if length == 0:
        return 0.0
    # One unit in the last place is too short a way for a difference of two gradients.
    factor = max(1.0, float(np.linalg.norm(step.astype(np.float64))) / length)
    ahead, behind = (center + (s * factor * direction).astype(center.dtype) for s in (1.0, -1.0))
    (_, up), (_, down) = (meter.value_and_grad(point, batch) for point in (ahead, behind))
    curvature = float((up - down) @ direction) / (2 * factor)
    # An error that is uniform over one unit has the variance 1/12.
    return nbeta / 2 * max(curvature, 0.0) / 12 if np.isfinite(curvature) else 0.0
