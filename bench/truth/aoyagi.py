"""The learning coefficient of deep linear networks."""

import math
from collections.abc import Sequence


def deep_linear_learning_coefficient(widths: Sequence[int], rank: int) -> float:
    """Return the learning coefficient of W_L ...

    W_1 fitted to a matrix of rank R, where every layer has rank R.

    With M_s = H_s - R in ascending order, l the largest index with sum_{i<=l} M_i >= l M_l (from
    0), T that sum and a = T - (ceil(T/l) - 1) l:

        R (H_0 + H_L - R) / 2 + a (l - a) / (4 l) - (l - 1) T^2 / (4 l) + 1/2 sum_{i<j<=l} M_i M_j

    Args:
        widths: H_0 (inputs) to H_L (outputs), at least three.
        rank: R, of the product and of every layer.

    Raises:
        ValueError: If there are fewer than two layers, or the rank is not one that the widths
            allow.

    References:
        Aoyagi, Neural Networks 172 (2024) 106132.
    """
    if len(widths) < 3 or not 0 <= rank <= min(widths):
        raise ValueError(
            f"needs two layers and 0 <= rank <= min(widths); got widths {list(widths)}, rank "
            f"{rank}."
        )
    spare = sorted(width - rank for width in widths)
    last = max(i for i in range(1, len(spare)) if sum(spare[: i + 1]) >= i * spare[i])
    kept = spare[: last + 1]
    total = sum(kept)
    rest = total - (math.ceil(total / last) - 1) * last
    pairs = (total**2 - sum(m * m for m in kept)) / 2
    regular = rank * (widths[0] + widths[-1] - rank) / 2
    return regular + (rest * (last - rest) - (last - 1) * total**2) / (4 * last) + pairs / 2
