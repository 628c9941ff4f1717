"""How a number with an error is written."""

import math


def with_error(value: float, sem: float, resolution: float = 0.0) -> str:
    """Format a value as precisely as its error.

    `22.296 ± 0.073`; or as `resolution`, if that is coarser.
    """
    # Two digits of the error at most: its own relative error is rarely below 10 %.
    coarsest = max(sem, resolution) if math.isfinite(resolution) else sem
    if not (math.isfinite(value) and math.isfinite(sem) and coarsest > 0):
        return f"{value:.4g} ± {sem:.2g}"
    decimals = min(max(1 - math.floor(math.log10(coarsest)), 0), 9)
    # one digit, without an exponent: 10, not 1e+01
    error = f"{sem:.{decimals}f}" if coarsest == sem else f"{float(f'{sem:.1g}'):g}"
    return f"{value:.{decimals}f} ± {error}"
