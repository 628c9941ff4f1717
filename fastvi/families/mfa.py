"""Mixture of factor analyzers with a shared precision core and free means."""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Bool, Float, Key, Scalar
from fastvi.families.base import AbstractFamily, Draws, Geometry, TargetValues, slow_start_factor
from fastvi.families.moments import LinearMap, SecondMoment, symmetric_root
from fastvi.families.updates import Blocks, UpdateRules
from fastvi.kernels import OPS, mixture_grad, woodbury
from fastvi.kernels.noise import normal, streams, words
from fastvi.kernels.triangular import inverse_root
from fastvi.kernels.woodbury import Draw, Mixture, Noise

LOG_SCALE_BOUND = 20.0  # |log D^{1/2}| in whitened coordinates: exp(2 * 20) stays finite in float32
FACTOR_INIT = 0.1  # norm of a factor's rows at the start, in standard deviations
# A factor's row has dim entries, so equal steps per entry would turn it by sqrt(dim) steps.
CORE_RATE, FACTOR_RATE = 5.0, 2.0
# Independent draws of a step up to which each moves the factors of its own component alone. More
# are averaged into one gradient of all factors.
MAX_BLOCKS = 2
DAMPING = 0.05  # entries of natural gradients are O(1) off the optimum


@dataclasses.dataclass(frozen=True)
class MFASettings:
    """What the mixture reads of the configuration, under the names of its fields.

    Attributes:
        M: Number of components.
        r: Rank of each component, cut to the dimension.
        r_per_component: Ranks of the components in place of `r`; None: all have rank `r`.
        means: "shared", "center" or "component".
        implementation: Of the kernel of draws and densities, a name in `OPS["woodbury"]`; None: the
            platform's own.
        alpha_temperature: T in pi = softmax(logits / T); 1 where it falls during the fit.
        alpha_temperature_frac: Share of the steps in which the temperature falls to 1; 0: it stays.
        alpha_dirichlet_prior: alpha_0 of the prior on pi; None: 1, no prior.
        entropy_bonus: lambda_H in the objective; 0 where it ends during the fit.
        entropy_bonus_steps: Steps after which the bonus ends; None: it stays.
        mixture_cap: Most components that pruning keeps; None: no bound.
        prune_threshold: Least weight that pruning keeps; None: no bound.
    """

    M: int = 8
    r: int = 2
    r_per_component: tuple[int, ...] | None = None
    means: str = "shared"
    implementation: str | None = None
    alpha_temperature: float = 1.0
    alpha_temperature_frac: float = 0.0
    alpha_dirichlet_prior: float | None = None
    entropy_bonus: float = 0.0
    entropy_bonus_steps: int | None = None
    mixture_cap: int | None = None
    prune_threshold: float | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each component."""
        return (self.r,) * self.M if self.r_per_component is None else self.r_per_component

    @property
    def prunes(self) -> bool:
        """Whether components are pruned during the fit."""
        return self.mixture_cap is not None or self.prune_threshold is not None


class MFAParams(NamedTuple):
    """Parameters in whitened coordinates u = (w - center) / scale, or what belongs to each.

    The parameters are arrays, of shape (comp,), (locs, dim), (dim,), (core, dim) and (comp, rank,
    dim). A gradient is of the same shapes, but its `factors` are `Blocks` where few draws made it.
    """

    logits: Any
    offsets: Any
    log_scale: Any
    core: Any
    factors: Any


class Normals(NamedTuple):
    """Noise of several draws.

    Uniform for the label, standard normal for bulk, factors and core in one array.
    """

    quantile: Float[Array, " groups"]
    normals: Float[Array, "groups all"]


class Record(NamedTuple):
    """Noise and kernel output of every draw, stacked in front."""

    noise: Noise
    drawn: Draw
    grams: woodbury.Grams


class MFA(AbstractFamily):
    """q = sum_m pi_m N(mu_m, S^{-1} D^{1/2} (P^{-1} + A_m^T A_m) D^{1/2} S^{-1}).

    See docs/math.md, "Family".

    Attributes:
        scale: S^{-1}, the model-space length of one whitened unit.
        core_mask: 1 for rows of the core in use, 0 for padding.
        lr_factor: Factor on the learning rates of all but the logits.
        ranks: Columns in use for each component.
        means: "shared", "center" or "component".
        noise_size: Normals drawn for the core, at least its rows: draws do not depend on the
            padding.
        temperature: T in pi = softmax(logits / T).
        dirichlet: alpha_0 of the prior on pi (1: none).
        entropy_bonus: lambda_H in the objective E[ell] - (1 + lambda_H) E[log q].
        implementation: Name of the implementation of `woodbury`; None for the platform's own.
        prunes: Whether logits may be minus infinity: components without weight.
    """

    Settings: ClassVar = MFASettings
    scale: Float[Array, " dim"]
    core_mask: Float[Array, " core"]
    lr_factor: Scalar
    ranks: tuple[int, ...] = eqx.field(static=True)
    means: str = eqx.field(static=True)
    noise_size: int = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True, default=None)
    prunes: bool = eqx.field(static=True, default=False)
    temperature: Scalar | float = 1.0
    dirichlet: Scalar | float = 1.0
    entropy_bonus: Scalar | float = 0.0

    @classmethod
    def create(cls, settings: MFASettings, geometry: Geometry) -> "MFA":
        """Build the family; see `AbstractFamily.create`."""
        dim, dtype = geometry.scale.size, geometry.scale.dtype
        # what changes during a fit stands here at its value of the end, which evaluations read
        falls, ends = settings.alpha_temperature_frac > 0, settings.entropy_bonus_steps is not None
        prior = settings.alpha_dirichlet_prior
        return cls(
            scale=geometry.scale,
            lr_factor=jnp.ones((), dtype),
            core_mask=jax.device_put(
                (np.arange(geometry.core.shape[0]) < geometry.rank).astype(dtype)
            ),
            ranks=tuple(min(rank, dim) for rank in settings.ranks),
            means=settings.means,
            noise_size=geometry.noise_size,
            implementation=settings.implementation,
            prunes=settings.prunes,
            # Arrays, so that other values need no other program.
            temperature=jnp.asarray(1.0 if falls else settings.alpha_temperature, dtype),
            dirichlet=jnp.asarray(1.0 if prior is None else prior, dtype),
            entropy_bonus=jnp.asarray(0.0 if ends else settings.entropy_bonus, dtype),
        )

    @classmethod
    def check(cls, settings: MFASettings, dim: int) -> None:
        """Refuse an implementation that cannot run here; see `AbstractFamily.check`."""
        if settings.implementation is not None:
            OPS["woodbury"].select(settings.implementation)

    def annealed(self, temperature, entropy_bonus):
        """Set both; see `AbstractFamily.annealed`."""
        return dataclasses.replace(self, temperature=temperature, entropy_bonus=entropy_bonus)

    def log_weights(self, params: MFAParams) -> Float[Array, " comp"]:
        """Evaluate log pi."""
        return jax.nn.log_softmax(params.logits / self.temperature)

    def pruned(self, params: MFAParams, keep) -> MFAParams:
        """Give the others a logit of minus infinity, which no gradient brings back."""
        return params._replace(logits=jnp.where(keep, params.logits, -jnp.inf))

    @property
    def num_components(self) -> int:
        """Count the components."""
        return len(self.ranks)

    @property
    def num_moment_terms(self) -> int:
        """Count core rows, factor rows and means."""
        return self.core_mask.size + self.num_components * max(self.ranks) + self.num_offsets

    def with_slow_start(self, slow):
        """Slow down where there is a core to keep; see `AbstractFamily.with_slow_start`."""
        slow = slow & (jnp.sum(self.core_mask) > 0)
        return dataclasses.replace(self, lr_factor=slow_start_factor(slow, self.scale.dtype))

    @property
    def num_offsets(self) -> int:
        """Count the free means."""
        return {"center": 0, "shared": 1, "component": self.num_components}[self.means]

    def init(
        self, key: Key, core: Float[Array, "core dim"], log_scale: Float[Array, " dim"]
    ) -> MFAParams:
        """Start at the given core and scale.

        Weights are equal, and factors are small and shaped like P^{-1/2}.
        """
        dim, rank, dtype = self.scale.size, max(self.ranks), self.scale.dtype
        rows = self.num_components * rank
        noise = normal(key, (rows, dim + self.noise_size), dtype, block=streams.START)
        # the core's noise comes last, so that its padding does not change the rest
        eps, zeta = noise[:, :dim], noise[:, dim : dim + core.shape[0]]
        factors = woodbury.precision_root(core, eps, zeta).reshape(self.num_components, rank, dim)
        return MFAParams(
            logits=jnp.zeros(self.num_components, dtype),
            offsets=jnp.zeros((self.num_offsets, dim), dtype),
            log_scale=log_scale,
            core=core * self.core_mask[:, None],
            # a row of dim normals has the norm sqrt(dim)
            factors=self._mask(factors * (FACTOR_INIT / math.sqrt(dim))),
        )

    def widened(self, params: MFAParams, shift: Scalar) -> MFAParams:
        """Scale D; see `AbstractFamily.widened`."""
        return params._replace(log_scale=params.log_scale + shift)

    def mixture(self, params: MFAParams) -> Mixture:
        """Return the mixture that the kernels see.

        Temperature, masks and the bound on scales applied.
        """
        return Mixture(
            log_weights=self.log_weights(params),
            offsets=params.offsets,
            log_scale=jnp.clip(params.log_scale, -LOG_SCALE_BOUND, LOG_SCALE_BOUND),
            core=params.core * self.core_mask[:, None],
            factors=self._mask(params.factors),
        )

    def _mask(self, factors):
        if len(set(self.ranks)) == 1:
            return factors  # all columns are in use
        return factors * self._used[..., None]

    def _mask_rows(self, noise: Noise) -> Float[Array, "draws rank"]:
        """Zero the entries of z whose columns the drawn component does not use."""
        # Padding of a factor is zero in its draws, and must be zero in its gradient too.
        if len(set(self.ranks)) == 1:
            return noise.z
        return noise.z * jnp.asarray(self._used)[noise.label]

    @property
    def _used(self) -> Bool[np.ndarray, "comp rank"]:
        """Return which columns each component uses; the others are padding."""
        return np.arange(max(self.ranks)) < np.asarray(self.ranks)[:, None]

    def make_cache(self, params: MFAParams):
        """Return A_m A_m^T for every component.

        A step changes the factors of the drawn ones only.
        """
        return woodbury.factor_grams(self._mask(params.factors), implementation=self.implementation)

    def draw_noise(self, key: Key, num: int, block: Array | int = 0) -> Normals:
        """Draw noise; see `AbstractFamily.draw_noise`."""
        dtype, size = self.scale.dtype, self.scale.size + max(self.ranks) + self.noise_size
        # Normals take the first block, so that labels share no words with them.
        # 24 bits are all that float32 holds below 1
        quantile = (words(key, num, block=block + 1) >> 8).astype(dtype) * 2**-24
        return Normals(quantile, normal(key, (num, size), dtype, block=block))

    def _noise(self, mixture: Mixture, drawn: Normals) -> Noise:
        """Sort noise into label, eps, zeta and z."""
        dim, (num_core, rank) = self.scale.size, (mixture.core.shape[0], mixture.factors.shape[1])
        # the label is the component in whose share of [0, 1) the quantile falls
        ends = jnp.cumsum(jnp.exp(mixture.log_weights))
        if self.prunes:
            ends = ends / ends[-1]  # rounding must not reach a component without weight
        label = jnp.sum(ends[:-1] <= drawn.quantile[:, None], axis=-1)
        return Noise(
            label=label,
            eps=drawn.normals[:, :dim],
            zeta=drawn.normals[:, dim + rank : dim + rank + num_core],
            z=drawn.normals[:, dim : dim + rank],
        )

    def transform(self, params: MFAParams, noise: Normals, *, mirror: bool, cache=None) -> Draws:
        """Turn normals to draws; see `AbstractFamily.transform`."""
        mixture = self.mixture(params)
        grams = woodbury.grams(mixture, cache, implementation=self.implementation)
        draw = functools.partial(woodbury.draw, mixture, grams, implementation=self.implementation)
        sorted_noise = self._noise(mixture, noise)
        drawn = _for_each(draw, sorted_noise)
        if mirror:
            mirrored = sorted_noise._replace(
                eps=-sorted_noise.eps, zeta=-sorted_noise.zeta, z=-sorted_noise.z
            )
            # about means of their own, the density at a mirror image is another one
            if self.num_offsets > 1:
                reflected = _for_each(draw, mirrored)
            else:
                reflected = _reflect(drawn, mixture.offsets.sum(0))
            sorted_noise = _concatenate(sorted_noise, mirrored)
            drawn = _concatenate(drawn, reflected)
        return Draws(
            displacement=self.scale * drawn.displacement,
            log_prob=drawn.log_prob - jnp.sum(jnp.log(self.scale)),
            score=drawn.score / self.scale,
            record=Record(sorted_noise, drawn, grams),
        )

    def log_prob(self, params: MFAParams, displacement: Float[Array, " dim"]):
        """Evaluate log q; see `AbstractFamily.log_prob`."""
        mixture = self.mixture(params)
        name = self.implementation
        grams = woodbury.grams(mixture, implementation=name)
        found = woodbury.log_prob(mixture, grams, displacement / self.scale, implementation=name)
        return found - jnp.sum(jnp.log(self.scale))

    def pullback(self, params, draws, target, *, groups) -> MFAParams:
        """Return the STL and Rao-Blackwellised gradient; see `AbstractDistribution.pullback`."""
        return self._gradient(params, draws, target, groups, "euclidean", as_blocks=False)

    def ascent(self, params, draws, target, *, groups) -> MFAParams:
        """Return the natural direction, factors as blocks for the few labels drawn.

        See `AbstractUpdateRules.ascent`.
        """
        return self._gradient(
            params, draws, target, groups, "natural", as_blocks=groups <= MAX_BLOCKS
        )

    def _gradient(
        self,
        params: MFAParams,
        draws: Draws,
        target: TargetValues,
        groups: int,
        metric: str,
        *,
        as_blocks: bool,
    ) -> MFAParams:
        """Average over the draws, and zero what masks and the bound on scales hold fixed."""
        record, mixture = draws.record, self.mixture(params)
        # the score holds the parameters inside log q fixed, which sticks the landing
        cotangents = self.scale * target.gradient - self.entropy_weight * record.drawn.score

        def pull(noise, drawn, cotangent):
            found = mixture_grad.pullback(
                mixture, record.grams, noise, drawn, cotangent, metric=metric
            )
            return (found.offsets, found.log_scale, found.core), found.factor

        (offsets, log_scale, core), right = _over_draws(
            pull, (record.noise, record.drawn, cotangents)
        )
        label, left = record.noise.label, self._mask_rows(record.noise)
        if as_blocks:
            factors = _as_blocks(label, left, right, groups)
        else:
            factors = _written_out(label, left, right, self.num_components)
        # Beyond the bound a scale does not move q.
        inside = jnp.abs(params.log_scale) <= LOG_SCALE_BOUND
        return MFAParams(
            logits=self._logit_gradient(params, draws, target, groups),
            offsets=offsets,
            log_scale=jnp.where(inside, log_scale, 0.0),
            core=core * self.core_mask[:, None],
            factors=factors,
        )

    def _logit_gradient(self, params, draws, target, groups):
        """Rao-Blackwellise over the label, with a leave-one-out baseline over independent draws."""
        weights, baseline = jnp.exp(self.log_weights(params)), target.baseline
        value = target.log_density - self.entropy_weight * draws.log_prob
        direction = draws.record.drawn.responsibilities - weights
        value, direction = value.reshape(-1, groups), direction.reshape(-1, groups, weights.size)
        # a baseline from the other draws is independent of this one, and leaves the mean as it is
        if groups > 1:
            mean = jnp.mean(value, axis=0)
            baseline = (jnp.sum(mean) - mean) / (groups - 1)
        centred = jnp.mean(direction * (value - baseline)[..., None], axis=(0, 1))
        # d/dlogits of (alpha_0 - 1) sum log pi over the components that have weight
        alive = weights > 0 if self.prunes else jnp.ones_like(weights)
        prior = (self.dirichlet - 1) * (alive - jnp.sum(alive) * weights)
        return (centred + prior) / self.temperature

    def apply_updates(self, params: MFAParams, cache, updates: MFAParams):
        """Add updates: means in units of D^{1/2}, factors as blocks.

        The core is moved along with log_scale so that `core D^{-1/2}`, its steep directions in u,
        stays put: left where it is, a change of D by one part in a thousand would turn a direction
        a thousand times steeper than its neighbours into them.
        """
        bounded = jnp.clip(params.log_scale, -LOG_SCALE_BOUND, LOG_SCALE_BOUND)
        log_scale = jnp.clip(
            params.log_scale + updates.log_scale, -LOG_SCALE_BOUND, LOG_SCALE_BOUND
        )
        # Natural directions of the means are in units of D^{1/2}, docs/math.md "Gradients".
        scale = jnp.exp(bounded)
        factors, cache = self._moved_factors(params, cache, updates.factors)
        params = MFAParams(
            logits=params.logits + updates.logits,
            offsets=params.offsets + scale * updates.offsets,
            log_scale=log_scale,
            core=(params.core + updates.core) * jnp.exp(log_scale - bounded),
            factors=factors,
        )
        return params, cache

    def _moved_factors(self, params: MFAParams, cache, update):
        """Add an update to the factors; return the products A_m A_m^T with them."""
        if not isinstance(update, Blocks):
            # all factors moved, and all their products with them
            factors = params.factors + update
            return factors, self.make_cache(params._replace(factors=factors))
        factors, products = mixture_grad.update_factors(params.factors, *update)
        if len(set(self.ranks)) > 1:
            # the products of columns that are not in use count as zero, as in `make_cache`
            used = jnp.asarray(self._used)[update.index]
            products = products * used[:, :, None] * used[:, None, :]
        for label, product in zip(update.index, products, strict=True):
            cache = cache.at[label].set(product, mode="promise_in_bounds")
        return factors, cache

    def update_rules(self, params: MFAParams, groups: int) -> UpdateRules:
        """Turn rows of core and factors by equal angles in any dimension; keep their directions.

        With few draws a factor moves only when its component is drawn, in one of M steps, and takes
        sqrt(M) times as long a step.
        """
        lazily = groups <= MAX_BLOCKS
        root, shared = float(np.sqrt(self.scale.size)), self.lr_factor
        core = min(1.0, CORE_RATE / root) * shared
        stride = float(np.sqrt(self.num_components)) if lazily else 1.0
        lazy = min(1.0, FACTOR_RATE / root) * stride * shared
        return UpdateRules(
            rates=MFAParams(logits=1.0, offsets=shared, log_scale=shared, core=core, factors=lazy),
            shared_rows=MFAParams(
                logits=False, offsets=True, log_scale=False, core=True, factors=True
            ),
            blocked=MFAParams(
                logits=False, offsets=False, log_scale=False, core=False, factors=lazily
            ),
            damping=MFAParams(*(DAMPING,) * 5),
            per_component=MFAParams(
                logits=True,
                offsets=self.means == "component",
                log_scale=False,
                core=False,
                factors=True,
            ),
        )

    def _location_weights(self, weights):
        """Return the share of q about each of the free means: all of it about a shared one."""
        return weights if self.num_offsets > 1 else jnp.ones(self.num_offsets, weights.dtype)

    def second_moment(self, params: MFAParams) -> SecondMoment:
        """Return E_q[v v^T]; see `AbstractFamily.second_moment`."""
        mixture = self.mixture(params)
        grams = woodbury.grams(mixture, implementation=self.implementation)
        deviation = self.scale * jnp.exp(mixture.log_scale)
        weights = jnp.exp(mixture.log_weights)
        rank = mixture.factors.shape[1]
        # P^{-1} = I - B^T C_B^{-1} B, so the core enters with weights of -1
        narrowed = grams.core_half @ mixture.core
        widened = mixture.factors.reshape(-1, self.scale.size)
        return SecondMoment(
            diagonal=deviation**2,
            factors=jnp.concatenate(
                [narrowed * deviation, widened * deviation, mixture.offsets * self.scale]
            ),
            weights=jnp.concatenate(
                [
                    -jnp.ones(narrowed.shape[0], weights.dtype),
                    jnp.repeat(weights, rank),
                    self._location_weights(weights),
                ]
            ),
            coefficients=jnp.zeros((0, self.num_moment_terms), weights.dtype),
        )

    def linear_map(self, params: MFAParams) -> LinearMap:
        """Return the root of q's covariance about its mean; see `AbstractFamily.linear_map`."""
        mixture, dim = self.mixture(params), self.scale.size
        weights = jnp.exp(mixture.log_weights)
        # The covariance of a mixture is the weighted mean of those of its components.
        factors = (mixture.factors * jnp.sqrt(weights)[:, None, None]).reshape(-1, dim)
        # outside the span of core and factors the covariance is D
        basis = jnp.linalg.qr(jnp.concatenate([mixture.core, factors]).T)[0].T
        core, wide = basis @ mixture.core.T, basis @ factors.T
        identity = jnp.eye(basis.shape[0], dtype=basis.dtype)
        half = inverse_root(core @ core.T).root
        stretch = symmetric_root(half.T @ half + wide @ wide.T) - identity
        center = self._location_weights(weights) @ mixture.offsets
        return LinearMap(
            self.scale * center, self.scale * jnp.exp(mixture.log_scale), basis, stretch
        )

    def control_variates(self, params: MFAParams, draws: Draws):
        """Return |x|^2 / 2 and |B x|^2 / 2 about q's mean, and |v|^2 / 2.

        The first two are q's own curvature, split into bulk and core. Where q is the posterior of a
        quadratic loss, that loss is a combination of the three; the last is the localizer's share.
        Their expectations follow from E[x_core x_core^T] = P^{-1} without cancellation in steep
        directions.
        """
        mixture, grams = self.mixture(params), draws.record.grams
        weights = jnp.exp(mixture.log_weights)
        locations = self._location_weights(weights)
        center = locations @ mixture.offsets
        apart = (mixture.offsets - center) / jnp.exp(mixture.log_scale)
        x = (draws.record.drawn.displacement - center) / jnp.exp(mixture.log_scale)
        core_x = x @ mixture.core.T
        radius2 = jnp.sum(draws.displacement**2, -1)
        values = jnp.stack([jnp.sum(x**2, -1), jnp.sum(core_x**2, -1), radius2], axis=-1)
        moment = self.second_moment(params)
        num_core = mixture.core.shape[0]
        # tr P^{-1} = dim - num_core + tr C_B^{-1}, and tr B P^{-1} B^T = num_core - tr C_B^{-1}
        inverse_trace = jnp.sum(grams.core_half**2)
        wide = jnp.sum(weights[:, None] * jnp.sum(mixture.factors**2, -1))
        wide_core = jnp.sum(weights[:, None] * jnp.sum(grams.cross**2, 1))
        spread = locations @ jnp.sum(apart**2, -1)
        spread_core = locations @ jnp.sum((apart @ mixture.core.T) ** 2, -1)
        expected = jnp.stack(
            [
                x.shape[-1] - num_core + inverse_trace + wide + spread,
                num_core - inverse_trace + wide_core + spread_core,
                jnp.sum(moment.diagonal) + moment.weights @ jnp.sum(moment.factors**2, -1),
            ]
        )
        return 0.5 * values, 0.5 * expected

    def resp_entropy(self, draws: Draws):
        """Return the entropy of every draw's responsibilities.

        See `AbstractFamily.resp_entropy`.
        """
        return jnp.sum(jax.scipy.special.entr(draws.record.drawn.responsibilities), axis=-1)

    def step_statistics(self, params: MFAParams, draws: Draws):
        """Trace the weights and how decided the responsibilities are."""
        weights = jnp.exp(self.log_weights(params))
        alive = weights > 0
        effective = {"effective_M": jnp.sum(alive).astype(weights.dtype)} if self.prunes else {}
        return {
            "resp_entropy": jnp.mean(self.resp_entropy(draws)),
            "pi_min": jnp.min(weights, where=alive, initial=1.0)
            if self.prunes
            else jnp.min(weights),
            "pi_max": jnp.max(weights),
            "pi_entropy": jnp.sum(jax.scipy.special.entr(weights)),
            "cholesky_ridge": draws.record.grams.ridged,
            **effective,
        }

    def slow_statistics(self, params: MFAParams):
        """Trace the spread of D^{1/2} in model coordinates and the largest factor row."""
        norms = jnp.sqrt(self._factor_norm2(params))[self._used]
        largest = {"A_col_norm_max": jnp.max(norms, initial=0.0)}
        if norms.size:
            largest["A_col_norm_p95"] = jnp.quantile(norms, 0.95)
        return super().slow_statistics(params) | largest

    def _factor_norm2(self, params):
        """Return |A_m row|^2 of every component, zero for masked rows and pruned components."""
        norm2 = jnp.sum(self._mask(params.factors) ** 2, axis=-1)
        return norm2 * (params.logits > -jnp.inf)[:, None] if self.prunes else norm2

    def deviations(self, params: MFAParams):
        """Return D^{1/2} in model coordinates."""
        return self.scale * jnp.exp(jnp.clip(params.log_scale, -LOG_SCALE_BOUND, LOG_SCALE_BOUND))

    def summary_arrays(self, params: MFAParams):
        """Add the squared lengths of the factors' rows."""
        return super().summary_arrays(params) | {"factor_norm2": self._factor_norm2(params)}


