"""Averages over the walkers of a run, with virial control variates and an honest error."""

import dataclasses

import numpy as np

from fastvi._typing import Float
from fastvi.evaluation.errors import ErrorParts, chain_error

# Records for each regression coefficient. With half, coefficients are noise; with double, short
# runs go without columns.
POINTS_PER_COLUMN = 5
# One part in so many of a run is discarded, at least: draws of q are no draws of the posterior.
LEAST_BURN_IN = 5
# Correlation at which the sum over lags ends. Half of it adds noise, double leaves a tail out.
NEGLIGIBLE_CORRELATION = 0.05
# Relative error of a mean in single precision.
ROUNDING = 2e-5
TINY = np.finfo(float).tiny
# Bounds of observables that mix last and that llc hardly feels: split R-hat of |w - w*|^2, that of
# the log of the squared width along q's low-rank directions (1.7 to 2.3 where llc is still 5 % low
# on a digits network at gamma 0.1, 1.1 to 1.7 where it is right), and the change from one half to
# the other in standard errors. At half the distance from where chains agree (1, 1, 0), runs go on
# about four times as long; at double, walkers that have not spread are not seen.
RADIUS_RHAT_BOUND, CORE_RHAT_BOUND, DRIFT_BOUND = 1.2, 1.7, 2.5
# Units in the last place of float64 that values may differ by and yet be the same: they are sums
# of tens of terms. At half, rounding would now and then look like a walk.
ROUNDING_UNITS = 64
# Standard errors from which what the columns take off llc is a surprise, and adds to the error. At
# half, chance adds to every third error; at double, walkers that have not spread add nothing.
SURPRISE = 2.0
# Part of what the columns take off llc that may be left, since they see bias to first order.
DOUBT = 0.3
# Squares of a standard error beyond a surprise at which half of what the columns add to llc is
# believed. At half, less of their gain is kept; at double, more of the bias of walkers that have
# not spread.
HALF_BELIEVED = 3.0
# Second term of Student's quantile, over the first: what few degrees of freedom add to two errors.
STUDENT = 1.2


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a run says: the mean after burn-in, its error, and whether to believe it.

    Attributes:
        adjusted: nbeta (L_n - L_n(w*)) after burn-in, less what the virial columns explain.
        parts: What its standard error is made of.
        added: What the columns would take off llc. Where it is positive, the dynamics have added
            it, by noisy gradients and finite steps, or the start. Where it is negative beyond
            doubt, the walkers have not yet spread along wide directions: that is evidence, and
            less of it is added to llc the surer it is.
        rhat: Split R-hat of llc.
        rhat_radius: Split R-hat of |w - w*|^2.
        rhat_core: Split R-hat of the log of the squared width along q's low-rank directions.
        virial_z: Mean of the column that is furthest off, in its standard errors.
        drift_z: Change from one half to the other, in its standard errors.
        variance_reduction: Variance of a record without columns over that with them.
        burn_in: Bins discarded.
    """

    adjusted: Float[np.ndarray, "walkers bins"]
    parts: ErrorParts
    added: float
    rhat: float
    rhat_radius: float
    rhat_core: float
    virial_z: float
    drift_z: float
    variance_reduction: float
    burn_in: int

    @classmethod
    def broken(cls, walkers: int) -> "Analysis":
        """Return what records say that are not finite."""
        nan, unknown = float("nan"), np.full((walkers, 1), float("nan"))
        parts = ErrorParts(nan, nan, nan, nan)
        return cls(unknown, parts, nan, nan, nan, nan, nan, nan, nan, 0)

    @property
    def llc(self) -> float:
        """Average the records of all walkers."""
        return float(self.per_walker.mean())

    @property
    def per_walker(self) -> Float[np.ndarray, " walkers"]:
        """Average the records of each walker."""
        return self.adjusted.mean(axis=1)

    @property
    def per_walker_sem(self) -> Float[np.ndarray, " walkers"]:
        """Standard error of each walker's average."""
        return np.array([standard_error(row[None]) for row in self.adjusted])

    @property
    def llc_sem(self) -> float:
        """The standard error of llc."""
        return self.parts.total


