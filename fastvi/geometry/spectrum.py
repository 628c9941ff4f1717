"""Spectral measures of the Hessian: of all directions, and of the noise of gradients.

For a symmetric H, a vector z and any function f, `z . f(H) z` is an integral of f over a measure of
weight |z|^2 on the eigenvalues of H. Lanczos finds the Gauss rule of that measure. Where z has
independent entries of plus or minus one the mean of the integrals is tr f(H); where z is the noise
of one example's gradient it is tr(f(H) V), with V the covariance of such gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvi._typing import Array, Float, Key, Keys
from fastvi.kernels import hutchinson
from fastvi.target.data import Data, Problem
from fastvi.target.hessian import data_hvp
from fastvi.target.objective import FlatObjective

# Steps of Lanczos, which integrate polynomials of twice that degree exactly. What is integrated is
# smooth above -gamma / nbeta: half of them leave a per cent of a spectrum over three decades, and
# double costs twice the products.
STEPS = 16
# Dimensions up to which every coordinate is a start, so that traces are exact. At half, networks of
# a few units have noisy ones; at double, four times as many products are taken.
FEW = 8
# Examples of either minibatch whose difference is the noise of gradients. Half of them are as good
# where noise is Gaussian; rare examples that make it are seen half as often.
NOISE_EXAMPLES = 64
# Length of what is left of a Krylov vector, relative to the operator's, that is rounding alone.
EXHAUSTED = 30.0


class SpectralMeasure(NamedTuple):
    """Gauss rules, whose starts are summed: `sum(weights * f(values))` is the integral of f."""

    values: Float[Array, "*runs nodes"]
    weights: Float[Array, "*runs nodes"]


class Measures(NamedTuple):
    """Of each run the measures of all directions, and of one example's noise.

    The sum over the nodes of a run estimates tr f(H), and tr(f(H) V).
    """

    directions: SpectralMeasure
    noise: SpectralMeasure


def num_starts(dim: int) -> tuple[int, int]:
    """Return how many starts each run has, for all directions and for the noise."""
    return (dim, FEW) if dim <= FEW else (1, 1)


def num_products(dim: int) -> int:
    """Return the Hessian products that a run takes at each point."""
    return sum(num_starts(dim)) * min(STEPS, dim)


def noise_gradients(problem: Problem, dim: int) -> int:
    """Return the gradients of one example that the noise of a run takes."""
    return 2 * num_starts(dim)[1] * _noise_size(problem)


def _noise_size(problem: Problem) -> int:
    # a minibatch of all examples would have no noise
    return max(1, min(NOISE_EXAMPLES, problem.data.num_examples // 2))


def spectral_measures(
    objective: FlatObjective,
    problem: Problem,
    displacement: Float[Array, "points dim"],
    keys: Keys,
    num_examples: int,
) -> Measures:
    """Find both measures of the mean Hessian at some points, once at the noise of each point.

    The mean is what matters: a Gaussian that is fitted to a posterior has the precision
    gamma + nbeta E[H].

    Args:
        objective: The loss.
        problem: Target and data.
        displacement: The points, less w*.
        keys: A key of the run at each point, by which it draws its own examples and starts.
        num_examples: Examples that the Hessian at each point is of; all where there are no more.

    Cost:
        For each run and each point `num_products` Hessian products of `num_examples` examples, and
        for each run `noise_gradients`. Memory: `STEPS` vectors for each start.
    """
    dim, center = displacement.shape[1], problem.posterior.center

    def mean_product(starts: Array, key: Key) -> Array:
        def at(total: Array, inputs: tuple[Array, Key]) -> tuple[Array, None]:
            v, key = inputs
            subset = problem.data.subset(key, num_examples)
            hvp = data_hvp(objective, center + v, subset, copies=starts.shape[0])
            return total + jax.vmap(hvp)(starts), None

        keys = jax.random.split(key, len(displacement))
        total = jax.lax.scan(at, jnp.zeros_like(starts), (displacement, keys))[0]
        return total / len(displacement)

    def run(inputs: tuple[Array, Key]) -> Measures:
        v, key = inputs
        key_subset, key_probe, key_noise = jax.random.split(key, 3)
        split, noisy = num_starts(dim)
        noise = _noise(objective, problem, center + v, jax.random.split(key_noise, noisy))
        starts = jnp.concatenate([_directions(key_probe, dim, v.dtype), noise])
        found = lanczos(lambda block: mean_product(block, key_subset), starts, min(STEPS, dim))
        return Measures(
            SpectralMeasure(found.values[:split], found.weights[:split]),
            SpectralMeasure(found.values[split:], found.weights[split:] / noisy),
        )

    return jax.lax.map(run, (displacement, keys))


def _directions(key: Key, dim: int, dtype) -> Float[Array, "starts dim"]:
    """Return vectors over which the sum of `z . f(H) z` is the trace, or has it as its mean."""
    if dim <= FEW:
        return jnp.eye(dim, dtype=dtype)
    return hutchinson.rademacher(key, 1, dim, dtype)


def _noise(
    objective: FlatObjective, problem: Problem, point: Float[Array, " dim"], keys: Keys
) -> Float[Array, "starts dim"]:
    """Draw noise of one example's gradient, as the scaled difference of two minibatches'."""
    size = _noise_size(problem)

    def gradient(key: Key) -> Array:
        batch = Data(problem.data.minibatch(key, size), problem.data.max_batch)
        return batch.mean(lambda some: objective.grad(point, some))

    def one(key: Key) -> Array:
        first, second = jax.lax.map(gradient, jax.random.split(key))
        return jnp.sqrt(jnp.asarray(size / 2, point.dtype)) * (first - second)

    return jax.lax.map(one, keys)


def lanczos(
    apply: Callable[[Float[Array, "starts dim"]], Float[Array, "starts dim"]],
    starts: Float[Array, "starts dim"],
    steps: int,
) -> SpectralMeasure:
    """Find the Gauss rules of a symmetric operator's measures by its products.

    Each start has its own Krylov space, with full reorthogonalisation. Where that is exhausted, the
    nodes that remain are 0 and have no weight.

    Args:
        apply: The operator, on all starts at once.
        starts: Vectors z; the weights of each add up to |z|^2.
        steps: Nodes of each rule.

    References:
        Golub & Meurant, Matrices, Moments and Quadrature (2010), chapter 4.
    """
    count, dim = starts.shape
    tiny, eps = jnp.finfo(starts.dtype).tiny, jnp.finfo(starts.dtype).eps
    lengths = jnp.linalg.norm(starts, axis=1, keepdims=True)

    def extend(carry, step):
        basis, vector, size = carry
        basis = jax.lax.dynamic_update_slice_in_dim(basis, vector[:, None], step, 1)
        image = apply(vector)
        diagonal = jnp.sum(vector * image, axis=1)
        size = jnp.maximum(size, jnp.linalg.norm(image, axis=1))
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            image = image - jnp.einsum("snd,sn->sd", basis, jnp.einsum("snd,sd->sn", basis, image))
        length = jnp.linalg.norm(image, axis=1)
        goes_on = length > EXHAUSTED * eps * size
        vector = jnp.where(goes_on[:, None], image / jnp.where(goes_on, length, 1.0)[:, None], 0.0)
        return (basis, vector, size), (diagonal, jnp.where(goes_on, length, 0.0))

    empty = jnp.zeros((count, steps, dim), starts.dtype)
    first = starts / jnp.maximum(lengths, tiny)
    begin = (empty, first, jnp.zeros(count, starts.dtype))
    _, (diagonal, beside) = jax.lax.scan(extend, begin, jnp.arange(steps))
    values, vectors = jnp.linalg.eigh(jax.vmap(_tridiagonal)(diagonal.T, beside.T))
    return SpectralMeasure(values, lengths**2 * vectors[:, 0] ** 2)


def _tridiagonal(
    diagonal: Float[Array, " nodes"], beside: Float[Array, " nodes"]
) -> Float[Array, "nodes nodes"]:
    return jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
