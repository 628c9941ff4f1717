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
        return self._apply(False, raw, x, gate)

    def inverse(self, raw, y, gate):
        """Return x and log dx/dy."""
        return self._apply(True, raw, y, gate)

    def _apply(self, backward, raw, x, gate):
        if gate is not None:
            identity = jnp.asarray(self.identity(), raw.dtype)[:, None, None]
            raw = (1 - gate) * identity + gate * raw
        inside = jnp.abs(x) <= self.tail_bound
        y, log_slope = _spline(self, backward, raw, jnp.where(inside, x, 0))
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spline(spline, backward, raw, x):
    """Map x, inside the interval, forward or back; return the image and the log of the slope."""
    return _spline_fwd(spline, backward, raw, x)[0]


def _spline_fwd(spline, backward, raw, x):
    found, index, log_sums = _search(spline, backward, raw, x)
    return _curve(spline, backward, found, x), (raw, x, found, index, log_sums)


def _spline_bwd(spline, backward, kept, cotangents):
    """Pull back to x and to the arrays of the bin, then from these to all raw parameters in one pass.

    The rule that JAX derives from the loop over bins is 10 times as slow.
    """
    raw, x, found, index, log_sums = kept
    bins, bound = spline.num_bins, spline.tail_bound
    _, pull = jax.vjp(functools.partial(_curve, spline, backward), found, x)
    bin_bar, x_bar = pull(cotangents)

    def knots(edge_bar, side_bar, edge, side, least):
        """Return factors of a bin's weight: for all bins, for those before; and of its logit, in the bin."""
        below, free = edge + bound * (1 - 2 * least * index), side - 2 * bound * least
        return -below * edge_bar - free * side_bar, 2 * bound * (1 - bins * least) * edge_bar, free * side_bar

    wide = knots(bin_bar.left, bin_bar.width, found.left, found.width, spline.min_bin_width)
    high = knots(bin_bar.bottom, bin_bar.height, found.bottom, found.height, spline.min_bin_height)
    factors = _stored([*wide, *high, bin_bar.raw_start, bin_bar.raw_end, index, *log_sums])
    *factors, start, end, index, width_sum, height_sum = factors
    numbers = jnp.arange(bins, dtype=x.dtype)[:, None, None]

    def logits_bar(logits, log_sum, every, before, here):
        weighted = jnp.exp(logits - log_sum) * (every + jnp.where(numbers < index, before, 0))
        return weighted + jnp.where(numbers == index, here, 0)

    widths_bar = logits_bar(raw[:bins], width_sum, *factors[:3])
    heights_bar = logits_bar(raw[bins : 2 * bins], height_sum, *factors[3:])
    inner = numbers[1:]
    derivatives_bar = jnp.where(inner == index, start, 0) + jnp.where(inner == index + 1, end, 0)
    return jnp.concatenate([widths_bar, heights_bar, derivatives_bar]), x_bar


_spline.defvjp(_spline_fwd, _spline_bwd)


def _stored(arrays):
    """Return the arrays as they are, by a product with the identity that XLA fuses neither in nor through.

    Without it XLA evaluates each array anew for each of the bins; an optimization_barrier is gone before fusion on CPU.
    """
    shape = arrays[0].shape
    flat = jnp.stack(arrays).reshape(len(arrays), -1)
    eye = jnp.eye(len(arrays), dtype=flat.dtype)
    return list(jnp.matmul(eye, flat, precision=jax.lax.Precision.HIGHEST).reshape(len(arrays), *shape))


def _curve(spline, backward, found, x):
    span = spline.max_derivative - spline.min_derivative
    start = spline.min_derivative + span * jax.nn.sigmoid(found.raw_start)
    end = spline.min_derivative + span * jax.nn.sigmoid(found.raw_end)
    return (_solve if backward else _evaluate)(found, start, end, x)


def _search(spline, backward, raw, x):
    """Select the bin of each x among the left edges, or `backward` among the bottoms.

    A loop over the bins with comparisons and selections: on CPU several times as fast as searchsorted and gathers.

    Returns:
        The bin, its number as a float, and log sum exp of the logits of widths and of heights.
    """
    bins, bound = spline.num_bins, spline.tail_bound
    widths, width_sum = _sides(raw[:bins], spline.min_bin_width, bound)
    heights, height_sum = _sides(raw[bins : 2 * bins], spline.min_bin_height, bound)
    edge = jnp.full_like(x, spline.unit_logit)
    derivatives = [edge, *(raw[2 * bins + k] for k in range(bins - 1)), edge]
    index, left, bottom = jnp.zeros_like(x), jnp.full_like(x, -bound), jnp.full_like(x, -bound)
    found = Bin(left, widths[0], bottom, heights[0], derivatives[0], derivatives[1])
    for k in range(1, bins):
        left, bottom = left + widths[k - 1], bottom + heights[k - 1]
        beyond = x >= (bottom if backward else left)
        this = Bin(left, widths[k], bottom, heights[k], derivatives[k], derivatives[k + 1])
        found = Bin(*(jnp.where(beyond, new, old) for new, old in zip(this, found, strict=True)))
        index = jnp.where(beyond, k, index)
    return found, index, (width_sum, height_sum)


def _sides(logits, least, bound):
    """Turn logits to the sides of bins, each at least `least` of the interval, and log sum exp of the logits."""
    bins = logits.shape[0]
    top = functools.reduce(jnp.maximum, [logits[k] for k in range(bins)])
    exponentials = [jnp.exp(logits[k] - top) for k in range(bins)]
    total = functools.reduce(jnp.add, exponentials)
    factor = 2 * bound * (1 - bins * least) / total
    return [2 * bound * least + factor * e for e in exponentials], top + jnp.log(total)