def analyse(
    llc: Float[np.ndarray, "walkers bins"],
    virial: Float[np.ndarray, "walkers bins columns"],
    radius2: Float[np.ndarray, "walkers bins"] | None = None,
    core_radius2: Float[np.ndarray, "walkers bins"] | None = None,
    discard: int | None = None,
) -> Analysis:
    """Average a run after its burn-in, with virial control variates.

    Coefficients come from the other half of the walkers (of a single walker: of its time). The
    error is the larger of that from the spread between walkers and that from the autocorrelation
    within them.

    Args:
        llc: nbeta (L_n - L_n(w*)).
        virial: Columns that have mean zero under the posterior.
        radius2: |w - w*|^2.
        core_radius2: Squared width along q's low-rank directions.
        discard: The burn-in where it is known.
    """
    slow = [] if radius2 is None else [radius2]
    if core_radius2 is not None:  # the walkers spread by factors there, so their logarithm is told
        slow.append(np.log(np.maximum(core_radius2, TINY)))
    burn = discard
    if burn is None:
        burn = max(llc.shape[1] // LEAST_BURN_IN, *map(burn_in, [llc, _adjust(llc, virial), *slow]))
    # slopes are fitted anew on what is kept: those of the transient would not fit
    kept, columns, slow = llc[:, burn:], virial[:, burn:], [part[:, burn:] for part in slow]
    taken = kept - _adjust(kept, columns)
    added = float(taken.mean())
    # the error of what the columns take off, not of llc: the two are correlated
    doubtful = standard_error(taken)
    surprise = DOUBT * max(0.0, abs(added) - SURPRISE * doubtful)
    adjusted = kept - _believed(added, doubtful) * taken
    rhats, statistical = [split_rhat(part) for part in slow], stated_error(adjusted)
    bounds = (RADIUS_RHAT_BOUND, CORE_RHAT_BOUND)
    unmixed = max(map(unmixed_errors, rhats, map(drift, slow), bounds), default=0.0)
    return Analysis(
        adjusted=adjusted,
        parts=ErrorParts(
            statistical=statistical,
            relaxation=float(np.hypot(surprise if added < 0 else 0.0, unmixed * statistical)),
            dynamics=surprise if added > 0 else 0.0,
            evaluation=ROUNDING * abs(float(adjusted.mean())),
        ),
        added=added,
        rhat=split_rhat(adjusted),
        rhat_radius=rhats[0] if rhats else 1.0,
        rhat_core=rhats[1] if rhats[1:] else 1.0,
        virial_z=furthest_off(columns),
        drift_z=drift(adjusted),
        variance_reduction=float(kept.var() / max(adjusted.var(), 1e-300)),
        burn_in=burn,
    )


def unmixed_errors(rhat: float, drift_z: float, rhat_bound: float) -> float:
    """Return how many statistical errors llc may be off for an observable that has not mixed.

    One, and one more for each standard error that the observable has moved by from one half of the
    run to the other, times the share of its variance that the walkers have not mixed: what differs
    between them, or between their halves, of what varies at all. Walkers that differ and do not
    move on average are only few: the spread between them is in the statistical error already. Zero
    where R-hat and drift are within their bounds.
    """
    between = 1 - 1 / rhat**2 if rhat > rhat_bound else 0.0
    moved = 1 - (DRIFT_BOUND / drift_z) ** 2 if abs(drift_z) > DRIFT_BOUND else 0.0
    return (1 + abs(drift_z)) * max(between, moved)


def _believed(added: float, error: float) -> float:
    """Return the share of what the columns say that is believed.

    All of it where they take something off llc, or chance may be what adds to it; else the less,
    the surer it is that their mean is not zero.
    """
    if added >= 0 or error == 0:
        return 1.0
    surprise = max((added / error) ** 2 - SURPRISE**2, 0.0)
    return 1 / (1 + surprise / HALF_BELIEVED)


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
    time = correlation_time(values)
    if time is None:  # walkers that do not move have no error to speak of
        return 0.0
    return chain_error(values.mean(axis=1), np.sqrt(values.var() * time / values.shape[1]))


def correlation_time(values: Float[np.ndarray, "walkers bins"]) -> float | None:
    """Return the integrated autocorrelation time, in bins; None where all bins are equal."""
    correlation = autocorrelation(values)
    if correlation.size == 0:
        return None
    # initial positive sequence
    ends = np.flatnonzero(correlation[1:] < NEGLIGIBLE_CORRELATION)
    return 1 + 2 * float(correlation[1 : ends[0] + 1 if ends.size else None].sum())


def stated_error(values: Float[np.ndarray, "walkers bins"]) -> float:
    """Return the error of the mean, wider by what few walkers do not know of their own spread."""
    others = values.shape[0] - 1
    return standard_error(values) * (1 + STUDENT / others if others else 1.0)


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
