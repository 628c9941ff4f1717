"""Monotone rational-quadratic splines with identity tails.

References:
    Durkan et al., Neural Spline Flows (2019).
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Array
from fastvi.flows.elementwise.base import AbstractElementwise


class Bin(NamedTuple):
    """The bin that holds a number.

    The first axis of corner and sides is that of inputs, then outputs.

    Attributes:
        corner: Its left and lower edge.
        sides: Its width and height.
        raw_start: Raw derivative at its left end.
        raw_end: Raw derivative at its right end.
    """

    corner: Array
    sides: Array
    raw_start: Array
    raw_end: Array

    @property
    def numbers(self) -> tuple[Array, Array, Array, Array, Array, Array]:
        """Return left, bottom, width, height and the raw derivatives."""
        return (
            self.corner[0],
            self.corner[1],
            self.sides[0],
            self.sides[1],
            self.raw_start,
            self.raw_end,
        )


class RationalQuadratic(AbstractElementwise):
    """Rational-quadratic spline on [-tail_bound, tail_bound], the identity outside.

    Raw parameters: `num_bins` logits of widths, as many of heights, and `num_bins` - 1 of the
    derivatives at inner knots; the derivative is 1 at the ends, so that the map is continuously
    differentiable.

    Attributes:
        num_bins: Bins.
        tail_bound: Half the length of the interval.
        min_bin_width: Least width of a bin, as a fraction of the interval.
        min_bin_height: Least height of a bin, as a fraction of the interval.
        min_derivative: Least derivative at a knot.
        max_derivative: Greatest derivative at a knot.
    """

    num_bins: int = eqx.field(static=True, default=8)
    tail_bound: float = eqx.field(static=True, default=5.0)
    min_bin_width: float = eqx.field(static=True, default=1e-2)
    min_bin_height: float = eqx.field(static=True, default=1e-2)
    min_derivative: float = eqx.field(static=True, default=1e-2)
    max_derivative: float = eqx.field(static=True, default=10.0)

    def __check_init__(self):
        if self.num_bins < 1:
            raise ConfigError(f"num_bins must be at least 1, not {self.num_bins}.")
        if self.tail_bound <= 0:
            raise ConfigError(f"tail_bound must be positive, not {self.tail_bound}.")
        for name in ("min_bin_width", "min_bin_height"):
            least = getattr(self, name)
            if not 0 < least * self.num_bins < 1:
                raise ConfigError(
                    f"{name} times num_bins must lie between 0 and 1, for the bins to fit in the "
                    f"interval; it is {least} times {self.num_bins}."
                )
        if not 0 < self.min_derivative < 1 < self.max_derivative:
            raise ConfigError(
                "min_derivative and max_derivative must be positive and enclose 1, the derivative "
                f"of the identity; they are {self.min_derivative} and {self.max_derivative}."
            )

    @property
    def num_params(self):
        """Count widths, heights and inner derivatives."""
        return 3 * self.num_bins - 1

    @property
    def unit_logit(self) -> float:
        """Return the raw derivative that stands for 1."""
        return float(np.log((1 - self.min_derivative) / (self.max_derivative - 1)))

    def identity(self):
        """Return equal bins with derivatives of 1."""
        raw = np.zeros(self.num_params)
        raw[2 * self.num_bins :] = self.unit_logit
        return raw

    def seen(self, features):
        """Return features cut to the interval.

        Far outside they would saturate a network, and its splines collapse.
        """
        return jnp.clip(features, -self.tail_bound, self.tail_bound)

    def forward(self, raw, x, gate):
        """Return y and log dy/dx."""
        return self._apply(False, raw, x, gate)

    def inverse(self, raw, y, gate):
        """Return x and log dx/dy."""
        return self._apply(True, raw, y, gate)

    def _apply(self, backward, raw, x, gate):
        # Raw parameters are mixed, not images: the result is a spline too, which has an inverse.
        if gate is not None:
            identity = jnp.asarray(self.identity(), raw.dtype)[:, None, None]
            raw = (1 - gate) * identity + gate * raw
        # outside the interval the map is the identity; 0 stands in there so that nothing is NaN
        inside = jnp.abs(x) <= self.tail_bound
        y, log_slope = _spline(self, backward, raw, jnp.where(inside, x, 0))
        return jnp.where(inside, y, x), jnp.where(inside, log_slope, 0)


def _map_inside(spline, backward, raw, x) -> tuple[Array, Array]:
    """Map x, inside the interval, forward or back; return the image and the log of the slope."""
    return _spline_fwd(spline, backward, raw, x)[0]


_spline = jax.custom_vjp(_map_inside, nondiff_argnums=(0, 1))


def _spline_fwd(spline, backward, raw, x):
    found, index, log_sums = _search(spline, backward, raw, x)
    return _curve(spline, backward, *found.numbers, x), (raw, x, found, index, log_sums)


def _spline_bwd(spline, backward, kept, cotangents):
    """Pull back to x and to the arrays of the bin, then to all raw parameters in one pass.

    The rule that JAX derives from the loop over bins is 10 times as slow.
    """
    raw, x, found, index, log_sums = kept
    bins, bound = spline.num_bins, spline.tail_bound
    _, pull = jax.vjp(functools.partial(_curve, spline, backward), *found.numbers, x)
    *bars, start_bar, end_bar, x_bar = pull(cotangents)
    factors = []
    for axis, least in enumerate((spline.min_bin_width, spline.min_bin_height)):
        # Derivatives by log weights: by that of the bin itself, by those before it, and by all.
        here = (found.sides[axis] - 2 * bound * least) * bars[2 + axis]
        before = 2 * bound * (1 - bins * least) * bars[axis]
        every = -(found.corner[axis] + bound * (1 - 2 * least * index)) * bars[axis] - here
        factors.append((here, before, every, log_sums[axis]))
    *stored, start_bar, end_bar, index = _stored(
        [*factors[0], *factors[1], start_bar, end_bar, index]
    )
    here, before, every, log_sums = (
        jnp.stack(pair)[:, None] for pair in zip(stored[:4], stored[4:], strict=True)
    )

    numbers = jnp.arange(bins, dtype=x.dtype)[:, None, None]
    weights = jnp.exp(_logits(raw, bins) - log_sums)
    logits_bar = weights * (every + jnp.where(numbers < index, before, 0)) + jnp.where(
        numbers == index, here, 0
    )
    # An inner knot ends one bin and starts the next.
    inner = numbers[1:]
    derivatives_bar = jnp.where(inner == index, start_bar, 0) + jnp.where(
        inner == index + 1, end_bar, 0
    )
    return jnp.concatenate([logits_bar.reshape(2 * bins, *x.shape), derivatives_bar]), x_bar


_spline.defvjp(_spline_fwd, _spline_bwd)


def _stored(arrays):
    """Return the arrays as they are, by a product with the identity matrix.

    XLA fuses a product neither into what comes before nor into what follows. Without it XLA
    evaluates each array anew for each of the bins. An optimization_barrier is gone before fusion on
    CPU.
    """
    stack = jnp.stack(arrays)
    flat = jnp.matmul(
        jnp.eye(len(stack), dtype=stack.dtype), stack.reshape(len(stack), -1), precision="highest"
    )
    return list(flat.reshape(stack.shape))


def _curve(spline, backward, left, bottom, width, height, raw_start, raw_end, x):
    """Map x by the curve of its bin, forward or back."""
    # derivatives lie between the least and the greatest, smoothly in the raw numbers
    span = spline.max_derivative - spline.min_derivative
    start = spline.min_derivative + span * jax.nn.sigmoid(raw_start)
    end = spline.min_derivative + span * jax.nn.sigmoid(raw_end)
    slope = height / width
    if not backward:
        xi = (x - left) / width
        rest = 1 - xi
        y, log_slope = _evaluate(slope, xi, rest, start, end)
        return bottom + height * y, log_slope
    xi, rest = _solve(slope, (x - bottom) / height, start, end)
    return left + width * xi, -_evaluate(slope, xi, rest, start, end)[1]


def _evaluate(slope, xi, rest, start, end):
    """Return (y - bottom) / height and log dy/dx at xi = 1 - rest.

    These are equations 4 and 5 of Durkan et al. (2019). Every term of the denominator is positive.
    """
    denominator = slope * (xi * xi + rest * rest) + (start + end) * xi * rest
    ratio = slope / denominator
    log_slope = jnp.log(
        ratio * ratio * (end * xi * xi + 2 * slope * xi * rest + start * rest * rest)
    )
    return (slope * xi + start * rest) * xi / denominator, log_slope


def _solve(slope, v, start, end):
    """Return xi and 1 - xi where (y - bottom) / height is v.

    These are equations 6 to 8 of Durkan et al. (2019). The discriminant is a sum of positive terms,
    4 slope^2 v (1 - v) + e^2 with e = start (1 - v) - end v.
    """
    e = start * (1 - v) - end * v
    q = 4 * slope * slope * jnp.maximum(v * (1 - v), 0)
    root = jnp.sqrt(q + e * e)
    # the root of the quadratic that loses no digits, whichever sign e has
    tail = jnp.where(e >= 0, e + root, q / (root - jnp.minimum(e, 0)))
    total = 2 * slope * v + tail
    return 2 * slope * v / total, tail / total


def _search(spline, backward, raw, x):
    """Select the bin of each x among the left edges, or `backward` among the bottoms.

    A loop over the bins with comparisons and selections: on CPU several times as fast as
    searchsorted and gathers.

    Returns:
        The bin, its number as a float, and log sum exp of the logits of widths and of heights.
    """
    bins, bound = spline.num_bins, spline.tail_bound
    least = jnp.asarray([spline.min_bin_width, spline.min_bin_height], raw.dtype)[:, None, None]
    logits = _logits(raw, bins)
    # softmax by hand: its sums over the bins are needed below, and bins lead
    top = functools.reduce(jnp.maximum, [logits[:, k] for k in range(bins)])
    weights = jnp.exp(logits - top[:, None])
    total = functools.reduce(jnp.add, [weights[:, k] for k in range(bins)])
    factor = 2 * bound * (1 - bins * least) / total
    edge = jnp.full_like(x, spline.unit_logit)  # slope 1 at both ends, as outside
    derivatives = [edge, *(raw[2 * bins + k] for k in range(bins - 1)), edge]
    sides = [2 * bound * least + factor * weights[:, k] for k in range(bins)]
    index, corner = jnp.zeros_like(x), jnp.full_like(top, -bound)
    found = Bin(corner, sides[0], derivatives[0], derivatives[1])
    for k in range(1, bins):
        corner = corner + sides[k - 1]
        beyond = x >= corner[1 if backward else 0]
        this = Bin(corner, sides[k], derivatives[k], derivatives[k + 1])
        found = Bin(*(jnp.where(beyond, new, old) for new, old in zip(this, found, strict=True)))
        index = jnp.where(beyond, k, index)
    return found, index, top + jnp.log(total)


def _logits(raw, bins):
    """Return the logits of widths and of heights, shape (2, bins, rows, size)."""
    return raw[: 2 * bins].reshape(2, bins, *raw.shape[1:])
