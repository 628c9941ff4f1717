"""A normalizing flow on the leading coordinates of a learned linear map."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Array, Float, Key, Scalar
from fastvi.families.backends import AbstractBackend, find_backend
from fastvi.families.backends.base import Architecture
from fastvi.families.base import AbstractFamily, Draws, Geometry, slow_start_factor
from fastvi.families.basis import Basis
from fastvi.families.lift import Lift, Lifted, LiftParams, core_root, make_frame
from fastvi.families.moments import LinearMap, SecondMoment, symmetric_root
from fastvi.families.updates import UpdateRules
from fastvi.flows.distributions import standard_log_prob
from fastvi.kernels.noise import normal, streams

# Latent draws that stand for the latent distribution in moments, where no loss is evaluated. The
# error of a variance is sqrt(2 / 4096) = 2 %; it falls with the root of the number, and the cost
# rises with the number.
MOMENT_DRAWS = 4096
SCALE_DRAWS = 256  # the same for traces, to 9 %
# A row of the root has `frame` entries. Equal steps of each would turn it by sqrt(frame) steps.
ROOT_RATE = 5.0
# Factor on the learning rate for the flow's own parameters, and the damping of Adam for them. Few
# draws fall in any bin of a spline: at the others' rate its noise leads away from a start that is
# right already.
FLOW_RATE, FLOW_DAMPING = 0.25, 1e-8
SPLINE_RATE, SPLINE_DAMPING = 0.05, 1e-2  # the same of splines
LIFT_DAMPING = 0.05  # of natural gradients, which are O(1) off the optimum


# d_latent="auto": all coordinates of up to 64 dimensions, else the leading 8.
FULL_LATENT_DIM, AUTO_LATENT_DIM = 64, 8


@dataclasses.dataclass(frozen=True)
class FlowSettings:
    """What the flow family reads of the configuration, under the names of its fields.

    Attributes:
        backend: Name of a library of flows.
        flow: The flow's architecture.
        d_latent: Coordinates that the flow acts on; "auto": as many as a flow handles well.
        latent_basis: "curvature", "random" or the columns that span these coordinates.
        lift: "core" for the curvature's core beside the flow, "injective" for isotropic noise.
        means: "shared", or "center" for q about w*.
        sigma_perp: Standard deviation off the frame at the start, in units of the whitener; None:
            that of the start.
        learn_sigma_perp: Whether it is learned.
        entropy_bonus: lambda_H in the objective; 0 where it ends during the fit.
        entropy_bonus_steps: Steps after which the bonus ends; None: it stays.
    """

    backend: str = "native"
    flow: Architecture = Architecture()
    d_latent: str | int = "auto"
    latent_basis: str | Basis = "curvature"
    lift: str = "core"
    means: str = "shared"
    sigma_perp: float | None = None
    learn_sigma_perp: bool = True
    entropy_bonus: float = 0.0
    entropy_bonus_steps: int | None = None

    def latent_dim(self, dim: int) -> int:
        """Count the coordinates that the flow acts on, of `dim`."""
        if isinstance(self.d_latent, int):
            return self.d_latent
        if isinstance(self.latent_basis, Basis):
            return self.latent_basis.columns.shape[1]
        return dim if dim <= FULL_LATENT_DIM else AUTO_LATENT_DIM


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
    """q of u = T(a, xi) with T linear and a flow on the leading coordinates of a.

    See docs/vi_flow.md, "The map".

    Attributes:
        scale: S^{-1}, the model-space length of one whitened unit.
        unit: Length of a whitened unit in the coordinates of the whitener alone.
        lift: The linear map.
        lr_factor: Factor on the linear map's learning rates.
        backend: The flow.
        free_mean: Whether the mean is learned.
        learn_sigma: Whether the standard deviation off the frame is learned.
        sigma: Its value at the start, in units of `unit`; None: 1.
        entropy_bonus: lambda_H in the objective E[ell] - (1 + lambda_H) E[log q].
    """

    Settings: ClassVar = FlowSettings
    # the llc of a flow still moves where that of a mixture no longer does
    negligible_gain: ClassVar[float] = 0.05
    scale: Float[Array, " dim"]
    unit: Scalar
    lift: Lift
    lr_factor: Scalar
    backend: AbstractBackend = eqx.field(static=True)
    free_mean: bool = eqx.field(static=True)
    learn_sigma: bool = eqx.field(static=True, default=True)
    sigma: float | None = eqx.field(static=True, default=None)
    entropy_bonus: Scalar | float = 0.0

    @classmethod
    def create(cls, settings: FlowSettings, geometry: Geometry) -> "Flow":
        """Build the family on the leading curvature directions; see `AbstractFamily.create`."""
        dtype, ends = geometry.scale.dtype, settings.entropy_bonus_steps is not None
        return cls(
            scale=geometry.scale,
            unit=geometry.unit,
            lift=Lift(_frame(settings, geometry)),
            lr_factor=jnp.ones((), dtype),
            backend=_make_backend(settings, geometry.scale.size),
            # An injective lift keeps w* as its mean.
            free_mean=settings.means != "center" and settings.lift == "core",
            learn_sigma=settings.learn_sigma_perp,
            sigma=settings.sigma_perp,
            entropy_bonus=jnp.asarray(0.0 if ends else settings.entropy_bonus, dtype),
        )

    @classmethod
    def check(cls, settings: FlowSettings, dim: int) -> None:
        """Refuse a flow that the backend does not have; see `AbstractFamily.check`."""
        latent, basis = settings.latent_dim(dim), settings.latent_basis
        if isinstance(basis, Basis) and basis.columns.shape != (dim, latent):
            raise ConfigError(
                f"latent_basis must be an array of shape (dim={dim}, d_latent={latent}); got "
                f"{basis!r}: give one column for each latent dimension."
            )
        _make_backend(settings, dim)

    @property
    def latent_dim(self) -> int:
        """Count the coordinates that the flow acts on."""
        return self.backend.dim

    @property
    def num_moment_terms(self) -> int:
        """Count the mean, the latent directions and the frame."""
        return 1 + self.latent_dim + self.lift.frame.shape[0]

    def with_slow_start(self, slow):
        """Slow the linear map down; see `AbstractFamily.with_slow_start`."""
        return dataclasses.replace(self, lr_factor=slow_start_factor(slow, self.scale.dtype))

    def init(self, key, core, log_scale) -> FlowParams:
        """Start at the given core and mean log scale, the flow near the identity."""
        dtype, dim = self.scale.dtype, self.scale.size
        # One number stands for all directions off the frame.
        shift = jnp.mean(log_scale)
        sigma = shift if self.sigma is None else jnp.log(self.sigma / self.unit)
        offsets = jnp.zeros((1 if self.free_mean else 0, dim), dtype)
        root = jnp.exp(shift) * core_root(self.lift.frame, core)
        flow = self.backend.init(streams.derive(key, streams.Purpose.FLOW_START))
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
        noise = jnp.concatenate([noise, -noise]) if mirror else noise
        frame_noise = noise @ self.lift.frame.T
        base, other = frame_noise[:, : self.latent_dim], frame_noise[:, self.latent_dim :]

        # cotangents of the draws come later, so the pull-back is kept with the draws
        z, pull, log_prob = jax.vjp(
            lambda flow: self.backend.sample_and_log_prob(flow, base), params.flow, has_aux=True
        )
        # the score is that of a density whose parameters are held
        frozen = jax.lax.stop_gradient(params.flow)
        z_score = jax.grad(lambda z: jnp.sum(self.backend.log_prob(frozen, z)))(z)
        latent = jnp.concatenate([z, other], axis=-1)
        # latent coordinates beyond the flow's are standard normal
        latent_score = jnp.concatenate([z_score, -other], axis=-1)
        latent_log_prob = log_prob + standard_log_prob(other)
        lifted = self.lift.push(params.lift, noise, frame_noise, latent, latent_log_prob)
        score = self.lift.score(params.lift, lifted, latent_score)
        log_det = standard_log_prob(base) - log_prob
        return Draws(
            displacement=self.scale * lifted.u,
            log_prob=lifted.log_prob - jnp.sum(jnp.log(self.scale)),
            score=score / self.scale,
            record=Record(lifted, latent, log_det, score, pull),
        )

    def log_prob(self, params: FlowParams, displacement: Float[Array, " dim"]):
        """Evaluate log q; see `AbstractFamily.log_prob`."""
        latent, lift_log_prob = self.lift.pull(params.lift, displacement / self.scale)
        z, other = latent[: self.latent_dim], latent[self.latent_dim :]
        latent_log_prob = self.backend.log_prob(params.flow, z[None])[0] + standard_log_prob(other)
        return latent_log_prob + lift_log_prob - jnp.sum(jnp.log(self.scale))

    def pullback(self, params, draws, target, *, groups) -> FlowParams:
        """Return the STL gradient; see `AbstractDistribution.pullback`."""
        record = draws.record
        cotangents = self.scale * target.gradient - self.entropy_weight * record.score
        lift, latent = self.lift.gradient(params.lift, record.lifted, record.latent, cotangents)
        # the mean over draws is taken of the cotangents: the pull-back sums
        (flow,) = record.pull(latent[:, : self.latent_dim] / latent.shape[0])
        if not self.learn_sigma:
            lift = lift._replace(log_sigma=jnp.zeros_like(lift.log_sigma))
        return FlowParams(lift, flow)

    def ascent(self, params, draws, target, *, groups) -> FlowParams:
        """Return the natural direction of the linear map beside the gradient of the flow."""
        gradient = self.pullback(params, draws, target, groups=groups)
        return gradient._replace(lift=self.lift.natural(params.lift, gradient.lift))

    def apply_updates(self, params: FlowParams, cache, updates: FlowParams):
        """Add updates; see `Lift.moved`."""
        flow = jax.tree_util.tree_map(jnp.add, params.flow, updates.flow)
        return FlowParams(self.lift.moved(params.lift, updates.lift), flow), cache

    def update_rules(self, params: FlowParams, groups: int) -> UpdateRules:
        """Treat the linear map as a Gaussian's, the flow's networks as networks."""
        root = min(1.0, ROOT_RATE / float(np.sqrt(self.lift.frame.shape[0]))) * self.lr_factor
        rate, damping = (
            (SPLINE_RATE, SPLINE_DAMPING)
            if self.backend.settings.has_splines
            else (FLOW_RATE, FLOW_DAMPING)
        )
        lift = UpdateRules.plain(params.lift, damping=LIFT_DAMPING)._replace(
            rates=LiftParams(offsets=self.lr_factor, log_sigma=self.lr_factor, root=root),
            shared_rows=LiftParams(offsets=True, log_sigma=False, root=False),
        )
        flow = UpdateRules.plain(params.flow, rate, damping)
        return UpdateRules(*map(FlowParams, lift, flow))

    def _latent_draws(self, params: FlowParams, num: int) -> Float[Array, "draws latent"]:
        """Draw the flow's own coordinates, in mirrored pairs; the same noise in every call."""
        key = streams.derive(streams.shared_key(), streams.Purpose.MOMENTS)
        noise = normal(key, (num // 2, self.latent_dim), self.scale.dtype)
        return self.backend.sample_and_log_prob(params.flow, jnp.concatenate([noise, -noise]))[0]

    def second_moment(self, params: FlowParams) -> SecondMoment:
        """Return E_q[v v^T], that of the flow's coordinates by draws.

        See `AbstractFamily.second_moment`.
        """
        lift, count = params.lift, self.latent_dim
        sigma2 = (
            jnp.exp(2 * lift.log_sigma)
            if self.lift.complement_dim
            else jnp.zeros_like(lift.log_sigma)
        )
        by_flow, other = lift.root[:, :count], lift.root[:, count:]
        # The diagonal counts sigma^2 along the frame already.
        weights, vectors = jnp.linalg.eigh(
            other @ other.T - sigma2 * jnp.eye(other.shape[0], dtype=other.dtype)
        )
        rows = jnp.concatenate([by_flow.T, vectors.T]) @ self.lift.frame
        draws = self._latent_draws(params, MOMENT_DRAWS)
        # The mean is in every draw, and directions with a weight of their own are in none.
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
        # A flow is not symmetric, so mirrored noise leaves a mean.
        mean = jnp.mean(draws, axis=0)
        # the covariance along the frame: by draws where the flow acts, exact beside it
        by_flow, other = (draws - mean) @ lift.root[:, :count].T, lift.root[:, count:]
        covariance = by_flow.T @ by_flow / draws.shape[0] + other @ other.T
        root = symmetric_root(covariance / sigma**2)
        center = lift.offsets.sum(0) + (lift.root[:, :count] @ mean) @ self.lift.frame
        stretch = root - jnp.eye(root.shape[0], dtype=root.dtype)
        return LinearMap(self.scale * center, self.scale * sigma, self.lift.frame, stretch)

    def control_variates(self, params: FlowParams, draws: Draws):
        """Return Stein's functions `-(tr G + (G y) . score) / 2` for three fixed matrices G.

        They have mean zero under any q. y is u about the mean of the linear map. G is the identity,
        the projection on the frame, and, in model coordinates, the covariance of the linear map.
        Where the flow is the identity, they are q's own curvature, its core and |v|^2 less their
        means, as for a Gaussian.
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

    def step_statistics(self, params: FlowParams, draws: Draws):
        """Add the flow's log-determinant and sigma."""
        return super().step_statistics(params, draws) | {
            "sigma_perp": self.unit * jnp.exp(params.lift.log_sigma),
            "latent_logdet_mean": jnp.mean(draws.record.log_det),
            "d_latent": jnp.asarray(self.latent_dim, self.scale.dtype),
        }

    def slow_statistics(self, params: FlowParams):
        """Add standard deviations along the frame, in the coordinates of the whitener."""
        variances = jnp.diagonal(self._latent_covariance(params, SCALE_DRAWS))
        latent = self.unit * jnp.sqrt(variances)
        extremes = {"latent_scale_min": jnp.min(latent), "latent_scale_max": jnp.max(latent)}
        return super().slow_statistics(params) | extremes

    def deviations(self, params: FlowParams):
        """Return the standard deviations off the frame in model coordinates."""
        return self.scale * jnp.exp(params.lift.log_sigma)

    def _latent_covariance(self, params, num):
        """Return the covariance of u along the frame's leading directions."""
        count = self.latent_dim
        draws = self._latent_draws(params, num) @ params.lift.root[:count, :count].T
        centred = draws - jnp.mean(draws, axis=0)
        return centred.T @ centred / num

    def summary_arrays(self, params: FlowParams):
        """Add the covariance along the frame's leading directions."""
        covariance = self.unit**2 * self._latent_covariance(params, MOMENT_DRAWS)
        return super().summary_arrays(params) | {"latent_covariance": covariance}


def _make_backend(settings: FlowSettings, dim: int) -> AbstractBackend:
    return find_backend(settings.backend)(settings.latent_dim(dim), settings.flow)


def _frame(settings: FlowSettings, geometry: Geometry) -> Float[Array, "frame dim"]:
    """Return orthonormal rows that begin with the latent directions and hold the core's.

    Raises:
        ConfigError: If they leave no direction for the noise that the settings describe.
    """
    core, (dim,), dtype = geometry.core, geometry.scale.shape, geometry.scale.dtype
    latent, key = (
        settings.latent_dim(dim),
        streams.derive(streams.shared_key(), streams.Purpose.FRAME),
    )
    leading = jnp.zeros((0, dim), dtype)
    if isinstance(settings.latent_basis, Basis):
        # The columns are in model coordinates, and the frame in whitened ones.
        leading = jnp.asarray(settings.latent_basis.columns.T, dtype) / geometry.scale
    elif settings.latent_basis == "random":
        leading = normal(key, (latent, dim), dtype)
    beside = 0 if settings.lift == "injective" else core.shape[0]
    size = min(dim, max(latent, leading.shape[0] + beside))
    if size == dim and (settings.sigma_perp is not None or not settings.learn_sigma_perp):
        raise ConfigError(
            f"sigma_perp and learn_sigma_perp must be left out where the flow ({latent}) and the "
            f"core ({core.shape[0]}) cover all d = {dim} dimensions: drop them, or give a smaller "
            "curvature_rank."
        )
    if latent == dim and settings.latent_basis == "curvature":
        # the masks of a flow on all coordinates suit the model's own, layer by layer
        return jnp.eye(dim, dtype=dtype)
    return make_frame(leading, core, size, key)