def _for_each(function, stacked):
    """Apply `function` to each leading entry, unrolled: flat matvecs stay flat on CPU."""
    num = jax.tree_util.tree_leaves(stacked)[0].shape[0]
    if num > 2:  # a loop: written out, each draw would be compiled anew
        return jax.lax.map(function, stacked)
    results = [function(_take(stacked, index)) for index in range(num)]
    return jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *results)


def _over_draws(function, stacked):
    """Apply `function` to every draw; average its first result, and stack its second.

    Few draws are written out, so that the terms of an average fuse into the update that reads them.
    """
    num = jax.tree_util.tree_leaves(stacked)[0].shape[0]
    if num > 2 * MAX_BLOCKS:
        averaged, kept = jax.vmap(function)(*stacked)
        return jax.tree_util.tree_map(lambda leaf: jnp.mean(leaf, axis=0), averaged), kept
    each = [function(*_take(stacked, index)) for index in range(num)]
    averaged, kept = zip(*each, strict=True)
    mean = jax.tree_util.tree_map(lambda *leaves: sum(leaves) / num, *averaged)
    return mean, jnp.stack(kept)


def _as_blocks(label, left, right, groups: int) -> Blocks:
    """Gather the products of each independent draw and of its mirror images."""
    terms = label.size // groups
    left, right = (
        jnp.swapaxes(side.reshape(terms, groups, -1), 0, 1) for side in (left / terms, right)
    )
    return Blocks(label[:groups], left, right)


def _written_out(label, left, right, num_components: int) -> Float[Array, "comp rank dim"]:
    """Average the products `left right^T`, each in the place of its component.

    It is one matrix product over the draws.
    """
    drawn = jax.nn.one_hot(label, num_components, dtype=left.dtype) / label.size
    wide = (drawn[:, :, None] * left[:, None, :]).reshape(label.size, -1)
    return (wide.T @ right).reshape(num_components, left.shape[1], right.shape[1])


def _take(stacked, index):
    return jax.tree_util.tree_map(lambda leaf: leaf[index], stacked)


def _concatenate(first, second):
    return jax.tree_util.tree_map(lambda a, b: jnp.concatenate([a, b]), first, second)


def _reflect(drawn: Draw, offset) -> Draw:
    """Mirror draws about a common mean: odd quantities change sign, the density does not."""
    return drawn._replace(
        x=-drawn.x,
        x_core=-drawn.x_core,
        core_x=-drawn.core_x,
        displacement=2 * offset - drawn.displacement,
        score=-drawn.score,
    )
