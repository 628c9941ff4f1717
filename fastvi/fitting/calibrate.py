"""Shrink an overwide start until the loss agrees with it."""

from typing import Any

# Draws of a measurement: the virial of a Gaussian in d dimensions then has a standard deviation of
# sqrt(1 / (16 d)). Half as many shrink small starts by chance, twice as many cost twice as much.
CALIBRATION_DRAWS = 32
MAX_ROUNDS = 16  # each divides the scale by at most e: 7 orders of magnitude
WIDE = 1.5  # virial above which q reaches into steeper loss than its own curvature claims


def calibration_steps(num_chains: int, num_draws: int) -> int:
    """Return the steps whose draws measure the virial in a round."""
    return -(-CALIBRATION_DRAWS // (num_chains * num_draws))


def narrowing(virial: Any, xp: Any) -> Any:
    """Return by how much the logarithm of q's scale falls, given q's virial; 0 where q fits.

    The virial `E_q[v . (nbeta grad L + gamma v)] / dim` is 1 at the best scale. Where the loss is
    homogeneous of degree D it grows as scale^D, so each round divides the scale by virial^(1/4), at
    most e. A quadratic start is left as it is. A virial that is not finite is as wide as can be.

    Args:
        virial: The mean over draws.
        xp: `numpy`, or `jax.numpy` for a value that is traced.
    """
    # Not `virial > WIDE`, which a NaN would fail.
    wide = ~(virial <= WIDE)
    step = xp.minimum(0.25 * xp.log(xp.where(wide, virial, 1.0)), 1.0)
    return xp.where(wide, xp.where(xp.isnan(step), 1.0, step), 0.0)
