"""A normalizing flow on the leading coordinates of a learned linear map."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Array, Float, Key, PyTree, Scalar
from fastvi.config.basis import Basis
from fastvi.families.backends import AbstractBackend, find_backend
from fastvi.families.backends.base import standard_log_prob
from fastvi.families.base import (
    AbstractFamily,
    Annealed,
    Draws,
    Geometry,
    LinearMap,
    SecondMoment,
    UpdateRules,
)
from fastvi.families.lift import Lift, Lifted, LiftParams, core_root, make_frame
from fastvi.kernels.noise import normal

FRAME_SEED, MOMENT_SEED = 1, 2
# latent draws that stand for the latent distribution in moments; no loss is evaluated at them
MOMENT_DRAWS = 4096
SCALE_DRAWS = 256  # the same for traces
TRUSTED_RATE = 0.25  # factor on the linear map's rates where the start agrees with the loss at once
# a row of the root has `frame` entries, so equal steps per entry would turn it by sqrt(frame) steps
ROOT_RATE = 5.0
# Factor on the learning rate for the flow's own parameters, and the damping of Adam for them. Few
# draws fall in any bin of a spline: at the others' rate its noise leads away from a start that is
# right already.
FLOW_RATE, FLOW_DAMPING = 0.25, 1e-8
SPLINE_RATE, SPLINE_DAMPING = 0.05, 1e-2
LIFT_DAMPING = 0.05  # of natural gradients, which are O(1) off the optimum


class FlowParams(NamedTuple):
    """Parameters in whitened coordinates u = (w - center) / scale.

    Those of the linear map and of the flow.
    """

    lift: LiftParams
    flow: Any


class Record(NamedTuple):
    """What gradients need of every draw.

    `pull` takes cotangents of the flow's draws to its parameters.
    """

    lifted: Lifted
    latent: Float[Array, "draws frame"]
    log_det: Float[Array, " draws"]
    score: Float[Array, "draws dim"]
    pull: Any


class Flow(AbstractFamily):
    """q of u = T(a, xi), docs/math.md "Flow family".

    T linear, a flow on the leading coordinates of a.

    Attributes:
        scale: S^{-1}, the model-space length of one whitened unit.
        unit: Length of a whitened unit in the coordinates of the whitener alone.
        lift: The linear map.
        trust: Factor on the linear map's learning rates: small where the start is trusted.
        backend: The flow.
        free_mean: Whether the mean is learned.
        learn_sigma: Whether the standard deviation off the frame is learned.
        sigma: Its value at the start, in units of `unit`; None: 1.
        entropy_bonus: lambda_H in the objective E[ell] - (1 + lambda_H) E[log q].
        annealed: Entropy bonus of the current step, in place of the field above.
    """

    negligible_gain: ClassVar[float] = 0.05
    scale: Float[Array, " dim"]
    unit: Scalar
    lift: Lift
    trust: Scalar
    backend: AbstractBackend = eqx.field(static=True)
    free_mean: bool = eqx.field(static=True)
    learn_sigma: bool = eqx.field(static=True, default=True)
    sigma: float | None = eqx.field(static=True, default=None)
    entropy_bonus: float = eqx.field(static=True, default=0.0)
    annealed: Annealed | None = None

    @property
    def entropy_weight(self) -> Any:
        """Weight of -log q in the objective: 1 + lambda_H in effect."""
        return 1 + (self.entropy_bonus if self.annealed is None else self.annealed.entropy_bonus)

    @classmethod
    def create(cls, config, geometry: Geometry):
        """Build the family on the leading curvature directions; see `AbstractFamily.create`."""
        config, dim, dtype = config.filled, geometry.scale.size, geometry.scale.dtype
        latent, key = config.latent_dim(dim), jax.random.key(FRAME_SEED)
        core, leading = geometry.core, jnp.zeros((0, dim), dtype)
        if isinstance(config.latent_basis, Basis):
            leading = jnp.asarray(config.latent_basis.columns.T, dtype) / geometry.scale
        elif config.latent_basis == "random":
            leading = normal(key, (latent, dim), dtype)
        beyond = 0 if config.lift == "injective" else core.shape[0]
        size = min(dim, max(latent, leading.shape[0] + beyond))
        if size == dim and (config.sigma_perp is not None or not config.learn_sigma_perp):
            raise ConfigError(
                f"sigma_perp and learn_sigma_perp must be left out where the flow ({latent}) and "
                "the core "
                f"({core.shape[0]}) cover all d = {dim} dimensions: drop them, or give a smaller "
                "curvature_rank."
            )
        # Where the flow covers everything the model's own coordinates, layer by layer, suit its
        # masks best.
        whole = latent == dim and config.latent_basis == "curvature"
        return cls(
            scale=geometry.scale,
            unit=geometry.unit,
            lift=Lift(jnp.eye(dim, dtype=dtype) if whole else make_frame(leading, core, size, key)),
            trust=jnp.ones((), dtype),
            backend=find_backend(config.backend)(latent, config.flow),
            free_mean=config.means != "center" and config.lift == "core",
            learn_sigma=config.learn_sigma_perp,
            sigma=config.sigma_perp,
            entropy_bonus=0.0 if config.entropy_bonus_steps is not None else config.entropy_bonus,
        )

    @property
    def latent_dim(self) -> int:
        """Count the coordinates that the flow acts on."""
        return self.backend.dim

    @property
    def num_moment_terms(self) -> int:
        """Count the mean, the latent directions and the frame."""
        return 1 + self.latent_dim + self.lift.frame.shape[0]

    def trusting(self, trusted):
        """Slow the linear map down; see `AbstractFamily.trusting`."""
        return dataclasses.replace(
            self, trust=jnp.where(trusted, TRUSTED_RATE, 1.0).astype(self.trust.dtype)
        )

    def init(self, key, core, log_scale, block=0) -> FlowParams:
        """Start at the given core and mean log scale, the flow near the identity."""
        dtype, dim = self.scale.dtype, self.scale.size
        shift = jnp.mean(log_scale)
        sigma = shift if self.sigma is None else jnp.log(self.sigma / self.unit)
        offsets = jnp.zeros((1 if self.free_mean else 0, dim), dtype)
        root = jnp.exp(shift) * core_root(self.lift.frame, core)
        flow = self.backend.init(jax.random.fold_in(key, block))
        return FlowParams(
            LiftParams(offsets, sigma.astype(dtype), root.astype(dtype)),
            jax.tree_util.tree_map(lambda leaf: leaf.astype(dtype), flow),
        )

    def widened(self, params: FlowParams, shift: Scalar) -> FlowParams:
        """Scale the linear map; see `AbstractFamily.widened`."""
        lift = params.lift
        return params._replace(
            lift=lift._replace(log_sigma=lift.log_sigma + shift, root=jnp.exp(shift) * lift.root)
        )

    def draw_noise(self, key: Key, num: int, block: Array | int = 0) -> Float[Array, "groups dim"]:
        """Draw standard normals; see `AbstractFamily.draw_noise`."""
        return normal(key, (num, self.scale.size), self.scale.dtype, block=block)

    def transform(self, params: FlowParams, noise, *, mirror: bool, cache=None) -> Draws:
        """Turn normals to draws; see `AbstractFamily.transform`."""
        del cache
        noise = jnp.concatenate([noise, -noise]) if mirror else noise
        own = noise @ self.lift.frame.T
        base, rest = own[:, : self.latent_dim], own[:, self.latent_dim :]

        def push(flow):
            z, log_prob = self.backend.sample_and_log_prob(flow, base)
            return z, log_prob

        z, pull, log_prob = jax.vjp(push, params.flow, has_aux=True)
        frozen = jax.lax.stop_gradient(params.flow)
        z_score = jax.grad(lambda z: jnp.sum(self.backend.log_prob(frozen, z)))(z)
        latent = jnp.concatenate([z, rest], axis=-1)
        latent_score = jnp.concatenate([z_score, -rest], axis=-1)
        lifted = self.lift.push(params.lift, noise, own, latent, log_prob + standard_log_prob(rest))
        score = self.lift.score(params.lift, lifted, latent_score)
        log_det = standard_log_prob(base) - log_prob
        return Draws(
            displacement=self.scale * lifted.u,
            log_prob=lifted.log_prob - jnp.sum(jnp.log(self.scale)),
            score=score / self.scale,
            record=Record(lifted, latent, log_det, score, pull),
        )

    def make_cache(self, params):
        """Return nothing; see `AbstractFamily.make_cache`."""
        del params
        return ()

    def log_prob(self, params: FlowParams, displacement: Float[Array, " dim"]):
        """Evaluate log q; see `AbstractFamily.log_prob`."""
        latent, rest = self.lift.pull(params.lift, displacement / self.scale)
        z, other = latent[: self.latent_dim], latent[self.latent_dim :]
        own = self.backend.log_prob(params.flow, z[None])[0] + standard_log_prob(other)
        return own + rest - jnp.sum(jnp.log(self.scale))

    def pullback(
        self, params, draws, log_density, log_density_grad, baseline, *, antithetic
    ) -> FlowParams:
        """Return the STL gradient; see `AbstractFamily.pullback`."""
        del log_density, baseline, antithetic
        record = draws.record
        cotangents = self.scale * log_density_grad - self.entropy_weight * record.score
        lift, latent = self.lift.gradient(params.lift, record.lifted, record.latent, cotangents)
        (flow,) = record.pull(latent[:, : self.latent_dim] / latent.shape[0])
        if not self.learn_sigma:
            lift = lift._replace(log_sigma=jnp.zeros_like(lift.log_sigma))
        return FlowParams(lift, flow)

    def ascent(
        self, params, draws, log_density, log_density_grad, baseline, *, antithetic
    ) -> FlowParams:
        """Return the natural direction of the linear map beside the gradient of the flow."""
        gradient = self.pullback(
            params, draws, log_density, log_density_grad, baseline, antithetic=antithetic
        )
        return gradient._replace(lift=self.lift.natural(params.lift, gradient.lift))

    def apply_updates(self, params: FlowParams, cache, updates: FlowParams):
        """Add updates; see `Lift.moved`."""
        flow = jax.tree_util.tree_map(jnp.add, params.flow, updates.flow)
        return FlowParams(self.lift.moved(params.lift, updates.lift), flow), cache

    def update_rules(self, groups: int) -> UpdateRules:
        """Treat the linear map as a Gaussian's, the flow's networks as networks."""
        del groups
        root = min(1.0, ROOT_RATE / float(np.sqrt(self.lift.frame.shape[0]))) * self.trust
        splines = self.backend.config.template in ("spline_coupling", "nsf_ar")
        rate, damping = (SPLINE_RATE, SPLINE_DAMPING) if splines else (FLOW_RATE, FLOW_DAMPING)
        rates = LiftParams(offsets=self.trust, log_sigma=self.trust, root=root)
        return UpdateRules(
            rates=FlowParams(rates, self._each(rate)),
            shared_rows=FlowParams(
                LiftParams(offsets=True, log_sigma=False, root=False), self._each(False)
            ),
            blocked=FlowParams(LiftParams(False, False, False), self._each(False)),
            damping=FlowParams(LiftParams(*(LIFT_DAMPING,) * 3), self._each(damping)),
        )

    def _each(self, value) -> PyTree:
        return jax.tree_util.tree_map(lambda _: value, self.backend.structure)

    def _latent_draws(self, params: FlowParams, num: int) -> Float[Array, "draws latent"]:
        """Draw the flow's own coordinates, in mirrored pairs; the same noise in every call."""
        noise = normal(jax.random.key(MOMENT_SEED), (num // 2, self.latent_dim), self.scale.dtype)
        return self.backend.sample_and_log_prob(params.flow, jnp.concatenate([noise, -noise]))[0]

    def second_moment(self, params: FlowParams) -> SecondMoment:
        """Return E_q[v v^T], that of the flow's coordinates by draws.

        See `AbstractFamily.second_moment`.
        """
        lift, count = params.lift, self.latent_dim
        sigma2 = (
            jnp.exp(2 * lift.log_sigma) if self.lift.num_beyond else jnp.zeros_like(lift.log_sigma)
        )
        own, other = lift.root[:, :count], lift.root[:, count:]
        weights, vectors = jnp.linalg.eigh(
            other @ other.T - sigma2 * jnp.eye(other.shape[0], dtype=other.dtype)
        )
        rows = jnp.concatenate([own.T, vectors.T]) @ self.lift.frame
        draws = self._latent_draws(params, MOMENT_DRAWS)
        ones = jnp.ones((MOMENT_DRAWS, 1), draws.dtype)
        none = jnp.zeros((MOMENT_DRAWS, vectors.shape[0]), draws.dtype)
        return SecondMoment(
            diagonal=jnp.broadcast_to(sigma2, self.scale.shape) * self.scale**2,
            factors=jnp.concatenate([lift.offsets.sum(0)[None], rows]) * self.scale,
            weights=jnp.concatenate([jnp.zeros(1 + count, weights.dtype), weights]),
            coefficients=jnp.concatenate([ones, draws, none], axis=-1),
        )

    def linear_map(self, params: FlowParams) -> LinearMap:
        """Return q's mean and a root of its covariance, that of the flow by draws.

        See `AbstractFamily.linear_map`.
        """
        lift, count = params.lift, self.latent_dim
        sigma = jnp.exp(lift.log_sigma)
        draws = self._latent_draws(params, MOMENT_DRAWS)
        mean = jnp.mean(draws, axis=0)
        along, other = (draws - mean) @ lift.root[:, :count].T, lift.root[:, count:]
        covariance = along.T @ along / draws.shape[0] + other @ other.T
        values, vectors = jnp.linalg.eigh(covariance / sigma**2)
        root = (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T
        center = lift.offsets.sum(0) + (lift.root[:, :count] @ mean) @ self.lift.frame
        stretch = root - jnp.eye(root.shape[0], dtype=root.dtype)
        return LinearMap(self.scale * center, self.scale * sigma, self.lift.frame, stretch)

    def control_variates(self, params: FlowParams, draws: Draws):
        """Return Stein's functions `tr G + (G y) .

        score` over -2, of mean zero under any q, for three fixed G.

        y is u about the mean of the linear map. G is the identity, the projection on the frame,
        and, in model coordinates, the covariance of the linear map: where the flow is the identity,
        q's own curvature, its core and
        |v|^2, as for a Gaussian.
        """
        lift, score, scale = params.lift, draws.record.score, self.scale
        y = draws.record.lifted.u - lift.offsets.sum(0)
        y_frame, score_frame = y @ self.lift.frame.T, score @ self.lift.frame.T
        frame, dim = y_frame.shape[1], y.shape[1]
        weighted = y * scale**2
        sigma2 = jnp.exp(2 * lift.log_sigma)
        excess = lift.root @ lift.root.T - sigma2 * jnp.eye(frame, dtype=y.dtype)
        spread = sigma2 * jnp.sum(weighted * score, -1)
        spread += jnp.sum((weighted @ self.lift.frame.T) @ excess * score_frame, -1)
        total = sigma2 * jnp.sum(scale**2)
        total += jnp.sum((self.lift.frame * scale**2) @ self.lift.frame.T * excess)
        columns = jnp.stack(
            [
                dim + jnp.sum(y * score, -1),
                frame + jnp.sum(y_frame * score_frame, -1),
                total + spread,
            ],
            axis=-1,
        )
        return -0.5 * columns, jnp.zeros(3, columns.dtype)

    def resp_entropy(self, draws: Draws):
        """Return zeros: a flow has one component."""
        return jnp.zeros_like(draws.log_prob)

    def step_statistics(self, params: FlowParams, draws: Draws):
        """Trace the flow's log-determinant and sigma.

        A flow has one component, whose weight is 1.
        """
        one, zero = jnp.ones((), self.scale.dtype), jnp.zeros((), self.scale.dtype)
        return {
            "resp_entropy": zero,
            "pi_min": one,
            "pi_max": one,
            "pi_entropy": zero,
            "cholesky_ridge": zero,
            "sigma_perp": self._sigma_perp(params),
            "latent_logdet_mean": jnp.mean(draws.record.log_det),
            "d_latent": self.latent_dim * one,
        }

    def _sigma_perp(self, params):
        return self.unit * jnp.exp(params.lift.log_sigma)

    def slow_statistics(self, params: FlowParams):
        """Trace standard deviations.

        Off the frame in model coordinates, and along it in the whitener's.
        """
        deviation = self.scale * jnp.exp(params.lift.log_sigma)
        along = self.unit * jnp.sqrt(jnp.diagonal(self._latent_covariance(params, SCALE_DRAWS)))
        return {
            "D_sqrt_min": jnp.min(deviation),
            "D_sqrt_max": jnp.max(deviation),
            "D_sqrt_med": jnp.sort(deviation)[deviation.size // 2],
            "A_col_norm_p95": jnp.zeros((), deviation.dtype),
            "A_col_norm_max": jnp.zeros((), deviation.dtype),
            "latent_scale_min": jnp.min(along),
            "latent_scale_max": jnp.max(along),
        }

    def _latent_covariance(self, params, num):
        """Return the covariance of u along the frame's leading directions."""
        count = self.latent_dim
        draws = self._latent_draws(params, num) @ params.lift.root[:count, :count].T
        centred = draws - jnp.mean(draws, axis=0)
        return centred.T @ centred / num

    def summary_arrays(self, params: FlowParams):
        """Return pi, D^{1/2} in model coordinates and the covariance along the frame's leading directions."""
        return {
            "pi": jnp.ones(1, self.scale.dtype),
            "D_sqrt": self.scale * jnp.exp(params.lift.log_sigma),
            "latent_covariance": self.unit**2 * self._latent_covariance(params, MOMENT_DRAWS),
        }
