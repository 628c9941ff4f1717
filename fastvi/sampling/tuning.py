"""The plan of a run, chosen by small pure functions of measured numbers.

*Noise bias* is what noise of the gradient estimate would add to llc. *Effective dimensions* are
twice the llc: a quadratic loss has that llc in as many dimensions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Bool, Float, Int, Scalar
from fastvi.sampling.gradients import blocks_left_out
from fastvi.sampling.settings import SamplerSettings

# Steps that a walker keeps its pair of blocks. With two, every other step has the same potential at
# both ends, so that its energy error is its own; with one, no step size could be tuned; with four,
# the noise bias doubles.
HOLD = 2
# First step size, times dim^(-1/4): the scaling at constant energy error in a round Gaussian. Half
# or double is mended by adaptation within ten steps.
FIRST_STEP = 0.3
# Bounds on what one step changes of the step size. Tighter ones delay adaptation.
SHRINK, GROW = 0.8, 1.1
# Width, in units of log error, of the log-normal window that outliers of the energy error fall out
# of: 6 x 1.5, as in blackjax's adjusted MCLMC. Half drops ordinary errors, double keeps outliers.
WINDOW = 9.0
# Steps that the running mean of the energy error covers, at first and at most. Half follows
# changes sooner and is noisier by 1.4.
FIRST_MEMORY, LAST_MEMORY = 20.0, 100.0
# Nats, and one for each dimension, at which a step is taken back. At home, errors are a small part
# of d, so half or double takes back the same steps: a wall shows orders of magnitude more.
RUNAWAY_ENERGY = 1e3
# Share of the energy along the noise that friction takes off in a step, in the mean, at most. At
# half, blocks are twice as large where steps are long; at double, rare large draws are owed too
# long, and a fifth of what noise heats is left (linear network 10-10-10, n = 1e4).
MOST_BALANCED = 0.4
# Relative error of llc that the settings are made for.
USUAL_ERROR = 0.02
# Effective dimensions, at least, for each dimension. Below it, a llc near zero would stop walkers.
LEAST_EFFECTIVE = 0.1
# A refinement allows this part of the bias that was seen, and this part of the energy error. The
# bias of a step grows as the cube root of its energy error, so that eight halves it.
LESS_NOISE, LESS_ENERGY_ERROR = 4, 8


class Fidelity(NamedTuple):
    """How exact the dynamics are.

    `num_blocks` is the number of blocks of data that gradients are estimated from, one means all
    data at once. `energy_error` is the mean square of a step's energy error, in nats^2 per
    effective dimension.
    """

    num_blocks: int
    energy_error: float


class Heat(NamedTuple):
    """What the noise of gradients would add to llc: the part that friction balances, the rest."""

    balanced: float = 0.0
    left: float = 0.0


class StepSize(NamedTuple):
    """The step size with the running means that set it."""

    step: Scalar
    total: Scalar
    weight: Scalar
    count: Int[Array, ""]


def first_step_size(dim: int, dtype) -> StepSize:
    """Return the step size before the first step."""
    return fresh_step_size(_put(FIRST_STEP * dim**-0.25, dtype))


def fresh_step_size(step: Scalar) -> StepSize:
    """Begin the running means anew at a step size."""
    zero, small = _put(0.0, step.dtype), _put(1e-6, step.dtype)
    return StepSize(step, zero, small, _put(0, np.int32))


def step_size_after(change: float, step_size: StepSize) -> StepSize:
    """Return the step size for an energy error that is `change` times as large.

    The mean square of the energy error grows as the sixth power of the step size.
    """
    longer = float(step_size.step) * change ** (1 / 6)
    return fresh_step_size(_put(longer, step_size.step.dtype))


def _put(value: float, dtype: Any) -> Array:
    """Return a number on the device; nothing is compiled for it."""
    return jax.device_put(np.asarray(value, dtype))


def adapt_step_size(step_size: StepSize, error: Scalar, target: Scalar) -> StepSize:
    """Move the step size to where the mean square of the energy error meets the target.

    Args:
        step_size: The step size, at which `error` was made.
        error: Mean square of the energy errors of one step, in nats^2.
        target: What it should be.

    References:
        Robnik & Seljak, Fluctuation without dissipation (2023).
    """
    ratio = jnp.minimum(error / target, 1e6) + 1e-8
    weight = jnp.exp(-0.5 * (jnp.log(ratio) / WINDOW) ** 2)
    memory = jnp.minimum(FIRST_MEMORY + step_size.count, LAST_MEMORY)
    decay = (memory - 1) / (memory + 1)
    # the sixth power relates errors that were made at different step sizes
    total = decay * step_size.total + weight * ratio / step_size.step**6
    weights = decay * step_size.weight + weight
    wanted = (total / weights) ** (-1 / 6)
    step = jnp.clip(wanted, SHRINK * step_size.step, GROW * step_size.step)
    dtype = step_size.step.dtype
    return StepSize(
        step.astype(dtype), total.astype(dtype), weights.astype(dtype), step_size.count + 1
    )


def is_rounding(error: float, of_shorter: float, ratio: float) -> bool:
    """Say whether the energy errors of steps are those of rounding, which shorter steps leave.

    The mean square falls as the sixth power of the step size where the loss is smooth, as the
    third at kinks, and as the first at most where it is made of steps: fewer of these are crossed.

    Args:
        error: Mean square of the energy errors, in nats^2.
        of_shorter: That of shorter steps.
        ratio: Their size over that of the others.
    """
    return bool(of_shorter > error * ratio**2 > 0)


def is_runaway(
    error: Float[Array, " walkers"], kick: Float[Array, " walkers"], dim: int
) -> Bool[Array, " walkers"]:
    """Say which steps are to be taken back: their energy error and their kick are out of bounds.

    Args:
        error: Energy errors, in nats; one that is not finite is always out of bounds.
        kick: Energy of the kick that ends each step, infinite where the error alone decides.
        dim: Dimension of the positions.
    """
    bound = RUNAWAY_ENERGY + dim
    return ~((jnp.minimum(jnp.abs(error), kick) < bound) & jnp.isfinite(error))


def noise_bias(variance: Any, step: Any, friction_time: Any) -> Any:
    """Return what gradient noise adds to llc: `step variance friction_time / 2`.

    Noise of this variance, held for `HOLD` steps, adds `HOLD step variance friction_time / 2` to
    the mean squares of the positions, summed over directions; half of that is llc.

    Args:
        variance: Of the gradient in round coordinates, over draws of the data: in a direction, or
            summed over all.
        step: Step size.
        friction_time: Time after which a momentum is forgotten.
    """
    return HOLD * variance * step * friction_time / 4


def plan_heat(variance: float, step: float, friction_time: float) -> Heat:
    """Return the heat of gradient noise of this variance, as friction along draws balances it."""
    bias = noise_bias(variance, step, friction_time)
    balanced = min(1.0, most_balanced_variance(step) / max(variance, 1e-300))
    return Heat(balanced * bias, (1 - balanced) * bias)


def most_balanced_variance(step: float) -> float:
    """Return the variance of the gradient, over all directions, up to which it is balanced."""
    return MOST_BALANCED / (HOLD * step**2)


def max_blocks_within(variance: float, per_block: float, counts: tuple[int, ...]) -> int:
    """Return the most blocks with which the gradient has no more than this variance.

    Args:
        variance: The variance that it may have.
        per_block: The variance that it has for each block of data that a pair leaves out.
        counts: The numbers of blocks to choose from, most first; the last where none does.
    """
    fitting = (count for count in counts if per_block * blocks_left_out(count) <= variance)
    return next(fitting, counts[-1])


def plan_friction_time(
    width: float, allowed_bias: float, bias_per_time: float, settings: SamplerSettings
) -> float:
    """Return the friction time: what it takes to cross the posterior as wide as it has been seen.

    It is less where noise would add more than is allowed, and never less than for a posterior as
    wide as q.

    Args:
        width: Root mean square of the positions: 1 where the posterior is as wide as q.
        allowed_bias: What noise may add to llc.
        bias_per_time: What it adds for each unit of friction time.
        settings: For the friction time at width 1, and the widest posterior that is followed.
    """
    cool = allowed_bias / max(bias_per_time, 1e-30)
    longest = min(width, settings.widest, cool / settings.friction_time)
    return settings.friction_time * max(1.0, longest)


def effective_dimensions(llc: float, dim: int) -> float:
    """Return twice the llc, within `LEAST_EFFECTIVE * dim` and `dim`."""
    return float(np.clip(2 * llc, LEAST_EFFECTIVE * dim, dim))


def plan_energy_error(relative_error: float, settings: SamplerSettings) -> float:
    """Return the energy error of averaged steps: their bias, its cube root, follows the error."""
    scaled = settings.precise_energy_error * (relative_error / USUAL_ERROR) ** 3
    return min(settings.energy_error, scaled)


def refine(fidelity: Fidelity, most_blocks: int) -> Fidelity:
    """Return a more exact fidelity: no more blocks than these, and steps of half the bias."""
    return Fidelity(
        min(fidelity.num_blocks, most_blocks), fidelity.energy_error / LESS_ENERGY_ERROR
    )


def plan_walkers(left: float, fixed: float, each: float, most: int, fewest: int) -> int:
    """Return how many walkers the budget pays for, 0 where it does not pay for the fewest.

    Args:
        left: What is left of the budget.
        fixed: What a short run costs without any walker.
        each: What it costs for each walker.
        most: Walkers at hand.
        fewest: The answer is a multiple of this.
    """
    payable = int((left - fixed) / each + 1e-9)  # rounding must not lose the last walker
    return max(0, min(most, payable - payable % fewest))
