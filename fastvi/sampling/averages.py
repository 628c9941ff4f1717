"""Averages over the walkers of a run, with virial control variates and an honest error."""

import dataclasses

import numpy as np

from fastvi._typing import Float
from fastvi.evaluation.errors import chain_error

# Records for each regression coefficient. With half, coefficients are noise; with double, short
# runs go without columns.
POINTS_PER_COLUMN = 5
# One part in so many of a run is discarded, at least: draws of q are no draws of the posterior.
LEAST_BURN_IN = 5
# Correlation at which the sum over lags ends. Half of it adds noise, double leaves a tail out.
NEGLIGIBLE_CORRELATION = 0.05
# Relative error of a mean in single precision.
ROUNDING = 2e-5
# Units in the last place of float64 that values may differ by and yet be the same: they are sums
# of tens of terms. At half, rounding would now and then look like a walk.
ROUNDING_UNITS = 64
# Standard errors from which what the columns take off llc is a surprise, and from which it is
# certain: the first adds to the error, the second drops the columns where they raise llc.
SURPRISE, CERTAIN = 2.0, 4.0
# Part of what the columns take off llc that may be left, since they see bias to first order.
DOUBT = 0.3


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a run says: the mean after burn-in, its error, and whether to believe it.

    Attributes:
        llc: Mean of nbeta (L_n - L_n(w*)) with the virial columns as control variates.
        llc_sem: Its standard error, `systematic` included.
        added: What the columns take off llc. Where it is positive, the dynamics have added it, by
            noisy gradients and finite steps. Where it is negative beyond doubt, the walkers have
            not yet spread along wide directions. llc hardly feels these, and is then read without
            the columns.
        systematic: The part of `llc_sem` that stands for what the columns leave.
        rhat: Split R-hat of llc.
        rhat_radius: Split R-hat of |w - w*|^2.
        virial_z: Mean of the column that is furthest off, in its standard errors.
        drift_z: Change from one half to the other, in its standard errors.
        variance_reduction: Variance of a record without columns over that with them.
        burn_in: Bins discarded.
        per_walker: llc of each walker.
        per_walker_sem: Their standard errors.
    """

    llc: float
    llc_sem: float
    added: float
    systematic: float
    rhat: float
    rhat_radius: float
    virial_z: float
    drift_z: float
    variance_reduction: float
    burn_in: int
    per_walker: Float[np.ndarray, " walkers"]
    per_walker_sem: Float[np.ndarray, " walkers"]

    @classmethod
    def broken(cls, walkers: int) -> "Analysis":
        """Return what records say that are not finite."""
        nan, unknown = float("nan"), np.full(walkers, float("nan"))
        return cls(nan, nan, nan, nan, nan, nan, nan, nan, nan, 0, unknown, unknown)


def analyse(
    llc: Float[np.ndarray, "walkers bins"],
    virial: Float[np.ndarray, "walkers bins columns"],
    radius2: Float[np.ndarray, "walkers bins"] | None = None,
    discard: int | None = None,
) -> Analysis:
    """Average a run after its burn-in, with virial control variates.

    Coefficients come from the other half of the walkers (of a single walker: of its time). The
    error is the larger of that from the spread between walkers and that from the autocorrelation
    within them. `discard` is the burn-in where it is known.
    """
    others = [] if radius2 is None else [radius2]
    burn = discard
    if burn is None:
        burn = max(
            llc.shape[1] // LEAST_BURN_IN, *map(burn_in, [llc, _adjust(llc, virial), *others])
        )
    # slopes are fitted anew on what is kept: those of the transient would not fit
    kept, columns = llc[:, burn:], virial[:, burn:]
    adjusted = _adjust(kept, columns)
    added = float((kept - adjusted).mean())
    # the error of what the columns take off, not of llc: the two are correlated
    doubtful = standard_error(kept - adjusted)
    systematic = DOUBT * max(0.0, abs(added) - SURPRISE * doubtful)
    if added < -CERTAIN * doubtful:
        adjusted = kept
    per_walker = adjusted.mean(axis=1)
    return Analysis(
        llc=float(per_walker.mean()),
        llc_sem=float(
            np.hypot(standard_error(adjusted), max(systematic, ROUNDING * abs(per_walker.mean())))
        ),
        added=added,
        systematic=systematic,
        rhat=split_rhat(adjusted),
        rhat_radius=max((split_rhat(r[:, burn:]) for r in others), default=1.0),
        virial_z=furthest_off(columns),
        drift_z=max(
            (drift(values) for values in [adjusted, *(r[:, burn:] for r in others)]), key=abs
        ),
        variance_reduction=float(kept.var() / max(adjusted.var(), 1e-300)),
        burn_in=burn,
        per_walker=per_walker,
        per_walker_sem=np.array([standard_error(row[None]) for row in adjusted]),
    )


def furthest_off(columns: Float[np.ndarray, "walkers bins columns"]) -> float:
    """Return the mean of a column in its standard errors, of the column that is furthest off.

    Each column has mean zero under the posterior, and so has their sum, which counts as one more.
    They are looked at one by one, since a wrong center shifts two of them by opposite amounts.
    """
    sum_of_all = columns.sum(axis=-1, keepdims=True)
    each = np.moveaxis(np.concatenate([columns, sum_of_all], axis=-1), -1, 0)
    return max((_in_errors(float(one.mean()), standard_error(one)) for one in each), key=abs)


def _in_errors(mean: float, error: float) -> float:
    if error > 0:
        return mean / error
    return float(np.copysign(np.inf, mean)) if mean else 0.0


def burn_in(llc: np.ndarray) -> int:
    """Return the bins to discard: the truncation that minimises the squared error of the mean.

    This is the marginal standard error rule (MSER), over truncations of at most half of the run.

    References:
        White, An Effective Truncation Heuristic for Bias Reduction in Simulation Output (1997).
    """
    series = llc.mean(axis=0)  # walkers averaged, since they share the transient
    # about a mean of what every truncation keeps, so that sums of squares keep their digits
    centred = series - series[series.size // 2 :].mean()
    left = series.size - np.arange(series.size // 2 + 1)
    sums, squares = (np.cumsum(part[::-1])[left - 1] for part in (centred, centred**2))
    return int(np.argmin((squares - sums**2 / left) / left**2))


def _adjust(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Subtract what the columns explain, by coefficients from the other half of the walkers."""
    if columns.shape[-1] == 0:
        return values
    if values.shape[0] == 1:
        half = values.shape[1] // 2  # the halves in time stand for two walkers
        apart = _adjust(
            values[:, -2 * half :].reshape(2, half), columns[:, -2 * half :].reshape(2, half, -1)
        )
        return np.concatenate(
            [values[:, : values.shape[1] - 2 * half], apart.reshape(1, -1)], axis=1
        )
    halves = np.arange(values.shape[0]) % 2 == 0
    if halves.sum() * values.shape[1] < POINTS_PER_COLUMN * (columns.shape[-1] + 1):
        return values
    result = np.empty_like(values)
    # coefficients of the other half are independent of the noise that they take off: no bias
    for mine in (halves, ~halves):
        other = columns[~mine].reshape(-1, columns.shape[-1])
        target = values[~mine].ravel()
        # columns of unit spread, so that the cut-off of small singular values means the same to all
        spread = other.std(axis=0)
        spread = np.where(spread > 0, spread, 1.0)
        design = np.column_stack([np.ones(target.size), other / spread])
        slopes = np.linalg.lstsq(design, target, rcond=1e-6)[0][1:] / spread
        result[mine] = values[mine] - columns[mine] @ slopes
    return result


