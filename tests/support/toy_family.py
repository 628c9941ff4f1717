"""A family as short as the contract allows: a normal with independent coordinates."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from fastvi.families.base import AbstractFamily, Draws
from fastvi.families.moments import LinearMap, SecondMoment
from fastvi.flows.distributions import standard_log_prob
from fastvi.kernels.noise import normal


class Params(NamedTuple):
    loc: Any
    log_scale: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    entropy_bonus: float = 0.0


class DiagonalNormal(AbstractFamily):
    """v = loc + exp(log_scale) noise, in model coordinates."""

    Settings: ClassVar = Settings
    scale: Any
    deviation: Any  # of the start
    entropy_bonus: Any = 0.0
    num_moment_terms: int = eqx.field(static=True, default=1)

    @classmethod
    def create(cls, settings, geometry):
        precision = 1 + jnp.sum(geometry.core**2, axis=0)
        deviation = geometry.scale / jnp.sqrt(precision)
        return cls(geometry.scale, deviation, jnp.asarray(settings.entropy_bonus, deviation.dtype))

    def init(self, key, core, log_scale):
        return Params(jnp.zeros_like(self.scale), jnp.log(self.deviation) + log_scale)

    def widened(self, params, shift):
        return Params(params.loc, params.log_scale + shift)

    def draw_noise(self, key, num, block=0):
        return normal(key, (num, self.scale.size), self.scale.dtype, block=block)

    def transform(self, params, noise, *, mirror, cache=None):
        noise = jnp.concatenate([noise, -noise]) if mirror else noise
        deviation = jnp.exp(params.log_scale)
        log_prob = standard_log_prob(noise) - jnp.sum(params.log_scale)
        return Draws(params.loc + deviation * noise, log_prob, -noise / deviation, noise)

    def log_prob(self, params, displacement):
        noise = (displacement - params.loc) * jnp.exp(-params.log_scale)
        return standard_log_prob(noise) - jnp.sum(params.log_scale)

    def pullback(self, params, draws, target, *, groups):
        cotangent = target.gradient - self.entropy_weight * draws.score
        by_scale = jnp.exp(params.log_scale) * draws.record * cotangent
        return Params(jnp.mean(cotangent, axis=0), jnp.mean(by_scale, axis=0))

    def second_moment(self, params):
        ones = jnp.ones(1, self.scale.dtype)
        square = jnp.exp(2 * params.log_scale)
        return SecondMoment(square, params.loc[None], ones, jnp.zeros((0, 1), self.scale.dtype))

    def linear_map(self, params):
        none = jnp.zeros((0, self.scale.size), self.scale.dtype)
        return LinearMap(params.loc, jnp.exp(params.log_scale), none, none[:, :0])
