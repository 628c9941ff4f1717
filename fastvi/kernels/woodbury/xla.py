"""Woodbury identities in O((core + comp rank) dim), laid out for XLA: flat matvecs, dim contiguous.

Symbols follow docs/math.md, section "Family": B = core, A_m = factors[m], C_B = I + B B^T,
C_m = I + A_m A_m^T + (B A_m^T)^T (B A_m^T).
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from fastvi.kernels.triangular import inverse_root
from fastvi.kernels.woodbury.types import Draw, Grams, Mixture, Noise

PAIRWISE_RANK = 2  # up to here products of single rows are as fast as anything
GRAM_CHUNK = 1000  # entries of dim that stay in cache together


def grams(mixture: Mixture, factor_products=None) -> Grams:
    """Compute C_B, B A_m^T and C_m and factorise them."""
    core, factors = mixture.core, mixture.factors
    num_core, (num_components, rank, dim) = core.shape[0], factors.shape
    flat = factors.reshape(num_components * rank, dim)
    core_half, core_ridged = inverse_root(core @ core.T)
    # one flat product for all components: a batched one reads factors at a tenth of the bandwidth
    cross = (core @ flat.T).reshape(num_core, num_components, rank).transpose(1, 0, 2)
    products = factor_grams(factors) if factor_products is None else factor_products
    inner = products + jnp.swapaxes(cross, 1, 2) @ cross
    factor_half, ridged = inverse_root(inner)
    # |Sigma_m| = |D| |C_m| / |C_B|, and a half is the inverse of a Cholesky factor
    log_det = 2 * jnp.sum(mixture.log_scale) + _log_det(core_half) - _log_det(factor_half)
    return Grams(core_half, cross, factor_half, log_det, core_ridged + jnp.sum(ridged))


def factor_grams(factors):
    """Compute A_m A_m^T.

    By pairs of rows for small ranks, else on CPUs over chunks of dim that stay in cache.
    """
    return _products(
        lambda start, size: jax.lax.dynamic_slice_in_dim(factors, start, size, 2),
        factors.shape,
        factors.dtype,
    )


def component_gram(factors, index):
    """Compute A_m A_m^T of the factor at an index, on CPUs without a copy of the factor.

    The index has one number for each axis but the last two.
    """
    rank, dim = factors.shape[-2:]

    def part(start, size):
        sizes = (*(1 for _ in index), rank, size)
        return jax.lax.dynamic_slice(factors, (*index, 0, start), sizes).reshape(1, rank, size)

    return _products(part, (1, rank, dim), factors.dtype)[0]


def _products(part, shape, dtype):
    """Compute A_m A_m^T of factors of this shape, of which `part` reads a stretch of dim."""
    count, rank, dim = shape
    if rank == 0:
        return jnp.zeros((count, 0, 0), dtype)
    if rank <= PAIRWISE_RANK:
        # a matrix is symmetric: rank (rank + 1) / 2 products
        whole = part(0, dim)
        entry = {
            (i, j): jnp.sum(whole[:, i] * whole[:, j], -1)
            for i in range(rank)
            for j in range(i, rank)
        }
        rows = [
            jnp.stack([entry[min(i, j), max(i, j)] for j in range(rank)], -1) for i in range(rank)
        ]
        return jnp.stack(rows, axis=-2)

    def product(block):
        return jnp.einsum("mrd,msd->mrs", block, block)

    def at_once():
        return product(part(0, dim))

    def by_chunks():
        chunks = dim // GRAM_CHUNK

        def add(total, index):
            return total + product(part(index * GRAM_CHUNK, GRAM_CHUNK)), None

        # the ragged end first, then whole chunks in a loop
        rest = product(part(chunks * GRAM_CHUNK, dim - chunks * GRAM_CHUNK))
        return jax.lax.scan(add, rest, jnp.arange(chunks))[0]

    if dim < GRAM_CHUNK:
        return at_once()
    # an accelerator launches each turn of a loop: on an H200, a thousand turns took 23 ms where
    # the reads take 0.1 ms
    return jax.lax.platform_dependent(cpu=by_chunks, default=at_once)


def _log_det(triangular):
    return 2 * jnp.sum(jnp.log(jnp.diagonal(triangular, axis1=-2, axis2=-1)), axis=-1)


def precision_root(core, eps, zeta):
    """Compute `eps - B^T C_B^{-1} (B eps - zeta)` for rows of eps and zeta."""
    # This is x_core of `draw`, for many rows.
    half = inverse_root(core @ core.T).root
    return eps - ((eps @ core.T - zeta) @ half.T @ half) @ core


def draw(mixture: Mixture, grams: Grams, noise: Noise) -> Draw:
    """Draw, then evaluate density and score with the products that drawing left behind.

    `x_core = eps - B^T C_B^{-1} (B eps - zeta)` equals `P^{-1} (eps + B^T zeta)` and loses no
    digits to cancellation in steep directions.
    """
    core, scale = mixture.core, jnp.exp(mixture.log_scale)
    correction = solve(grams.core_half, core @ noise.eps - noise.zeta)
    x_core = noise.eps - correction @ core
    # B x_core needs no product over dim, since B B^T = C_B - I.
    core_x = noise.zeta + correction
    x = x_core + noise.z @ mixture.factors[noise.label]
    core_full = core_x + grams.cross[noise.label] @ noise.z
    if mixture.offsets.shape[0] > 1:
        offset = mixture.offsets[noise.label]
        apart = (offset - mixture.offsets) / scale
        density = _density_separate(mixture, grams, x + apart, core_full + apart @ core.T)
    else:
        # The offsets have no row or one: their sum is zero, or the mean that all share.
        offset = mixture.offsets.sum(0)
        density = _density_shared(mixture, grams, x, core_full)
    log_prob, responsibilities, score = density
    return Draw(
        x=x,
        x_core=x_core,
        core_x=core_x,
        displacement=offset + scale * x,
        log_prob=log_prob,
        responsibilities=responsibilities,
        score=score / scale,
    )


def log_prob(mixture: Mixture, grams: Grams, displacement):
    """Evaluate the log density at a given displacement."""
    scale = jnp.exp(mixture.log_scale)
    if mixture.offsets.shape[0] > 1:
        x_all = (displacement - mixture.offsets) / scale
        return _density_separate(mixture, grams, x_all, x_all @ mixture.core.T)[0]
    x = (displacement - mixture.offsets.sum(0)) / scale
    return _density_shared(mixture, grams, x, mixture.core @ x)[0]


def _density_shared(mixture: Mixture, grams: Grams, x, core_x):
    """Return log density, responsibilities and score, where all components share their mean.

    The score is in units of D^{1/2}.
    """
    num_components, rank, dim = mixture.factors.shape
    flat = mixture.factors.reshape(num_components * rank, dim)
    projected = (flat @ x).reshape(num_components, rank)
    # a sum, not a dot: that of jax 0.7 on CPUs loses a few 1e-4 of a million squares
    square = jnp.sum(x**2)
    log_prob, weights, weighted, core_t = shared_density(mixture, grams, core_x, projected, square)
    residual = x - weighted.reshape(-1) @ flat
    return log_prob, weights, -(residual + core_t @ mixture.core)


def shared_density(mixture: Mixture, grams: Grams, core_x, projected, square):
    """Return log density and responsibilities where all means agree, and what the score is made of.

    Given are B x, A_m x and |x|^2. The score is `-(t + B^T B t)` with `t = x - sum_m A_m^T w_m`, of
    which w and B t are returned.
    """
    full = projected + jnp.einsum("mkr,k->mr", grams.cross, core_x)
    solved = solve(grams.factor_half, full)
    log_prob, weights = _combine(
        mixture, grams, square + core_x @ core_x, -jnp.sum(full * solved, axis=-1)
    )
    weighted = weights[:, None] * solved
    core_t = core_x - jnp.einsum("mkr,mr->k", grams.cross, weighted)
    return log_prob, weights, weighted, core_t


def _density_separate(mixture: Mixture, grams: Grams, x_all, core_all):
    """Do the same where each component has its own mean.

    X_all (comp, dim), core_all (comp, core).
    """
    projected = jnp.einsum("mrd,md->mr", mixture.factors, x_all) + jnp.einsum(
        "mkr,mk->mr", grams.cross, core_all
    )
    solved = solve(grams.factor_half, projected)
    own = jnp.sum(x_all**2, -1) + jnp.sum(core_all**2, -1) - jnp.sum(projected * solved, -1)
    log_prob, weights = _combine(mixture, grams, jnp.zeros((), own.dtype), own)
    weighted = weights[:, None] * solved
    residual = weights @ x_all - jnp.einsum("mr,mrd->d", weighted, mixture.factors)
    core_residual = weights @ core_all - jnp.einsum("mkr,mr->k", grams.cross, weighted)
    return log_prob, weights, -(residual + core_residual @ mixture.core)


def _combine(mixture: Mixture, grams: Grams, common, own):
    """Mix components whose quadratic forms are `common + own`.

    The common terms grow with dim. Adding them before the softmax would cancel significant digits,
    so only differences enter it.
    """
    relative = mixture.log_weights - 0.5 * (own - _log_det(grams.factor_half))
    shared = common + 2 * jnp.sum(mixture.log_scale) + _log_det(grams.core_half)
    constant = mixture.log_scale.size * jnp.log(2 * jnp.pi).astype(relative.dtype)
    return logsumexp(relative) - 0.5 * (shared + constant), jax.nn.softmax(relative)


def solve(half, right):
    """Return C^{-1} right given L^{-1} of C = L L^T, batched over leading axes."""
    # Products with L^{-1} batch over chains, where a triangular solve would expand.
    inner = jnp.einsum("...ij,...j->...i", half, right)
    return jnp.einsum("...ji,...j->...i", half, inner)
