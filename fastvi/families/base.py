"""The contract of a variational family and its laws."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._typing import Array, Bool, Float, Int, Key, PyTree, Scalar
from fastvi.config import VIConfig


class Draws(NamedTuple):
    """Draws from q.

    `displacement` is w - center in model coordinates; `log_prob` and `score` belong to w there.
    """

    displacement: Float[Array, "draws dim"]
    log_prob: Float[Array, " draws"]
    score: Float[Array, "draws dim"]
    record: Any  # what the family needs to pull gradients back


class SecondMoment(NamedTuple):
    """E_q[v v^T] = diag(diagonal) + factors^T (diag(weights) + E[c c^T]) factors, in model coordinates.

    The diagonal is positive, or zero throughout. `coefficients` are draws of c, mirrored pairs in
    halves; none where the weights say all.
    """

    diagonal: Float[Array, " dim"]
    factors: Float[Array, "terms dim"]
    weights: Float[Array, " terms"]
    coefficients: Float[Array, "samples terms"]

    def marginal(self) -> Float[Array, " dim"]:
        """Return the diagonal of E_q[v v^T]."""
        inner = jnp.diag(self.weights) + self.coefficients.T @ self.coefficients / max(
            self.coefficients.shape[0], 1
        )
        return self.diagonal + jnp.sum((inner @ self.factors) * self.factors, axis=0)


class Geometry(NamedTuple):
    """What a family is built on.

    S^{-1}, the start's precision core and how many of its rows are in use.

    `unit` is the length of a whitened unit in the coordinates of the whitener alone, and
    `noise_size` a bound on the core's rows that does not depend on the problem's curvature.
    """

    scale: Float[Array, " dim"]
    core: Float[Array, "core dim"]
    rank: Int[Array, ""]
    unit: Scalar
    noise_size: int


class LinearMap(eqx.Module):
    """`v = center + scale * (x + basis^T stretch basis x)`.

    A map from round coordinates to displacements.

    `basis` has orthonormal rows, `stretch` is symmetric, so `I + basis^T stretch basis` is the root
    of a covariance.
    """

    center: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    basis: Float[Array, "terms dim"]
    stretch: Float[Array, "terms terms"]

    def displacement(self, x: Float[Array, "*points dim"]) -> Float[Array, "*points dim"]:
        """Map round coordinates to a displacement from the centre of the problem."""
        return self.center + self.scale * self._root(x)

    def pull_back(self, gradient: Float[Array, "*points dim"]) -> Float[Array, "*points dim"]:
        """Map a gradient with respect to the displacement to one in round coordinates."""
        return self._root(self.scale * gradient)

    def round(self, displacement: Float[Array, "*points dim"]) -> Float[Array, "*points dim"]:
        """Invert `displacement`."""
        x = (displacement - self.center) / self.scale
        identity = jnp.eye(self.stretch.shape[0], dtype=self.stretch.dtype)
        inverse = jnp.linalg.inv(identity + self.stretch) - identity
        return x + (x @ self.basis.T) @ inverse @ self.basis

    def _root(self, x):
        # stretch is symmetric; of many points these are two products of matrices
        return x + (x @ self.basis.T) @ self.stretch @ self.basis


class Outer(NamedTuple):
    """Matrices of low rank, `sum_t left[b, t] right[b, t]^T` for block b, whose norms need no matrix."""

    left: Float[Array, "blocks terms rank"]
    right: Float[Array, "blocks terms dim"]

    def row_squares(self) -> Float[Array, "blocks rank"]:
        """Return the squared norm of every row.

        Where the terms cancel, rounding would leave it below zero.
        """
        inner = jnp.einsum("btd,bsd->bts", self.right, self.right)
        return jnp.maximum(jnp.einsum("btr,bsr,bts->br", self.left, self.left, inner), 0.0)


class Blocks(NamedTuple):
    """The gradient of an array that is zero but for a few entries along its first axis, each of which weighs alike."""

    index: Int[Array, " blocks"]
    values: Float[Array, "blocks ..."] | Outer

    @property
    def dtype(self):
        """Return the floating dtype."""
        return jax.tree_util.tree_leaves(self.values)[0].dtype

    def scaled(self, factor: Array | float) -> "Blocks":
        """Multiply by a number, or an `Outer` by one for each entry of its left vectors."""
        if isinstance(self.values, Outer):
            return self._replace(values=self.values._replace(left=self.values.left * factor))
        return self._replace(values=self.values * factor)

    def square_norm(self) -> Scalar:
        """Sum the squares of all entries."""
        return jnp.sum(
            self.values.row_squares() if isinstance(self.values, Outer) else self.values**2
        )


class UpdateRules(NamedTuple):
    """How the optimiser treats each parameter: pytrees in the structure of the parameters.

    `rates` is the factor on the learning rate, `shared_rows` whether a row (the last axis) shares
    one second moment, `blocked` whether `ascent` gives the gradient as `Blocks` (worth it while a
    step has few draws), `damping` the size of a gradient below which steps shrink with it.
    """

    rates: PyTree
    shared_rows: PyTree
    blocked: PyTree
    damping: PyTree


class Annealed(NamedTuple):
    """Temperature of the mixture weights and entropy bonus of one step."""

    temperature: Scalar
    entropy_bonus: Scalar


def num_groups(num_draws: int, antithetic: bool) -> int:
    """Count the independent draws among `num_draws`.

    Half of them where they come in mirrored pairs.
    """
    return num_draws // 2 if antithetic and num_draws % 2 == 0 else num_draws


class AbstractFamily(eqx.Module):
    """A parametric distribution q over w, centred on w*.

    Laws, tested for every member of `FAMILIES`:

    1. `sample` and `log_prob` agree: `sample(...).log_prob == log_prob(sample(...).displacement)`,
    and
       `exp(log_prob)` integrates to one over w.
    2. `pullback` is an unbiased gradient of `E_q[ell - (1 + entropy_bonus) log q]`; `ascent` is a
    positive
       definite matrix times it.
    3. `second_moment` is E_q[v v^T].
    4. `control_variates` have the stated expectations under q.
    5. `linear_map` maps standard normals to draws with q's mean and covariance, that of the means'
    spread left out.

    A family holds no loop, optimiser, trace or file. Arrays inside it are fixed coordinates and
    masks.
    """

    scale: eqx.AbstractVar[Float[Array, " dim"]]
    # nats of ELBO over the window of the stopping rule below which more steps would not change llc
    negligible_gain: eqx.AbstractClassVar[float]

    entropy_bonus: eqx.AbstractVar[float]

    @classmethod
    @abc.abstractmethod
    def create(cls, config: VIConfig, geometry: Geometry) -> "AbstractFamily":
        """Build the configured family for one problem."""

    @property
    @abc.abstractmethod
    def num_moment_terms(self) -> int:
        """Count the rows of `second_moment`'s factors."""

    @abc.abstractmethod
    def init(
        self,
        key: Key,
        core: Float[Array, "core dim"],
        log_scale: Float[Array, " dim"],
        block: Array | int = 0,
    ) -> PyTree:
        """Start at a precision core and a scale in whitened coordinates."""

    @abc.abstractmethod
    def widened(self, params: PyTree, shift: Scalar) -> PyTree:
        """Return the parameters of q as a whole scaled by exp(shift), from a start about the center."""

    @abc.abstractmethod
    def trusting(self, trusted: Bool[Array, ""]) -> "AbstractFamily":
        """Return the family as it learns from a start that already agrees with the loss, where `trusted`."""

    @abc.abstractmethod
    def draw_noise(self, key: Key, num: int, block: Array | int = 0) -> PyTree[Array]:
        """Draw what `num` independent draws are made of, from the key's counters `block` to `block + NOISE_BLOCKS`."""

    @abc.abstractmethod
    def transform(
        self, params: PyTree, noise: PyTree, *, mirror: bool, cache: PyTree = None
    ) -> Draws:
        """Turn noise to draws.

        With `mirror`, follow them by their mirror images about the means.
        """

    def sample(
        self, params: PyTree, key: Key, num_draws: int, *, antithetic: bool, block: Array | int = 0
    ) -> Draws:
        """Draw `num_draws` times, in mirrored pairs (draw i with draw i + num_draws/2) if the number is even."""
        groups = num_groups(num_draws, antithetic)
        return self.transform(
            params, self.draw_noise(key, groups, block), mirror=groups < num_draws
        )

    @abc.abstractmethod
    def make_cache(self, params: PyTree) -> PyTree:
        """Return what `transform` can take over from step to step.

        None gives the same draws without it.
        """

    @abc.abstractmethod
    def log_prob(self, params: PyTree, displacement: Float[Array, " dim"]) -> Scalar:
        """Evaluate the normalised log density of w at `center + displacement`."""

    @abc.abstractmethod
    def pullback(
        self,
        params: PyTree,
        draws: Draws,
        log_density: Float[Array, " draws"],
        log_density_grad: Float[Array, "draws dim"],
        baseline: Scalar,
        *,
        antithetic: bool,
    ) -> PyTree:
        """Average over the draws the Euclidean gradient of the ELBO given log p and its gradient at each."""

    @abc.abstractmethod
    def ascent(
        self,
        params: PyTree,
        draws: Draws,
        log_density: Float[Array, " draws"],
        log_density_grad: Float[Array, "draws dim"],
        baseline: Scalar,
        *,
        antithetic: bool,
    ) -> PyTree:
        """Return the ascent direction that the optimiser takes.

        The same gradient in the family's own metric.
        """

    @abc.abstractmethod
    def apply_updates(
        self, params: PyTree, cache: PyTree, updates: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Add the optimiser's updates, given in the coordinates of `ascent`.

        Return the cache of the sum with it.
        """

    @abc.abstractmethod
    def update_rules(self, groups: int) -> UpdateRules:
        """Say how the optimiser treats each parameter where a step has `groups` independent draws."""

    @abc.abstractmethod
    def second_moment(self, params: PyTree) -> SecondMoment:
        """Return E_q[v v^T] as a diagonal plus a low rank."""

    @abc.abstractmethod
    def control_variates(
        self, params: PyTree, draws: Draws
    ) -> tuple[Float[Array, "draws columns"], Float[Array, " columns"]]:
        """Return functions of the draws, quadratic in v, and their exact expectations."""

    @abc.abstractmethod
    def linear_map(self, params: PyTree) -> LinearMap:
        """Return q's mean and a root of its covariance.

        What makes the posterior round as far as q knows it.
        """

    @abc.abstractmethod
    def resp_entropy(self, draws: Draws) -> Float[Array, " draws"]:
        """Return how undecided it is, in nats, which component each draw belongs to.

        0 where there is one.
        """

    @abc.abstractmethod
    def step_statistics(self, params: PyTree, draws: Draws) -> dict[str, Scalar]:
        """Return cheap scalars to trace at every step."""

    @abc.abstractmethod
    def slow_statistics(self, params: PyTree) -> dict[str, Scalar]:
        """Return scalars that cost a pass over the parameters, traced every `eval_every` steps."""

    @abc.abstractmethod
    def summary_arrays(self, params: PyTree) -> dict[str, Array]:
        """Return small arrays that describe the fitted q (weights, standard deviations)."""
