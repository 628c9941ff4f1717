"""Polynomial Stein control variates.

Functions of mean zero under any density whose score is known.
"""

import itertools

import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float

# Of the polynomials: under a Gaussian q they take all variance off a loss of their own degree. Half
# leaves what is beyond a cubic; twice has more columns than draws of the default evaluation.
MAX_DEGREE = 6
# Dimensions up to which polynomials replace the family's own columns (docs/math.md, "Estimate").
# Their number grows as dim^degree.
MAX_DIM = 4
# Independent units for each regression coefficient: their noise adds a tenth to the variance that
# is left, at half a fifth; twice as many allow half the columns.
UNITS_PER_COLUMN = 10


def even_monomials(dim: int, units: int) -> np.ndarray:
    """Return exponents (columns, dim) of the monomials of even degree that `units` can afford.

    All those of a degree or none, from degree 2 on.
    """
    found: list[tuple[int, ...]] = []
    degrees = range(2, MAX_DEGREE + 1, 2) if dim <= MAX_DIM else ()
    for degree in degrees:
        powers = itertools.product(range(degree + 1), repeat=dim)
        more = [exponents for exponents in powers if sum(exponents) == degree]
        if len(found) + len(more) > units // UNITS_PER_COLUMN:
            break
        found += more
    return np.asarray(found, int).reshape(-1, dim)


def stein_columns(
    x: Float[Array, "draws dim"], score: Float[Array, "draws dim"], exponents: np.ndarray
) -> Float[Array, "draws columns"]:
    """Evaluate `laplacian f + grad f . score` for the monomials f = prod x_i^a_i.

    With the score of q at draws of q every column has mean zero. They leave nothing of the variance
    of a polynomial of the same degree under a Gaussian q.

    Args:
        x: Draws in coordinates of order one.
        score: Gradient of log q in the same coordinates.
        exponents: Integers (columns, dim).

    References:
        Mira, Solgi & Imparato, Zero Variance MCMC (2013).
    """
    powers = [jnp.ones_like(x)]
    for _ in range(int(exponents.max(initial=0))):
        powers.append(powers[-1] * x)
    table = jnp.stack(powers)  # (power, draws, dim)

    def monomial(lowered: np.ndarray) -> Array:
        factors = [table[lowered[:, i], :, i] for i in range(x.shape[1])]
        return jnp.prod(jnp.stack(factors), axis=0).T

    total = jnp.zeros((x.shape[0], exponents.shape[0]), x.dtype)
    for i, unit in enumerate(np.eye(x.shape[1], dtype=int)):
        power = exponents[:, i]
        # Where an exponent falls below zero, its factor is zero too.
        slope = jnp.asarray(power, x.dtype) * monomial(np.maximum(exponents - unit, 0))
        curvature = jnp.asarray(power * (power - 1), x.dtype)
        total += slope * score[:, i : i + 1]
        total += curvature * monomial(np.maximum(exponents - 2 * unit, 0))
    return total