def standard_error(values: Float[np.ndarray, "walkers bins"]) -> float:
    """Return the error of the mean.

    From the spread of the walkers or the correlation within them, if larger.
    """
    correlation = autocorrelation(values)
    if correlation.size == 0:  # walkers that do not move have no error to speak of
        return 0.0
    # initial positive sequence
    ends = np.flatnonzero(correlation[1:] < NEGLIGIBLE_CORRELATION)
    time = 1 + 2 * correlation[1 : ends[0] + 1 if ends.size else None].sum()
    return chain_error(values.mean(axis=1), np.sqrt(values.var() * time / values.shape[1]))


def autocorrelation(values: Float[np.ndarray, "walkers bins"]) -> Float[np.ndarray, " lags"]:
    """Return the correlation of bins at lags below half of a run; none where all bins are equal.

    Walkers are averaged, about their common mean. By Fourier transforms, since walks are slow where
    they are long: sums for each lag would take longer than the walk.
    """
    walkers, length = values.shape
    lags = np.arange(max(1, length // 2))
    # zeros enough that no lag wraps around
    size = 1 << (length + lags.size - 1).bit_length()
    spectrum = np.fft.rfft(values - values.mean(), size, axis=1)
    power = np.sum(spectrum.real**2 + spectrum.imag**2, axis=0)
    covariance = np.fft.irfft(power, size)[: lags.size] / (walkers * (length - lags))
    return covariance / covariance[0] if np.any(values != values.flat[0]) else covariance[:0]


def drift(values: Float[np.ndarray, "walkers bins"]) -> float:
    """Return the change of the mean from the first half to the second, in its standard errors.

    The errors are those over walkers.
    """
    half = values.shape[1] // 2
    if half == 0 or values.shape[0] < 2:
        return 0.0
    change = values[:, -half:].mean(axis=1) - values[:, :half].mean(axis=1)
    error = change.std(ddof=1) / np.sqrt(change.size)
    return float(change.mean() / error) if error > 0 else 0.0


def split_rhat(values: np.ndarray) -> float:
    """Compare means of half-walkers with the variance within them.

    1 where they agree, infinite where one is stuck.
    """
    half = values.shape[1] // 2
    if half < 2:  # one record has no variance, and proves no agreement
        return float("inf")
    parts = np.concatenate([values[:, :half], values[:, -half:]])
    variances = parts.var(axis=1, ddof=1)
    within, between = variances.mean(), half * parts.mean(axis=1).var(ddof=1)
    # what is left where control variates explain all but the rounding is no walk
    rounding = ROUNDING_UNITS * np.finfo(float).eps * np.abs(values).max()
    if max(within, between) <= rounding**2:
        return 1.0
    if not np.all(variances):
        return float("inf") if between > 0 else 1.0
    return float(np.sqrt(((half - 1) / half * within + between / half) / within))
