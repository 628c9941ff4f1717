"""Split R-hat and effective sample size of scalar chains.

References:
    Vehtari et al., Bayesian Analysis 16 (2021) 667, without the rank normalisation: the mean itself
    is asked for.
"""

import numpy as np


def split_chains(draws: np.ndarray) -> np.ndarray:
    """Cut each chain (draws, chains) in two halves."""
    half = len(draws) // 2
    return np.concatenate([draws[:half], draws[len(draws) - half :]], axis=1)


def split_r_hat(draws: np.ndarray) -> float:
    """Compare the spread between half chains with that within them; 1 when they agree.

    Args:
        draws: Shape (draws, chains).
    """
    halves = split_chains(np.asarray(draws, np.float64))
    length = len(halves)
    within = halves.var(axis=0, ddof=1).mean()
    between = halves.mean(axis=0).var(ddof=1)
    return float(np.sqrt((length - 1) / length + between / within))


def effective_sample_size(draws: np.ndarray) -> float:
    """Return the number of independent draws whose mean is as uncertain as that of these chains.

    Geyer's initial monotone sequence on autocorrelations pooled over half chains; never more than
    the draws.

    Args:
        draws: Shape (draws, chains).
    """
    halves = split_chains(np.asarray(draws, np.float64))
    length, count = halves.shape
    within = halves.var(axis=0, ddof=1).mean()
    pooled = within * (length - 1) / length + halves.mean(axis=0).var(ddof=1)
    correlation = (
        1 - (within - autocovariance(halves).mean(axis=1) * length / (length - 1)) / pooled
    )
    correlation[0] = 1.0
    pairs = correlation[: 2 * (length // 2)].reshape(-1, 2).sum(axis=1)
    positive = len(pairs) if np.all(pairs > 0) else int(np.argmax(pairs <= 0))
    time = -1 + 2 * np.minimum.accumulate(pairs[:positive]).sum()
    return float(length * count / max(time, 1.0))


def autocovariance(draws: np.ndarray) -> np.ndarray:
    """Return the biased autocovariances of each column at all lags."""
    length = len(draws)
    centred = draws - draws.mean(axis=0)
    spectrum = np.fft.rfft(centred, n=2 * length, axis=0)
    return np.fft.irfft(np.abs(spectrum) ** 2, axis=0)[:length] / length
