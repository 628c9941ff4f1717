"""The contracts of a variational family and their laws.

A family is three contracts in one class. `AbstractDistribution` is q as a distribution,
`AbstractMoments` is what q knows of its own second moments, and `AbstractUpdateRules` is how an
optimiser moves q. `AbstractFamily` joins them and adds how a fit starts q and what it traces.
Whatever a fit, an evaluation or a sampler calls is here, with defaults where most families need
nothing.
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._typing import Array, Bool, Float, Int, Key, PyTree, Scalar
from fastvi.families.moments import LinearMap, SecondMoment
from fastvi.families.updates import UpdateRules
from fastvi.kernels.order import upper_median

__all__ = [
    "AbstractDistribution",
    "AbstractFamily",
    "AbstractMoments",
    "AbstractUpdateRules",
    "Draws",
    "Geometry",
    "LinearMap",
    "SecondMoment",
    "TargetValues",
    "UpdateRules",
    "num_groups",
    "slow_start_factor",
]


# Factor on learning rates where the start agrees with the loss at once. At 1 the noise of
# minibatches leads away from such a start; the smaller it is, the more steps a start takes that is
# a little off.
SLOW_START_RATE = 0.25


class Draws(NamedTuple):
    """Draws from q.

    `displacement` is w - center in model coordinates; `log_prob` and `score` belong to w there.
    """

    displacement: Float[Array, "draws dim"]
    log_prob: Float[Array, " draws"]
    score: Float[Array, "draws dim"]
    record: Any  # what the family needs to pull gradients back


class TargetValues(NamedTuple):
    """The unnormalised log density of the target at draws, its gradients, and a baseline.

    The baseline is a running mean of `log_density - log q`. It lowers the variance of gradients
    that do not go along the path of a draw, and does not change their mean.
    """

    log_density: Float[Array, " draws"]
    gradient: Float[Array, "draws dim"]
    baseline: Scalar | float = 0.0


class Geometry(NamedTuple):
    """What a family is built on: the start of a fit, in whitened coordinates.

    Attributes:
        scale: S^{-1}, the model-space length of a whitened unit.
        core: Rows of the precision core B; the precision at the start is I + B^T B.
        rank: Rows of the core in use; the others are padding.
        unit: Length of a whitened unit in the coordinates of the whitener alone.
        noise_size: A bound on the core's rows that does not depend on the problem's curvature, so
            that draws do not either.
    """

    scale: Float[Array, " dim"]
    core: Float[Array, "core dim"]
    rank: Int[Array, ""]
    unit: Scalar
    noise_size: int


def num_groups(num_draws: int, antithetic: bool) -> int:
    """Count the independent draws among `num_draws`: half of them in mirrored pairs."""
    return num_draws // 2 if antithetic and num_draws % 2 == 0 else num_draws


def slow_start_factor(slow: Bool[Array, ""], dtype: Any) -> Scalar:
    """Return the factor on learning rates for `AbstractFamily.with_slow_start`."""
    # `slow` is a value of the program, which so holds for either rate.
    return jnp.where(slow, SLOW_START_RATE, 1.0).astype(dtype)


class AbstractDistribution(eqx.Module):
    """A parametric distribution q over w, as displacements v = w - w*.

    Laws:

    1. `sample` and `log_prob` agree: `draws.log_prob == log_prob(draws.displacement)` and
       `draws.score` is its gradient there.
    2. `exp(log_prob)` integrates to one over w.
    3. With `mirror`, draw i + groups is the mirror image of draw i, and has the same law.
    4. `pullback` is an unbiased gradient of `E_q[log_density - entropy_weight log q]`.

    Attributes:
        scale: The model-space length of a whitened unit.
        entropy_bonus: lambda_H in the objective `E_q[log_density - (1 + lambda_H) log q]`.
    """

    scale: eqx.AbstractVar[Float[Array, " dim"]]
    entropy_bonus: eqx.AbstractVar[Scalar | float]

    @property
    def entropy_weight(self) -> Scalar | float:
        """Weight of -log q in the objective."""
        return 1 + self.entropy_bonus

    @abc.abstractmethod
    def draw_noise(self, key: Key, num: int, block: Array | int = 0) -> PyTree[Array]:
        """Draw the noise of `num` independent draws.

        The noise comes from the key's counters of blocks `block` to `block + NOISE_BLOCKS`.
        """

    @abc.abstractmethod
    def transform(
        self, params: PyTree, noise: PyTree, *, mirror: bool, cache: PyTree = None
    ) -> Draws:
        """Turn noise into draws, followed by their mirror images where `mirror` is true.

        `cache` is what `make_cache` returns for these parameters. The draws are the same without.
        """

    def sample(
        self, params: PyTree, key: Key, num_draws: int, *, antithetic: bool, block: Array | int = 0
    ) -> Draws:
        """Draw `num_draws` times.

        Antithetic draws come in mirrored pairs if their number is even: draw i with draw
        i + num_draws / 2.
        """
        groups = num_groups(num_draws, antithetic)
        noise = self.draw_noise(key, groups, block)
        return self.transform(params, noise, mirror=groups < num_draws)

    @abc.abstractmethod
    def log_prob(self, params: PyTree, displacement: Float[Array, " dim"]) -> Scalar:
        """Evaluate the normalised log density of w at `center + displacement`."""

    @abc.abstractmethod
    def pullback(
        self, params: PyTree, draws: Draws, target: TargetValues, *, groups: int
    ) -> PyTree:
        """Return the Euclidean gradient of the objective, averaged over the draws.

        `groups` is the number of independent draws; the others are their mirror images.
        """


class AbstractMoments(eqx.Module):
    """What q knows of its own second moments.

    Laws:

    1. `second_moment` is E_q[v v^T].
    2. `control_variates` are functions of the draws with the stated expectations under q.
    3. `linear_map` maps standard normals to draws with q's mean and covariance; the spread of a
       mixture's means may be left out.
    """

    @property
    @abc.abstractmethod
    def num_moment_terms(self) -> int:
        """Count the rows of `second_moment`'s factors."""

    @abc.abstractmethod
    def second_moment(self, params: PyTree) -> SecondMoment:
        """Return E_q[v v^T] as a diagonal plus a low rank."""

    @abc.abstractmethod
    def linear_map(self, params: PyTree) -> LinearMap:
        """Return q's mean and a root of its covariance."""

    def control_variates(
        self, params: PyTree, draws: Draws
    ) -> tuple[Float[Array, "draws columns"], Float[Array, " columns"]]:
        """Return functions of the draws and their exact expectations.

        |v|^2 / 2 where a family has none of its own: the localizer's share of a quadratic loss.
        """
        columns = 0.5 * jnp.sum(draws.displacement**2, axis=-1, keepdims=True)
        return columns, 0.5 * jnp.sum(self.second_moment(params).marginal())[None]


