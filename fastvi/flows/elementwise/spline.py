"""Monotone rational-quadratic splines with identity tails (Durkan et al., Neural Spline Flows, 2019)."""

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
    """The bin that holds a number: its lower left corner, its sides and the raw derivatives at its ends."""

    left: Array
    width: Array
    bottom: Array
    height: Array
    raw_start: Array
    raw_end: Array


class RationalQuadratic(AbstractElementwise):
    """Rational-quadratic spline on [-tail_bound, tail_bound], the identity outside.

    Raw parameters: `num_bins` logits of widths, as many of heights, and `num_bins` - 1 of the derivatives at inner
    knots; the derivative is 1 at the ends, so that the map is continuously differentiable.

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
                    f"{name} times num_bins must lie between 0 and 1, for the bins to fit in the interval; "
                    f"it is {least} times {self.num_bins}."
                )
        if not 0 < self.min_derivative < 1 < self.max_derivative:
            raise ConfigError(
                "min_derivative and max_derivative must be positive and enclose 1, the derivative of the identity; "
                f"they are {self.min_derivative} and {self.max_derivative}."
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

    def forward(self, raw, x, gate):
        """Return y and log dy/dx."""
        return self._apply(_evaluate, "left", raw, x, gate)

    def inverse(self, raw, y, gate):
        """Return x and log dx/dy."""
        return self._apply(_solve, "bottom", raw, y, gate)

    def _apply(self, curve, search, raw, x, gate):
        if gate is not None:
            identity = jnp.asarray(self.identity(), raw.dtype)[:, None, None]
            raw = (1 - gate) * identity + gate * raw
        # Cheap to compute and large: a gradient computes the arrays of a bin again and keeps only raw and x.
        return jax.checkpoint(functools.partial(self._curve, curve, search), prevent_cse=False)(raw, x)

    def _curve(self, curve, search, raw, x):
        inside = jnp.abs(x) <= self.tail_bound
        held = jnp.where(inside, x, 0)
        found = _find_bin(self, search, raw, held)
        span = self.max_derivative - self.min_derivative
        start = self.min_derivative + span * jax.nn.sigmoid(found.raw_start)
        end = self.min_derivative + span * jax.nn.sigmoid(found.raw_end)
        y, log_slope = curve(found, start, end, held)
        return jnp.where(inside, y, x), jnp.where(inside, log_slope, 0)


def _evaluate(found, start, end, x):
    """Durkan et al. (2019), equations 4 and 5; every term of the denominator is positive."""
    slope = found.height / found.width
    xi = (x - found.left) / found.width
    rest = 1 - xi
    denominator = slope * (xi * xi + rest * rest) + (start + end) * xi * rest
    y = found.bottom + found.height * (slope * xi * xi + start * xi * rest) / denominator
    return y, _log_slope(slope, xi, rest, start, end, denominator)


def _solve(found, start, end, y):
    """Durkan et al. (2019), equations 6 to 8, with the discriminant as a sum of positive terms.

    With v = (y - bottom) / height and e = start (1 - v) - end v it is 4 slope^2 v (1 - v) + e^2.
    """
    slope = found.height / found.width
    v = (y - found.bottom) / found.height
    e = start * (1 - v) - end * v
    q = 4 * slope * slope * jnp.maximum(v * (1 - v), 0)
    root = jnp.sqrt(q + e * e)
    tail = jnp.where(e >= 0, e + root, q / (root - jnp.minimum(e, 0)))
    total = 2 * slope * v + tail
    xi, rest = 2 * slope * v / total, tail / total
    denominator = slope * (xi * xi + rest * rest) + (start + end) * xi * rest
    return found.left + found.width * xi, -_log_slope(slope, xi, rest, start, end, denominator)


def _log_slope(slope, xi, rest, start, end, denominator):
    numerator = end * xi * xi + 2 * slope * xi * rest + start * rest * rest
    ratio = slope / denominator
    return jnp.log(ratio * ratio * numerator)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _find_bin(spline, search, raw, x):
    """Select the bin of each x among the left edges (`search` "left") or the bottoms ("bottom").

    A loop over the bins with comparisons and selections: on CPU several times as fast as searchsorted and gathers.
    """
    return _search(spline, search, raw, x)[0]


@_find_bin.defjvp
def _find_bin_jvp(spline, search, primals, tangents):
    """Write the tangent as sums over bins, whose transpose is one pass over the raw parameters.

    The rule that JAX derives from the loop is 5 times as slow.
    """
    (raw, x), (raw_dot, _) = primals, tangents
    bins, bound = spline.num_bins, spline.tail_bound
    (_, (index, log_sums)), found = _search(spline, search, raw, x), _find_bin(spline, search, raw, x)
    numbers = jnp.arange(bins, dtype=x.dtype)[:, None, None]
    here, before = (numbers == index).astype(x.dtype), (numbers < index).astype(x.dtype)

    def knots(block, log_sum, least, edge, side):
        weights = jnp.exp(raw[block] - log_sum)
        mean = jnp.sum(weights * raw_dot[block], axis=0)
        below = edge + bound * (1 - 2 * least * index)
        edge_dot = 2 * bound * (1 - bins * least) * jnp.sum(before * weights * raw_dot[block], axis=0) - below * mean
        return edge_dot, (side - 2 * bound * least) * (jnp.sum(here * raw_dot[block], axis=0) - mean)

    left, width = knots(slice(bins), log_sums[0], spline.min_bin_width, found.left, found.width)
    heights = slice(bins, 2 * bins)
    bottom, height = knots(heights, log_sums[1], spline.min_bin_height, found.bottom, found.height)
    inner = raw_dot[2 * bins :]
    start, end = jnp.sum(here[1:] * inner, axis=0), jnp.sum(here[:-1] * inner, axis=0)
    return found, Bin(left, width, bottom, height, start, end)


def _search(spline, search, raw, x):
    """Return the bin, its number as a float and the log of the sums of exponentials of widths and of heights."""
    bins, bound = spline.num_bins, spline.tail_bound
    widths, width_sum = _sides(raw[:bins], spline.min_bin_width, bound)
    heights, height_sum = _sides(raw[bins : 2 * bins], spline.min_bin_height, bound)
    edge = jnp.full_like(x, spline.unit_logit)
    derivatives = [edge, *(raw[2 * bins + k] for k in range(bins - 1)), edge]
    index, left, bottom = jnp.zeros_like(x), jnp.full_like(x, -bound), jnp.full_like(x, -bound)
    found = Bin(left, widths[0], bottom, heights[0], derivatives[0], derivatives[1])
    for k in range(1, bins):
        left, bottom = left + widths[k - 1], bottom + heights[k - 1]
        beyond = x >= (left if search == "left" else bottom)
        this = Bin(left, widths[k], bottom, heights[k], derivatives[k], derivatives[k + 1])
        found = Bin(*(jnp.where(beyond, new, old) for new, old in zip(this, found, strict=True)))
        index = jnp.where(beyond, k, index)
    return found, (index, (width_sum, height_sum))


def _sides(logits, least, bound):
    """Turn logits to the sides of bins, each at least `least` of the interval, and log sum exp of the logits."""
    bins = logits.shape[0]
    top = functools.reduce(jnp.maximum, [logits[k] for k in range(bins)])
    exponentials = [jnp.exp(logits[k] - top) for k in range(bins)]
    total = functools.reduce(jnp.add, exponentials)
    factor = 2 * bound * (1 - bins * least) / total
    return [2 * bound * least + factor * e for e in exponentials], top + jnp.log(total)