class AbstractUpdateRules(AbstractDistribution):
    """How an optimiser moves the parameters of q.

    Laws:

    1. `ascent` is a positive definite matrix times `pullback`, in coordinates that
       `apply_updates` understands.
    2. `apply_updates` with updates of zero changes nothing; the cache that it returns is
       `make_cache` of the parameters that it returns.
    3. `update_rules` has the structure of the parameters, whatever the number of draws.
    """

    def ascent(self, params: PyTree, draws: Draws, target: TargetValues, *, groups: int) -> PyTree:
        """Return the direction that the optimiser takes: the gradient, in a metric of the family.

        The Euclidean gradient where a family has no metric of its own.
        """
        return self.pullback(params, draws, target, groups=groups)

    def make_cache(self, params: PyTree) -> PyTree:
        """Return what `transform` can take over from step to step; nothing for most families."""
        return ()

    def apply_updates(
        self, params: PyTree, cache: PyTree, updates: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Add the optimiser's updates, given in the coordinates of `ascent`.

        Return the parameters and their cache.
        """
        params = jax.tree_util.tree_map(jnp.add, params, updates)
        return params, self.make_cache(params)

    def update_rules(self, params: PyTree, groups: int) -> UpdateRules:
        """Say how to treat each parameter where a step has `groups` independent draws.

        Plain Adam where a family does not say otherwise.
        """
        return UpdateRules.plain(params)


class AbstractFamily(AbstractUpdateRules, AbstractMoments):
    """A variational family: a distribution, its moments and its update rules.

    A family holds no loop, optimiser, trace or file. Its arrays are fixed coordinates, masks and
    constants of the objective; parameters are values beside it. Programs take a family as an
    argument, so that constants which are arrays can change without a compilation.

    The class has an attribute `Settings`, a frozen dataclass of hashable values with a default
    each. Its fields carry the names of the configuration's fields, by which `config` fills them.
    """

    Settings: ClassVar[type]
    # Nats of ELBO over the window of the stopping rule below which more steps would not change llc.
    # A smaller gain runs more steps, a larger one stops sooner.
    negligible_gain: ClassVar[float] = 0.5

    @classmethod
    @abc.abstractmethod
    def create(cls, settings: Any, geometry: Geometry) -> "AbstractFamily":
        """Build the family of one problem from its `Settings` and the start of the fit."""

    @classmethod
    def check(cls, settings: Any, dim: int) -> None:
        """Refuse settings that cannot be met in `dim` dimensions, before anything compiles.

        Raises:
            ConfigError: If there is such a setting.
        """

    @abc.abstractmethod
    def init(
        self, key: Key, core: Float[Array, "core dim"], log_scale: Float[Array, " dim"]
    ) -> PyTree:
        """Start at a precision core and a scale in whitened coordinates.

        `key` is a chain's. Noise comes from its counters of the start, `kernels.noise.streams`.
        """

    @abc.abstractmethod
    def widened(self, params: PyTree, shift: Scalar) -> PyTree:
        """Return the parameters of q with every displacement scaled by exp(shift).

        q is that of `init`, whose mean is w*.
        """

    def with_slow_start(self, slow: Bool[Array, ""]) -> "AbstractFamily":
        """Return the family with smaller learning rates where `slow` is true.

        It is true where the start agrees with the loss. Minibatch noise can then only make worse
        what was computed from all data at once.
        """
        return self

    def annealed(self, temperature: Scalar, entropy_bonus: Scalar) -> "AbstractFamily":
        """Return the family at a temperature of its mixture weights and an entropy bonus.

        A family without mixture weights has no use for the temperature.
        """
        return dataclasses.replace(self, entropy_bonus=entropy_bonus)

    def log_weights(self, params: PyTree) -> Float[Array, " comp"]:
        """Evaluate the log weights of the mixture's components; one component of weight 1 here."""
        return jnp.zeros(1, self.scale.dtype)

    def pruned(self, params: PyTree, keep: Bool[Array, " comp"]) -> PyTree:
        """Return the parameters with no weight left for the components that are not kept."""
        return params

    def resp_entropy(self, draws: Draws) -> Float[Array, " draws"]:
        """Return how undecided it is, in nats, which component each draw belongs to."""
        return jnp.zeros_like(draws.log_prob)

    def step_statistics(self, params: PyTree, draws: Draws) -> dict[str, Scalar]:
        """Return cheap scalars to trace at every step."""
        one, zero = jnp.ones((), self.scale.dtype), jnp.zeros((), self.scale.dtype)
        return {
            "resp_entropy": zero,
            "pi_min": one,
            "pi_max": one,
            "pi_entropy": zero,
            "cholesky_ridge": zero,
        }

    def slow_statistics(self, params: PyTree) -> dict[str, Scalar]:
        """Return scalars that cost a pass over the parameters, traced every `eval_every` steps."""
        deviation = self.deviations(params)
        return {
            "D_sqrt_min": jnp.min(deviation),
            "D_sqrt_max": jnp.max(deviation),
            "D_sqrt_med": upper_median(deviation),
            "A_col_norm_p95": jnp.zeros((), deviation.dtype),
            "A_col_norm_max": jnp.zeros((), deviation.dtype),
        }

    def summary_arrays(self, params: PyTree) -> dict[str, Array]:
        """Return small arrays that describe the fitted q: weights and standard deviations."""
        return {"pi": jnp.exp(self.log_weights(params)), "D_sqrt": self.deviations(params)}

    def deviations(self, params: PyTree) -> Float[Array, " dim"]:
        """Return standard deviations in model coordinates, as the statistics report them.

        Those of the marginals about w* where a family has no diagonal factor of its own.
        """
        return jnp.sqrt(self.second_moment(params).marginal())
