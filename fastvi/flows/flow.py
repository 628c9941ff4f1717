"""A transform with its context: alone, and with a base distribution."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from fastvi._errors import DataError
from fastvi._typing import Any, Array, Float, Given, Key
from fastvi.flows._columns import check_features
from fastvi.flows.distributions import AbstractBase
from fastvi.flows.networks import ResNet
from fastvi.flows.transforms import AbstractTransform

Gate = Callable[[Array], Array]
Params = dict[str, Any]


class Bijection(eqx.Module):
    """An invertible map of vectors with a tractable Jacobian.

    Parameters are {"transform": ..., "feature_extractor": ...}, the second only with an extractor.

    Attributes:
        transform: The map.
        feature_extractor: Network that the context passes through, once, before the map sees it.
        identity_gate: Function of one raw context vector: 0 makes the map the identity, 1 is the
            full map.
    """

    transform: AbstractTransform
    feature_extractor: ResNet | None = None
    identity_gate: Gate | None = eqx.field(static=True, default=None)

    def forward(
        self,
        params: Params,
        x: Given[Float[Array, "*batch dim"]],
        context: Given[Float[Array, "..."] | None] = None,
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Map x to y.

        Args:
            params: Parameters.
            x: Vectors.
            context: One vector, or one for each x.

        Returns:
            y and log |det dy/dx|.

        Raises:
            DataError: If a shape or dtype does not fit.
        """
        return _move(self, params, jnp.asarray(x), context, "forward")

    def inverse(
        self,
        params: Params,
        y: Given[Float[Array, "*batch dim"]],
        context: Given[Float[Array, "..."] | None] = None,
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Map y back to x; arguments as in `forward`.

        Returns:
            x and log |det dx/dy|.

        Raises:
            DataError: If a shape or dtype does not fit.
        """
        return _move(self, params, jnp.asarray(y), context, "inverse")


class Flow(eqx.Module):
    """The distribution of T(z; context) with z from a base distribution.

    Parameters are {"base": ..., "transform": ..., "feature_extractor": ...}, the last only with an
    extractor. All are arrays in pytrees; the object holds none, and is hashable and a pytree
    without leaves, so that `jax.jit` takes its methods and `jax.vmap` maps over parameters and
    keys.

    Attributes:
        base_dist: Distribution of z.
        transform: T.
        feature_extractor: Network that the context passes through, once, before T sees it.
        identity_gate: Function of one raw context vector: 0 makes T the identity, 1 is all of T.
    """

    base_dist: AbstractBase
    transform: AbstractTransform
    feature_extractor: ResNet | None = None
    identity_gate: Gate | None = eqx.field(static=True, default=None)

    @property
    def bijection(self) -> Bijection:
        """Return T without the base distribution."""
        return Bijection(self.transform, self.feature_extractor, self.identity_gate)

    def forward(
        self,
        params: Params,
        z: Given[Float[Array, "*batch dim"]],
        context: Given[Float[Array, "..."] | None] = None,
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Map z to x; see `Bijection.forward`."""
        return self.bijection.forward(params, z, context)

    def inverse(
        self,
        params: Params,
        x: Given[Float[Array, "*batch dim"]],
        context: Given[Float[Array, "..."] | None] = None,
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Map x back to z; see `Bijection.inverse`."""
        return self.bijection.inverse(params, x, context)

    def log_prob(
        self,
        params: Params,
        x: Given[Float[Array, "*batch dim"]],
        context: Given[Float[Array, "..."] | None] = None,
    ) -> Float[Array, "*batch"]:
        """Return the log density at x, in nats.

        Args:
            params: Parameters.
            x: Vectors.
            context: One vector, or one for each x.

        Raises:
            DataError: If a shape or dtype does not fit.
        """
        return _log_prob(self, params, jnp.asarray(x), context)

    def sample(
        self,
        params: Params,
        key: Key,
        shape: Given[tuple[int, ...]],
        context: Given[Float[Array, "..."] | None] = None,
    ) -> Float[Array, "..."]:
        """Draw samples of shape (*shape, dim); arguments as in `sample_and_log_prob`."""
        return self.sample_and_log_prob(params, key, shape, context)[0]

    def sample_and_log_prob(
        self,
        params: Params,
        key: Key,
        shape: Given[tuple[int, ...]],
        context: Given[Float[Array, "..."] | None] = None,
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Draw samples with their log densities, in one forward pass.

        Args:
            params: Parameters.
            key: Random key, typed or not.
            shape: Batch axes.
            context: One vector, or one for each sample.

        Returns:
            Samples of shape (*shape, dim) and log densities of shape `shape`.

        Raises:
            DataError: If a shape or dtype does not fit.
        """
        try:
            # `_sample` is compiled for each shape, which must be hashable.
            shape = tuple(int(size) for size in shape)
        except TypeError as error:
            raise DataError(
                f"shape must be a tuple of batch axes, for example (100,), not {shape!r}."
            ) from error
        return _sample(self, params, key, shape, context)

    def transform_noise(
        self,
        params: Params,
        noise: Given[Float[Array, "*batch dim"]],
        context: Given[Float[Array, "..."] | None] = None,
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Turn standard normals of the caller's choice to samples with log densities.

        Mirrored pairs are such a choice.

        Args:
            params: Parameters.
            noise: Standard normals; with those of `draw_noise` the result is that of
                `sample_and_log_prob`.
            context: One vector, or one for each sample.

        Raises:
            DataError: If a shape or dtype does not fit.
        """
        return _from_noise(self, params, jnp.asarray(noise), context)


@functools.partial(jax.jit, static_argnames="direction")
def _move(bijection, params, x, context, direction):
    """Map forward or back, with the context that the transform sees and the gate that it has."""
    gate = None
    if context is not None:
        context = jnp.asarray(context)
        if bijection.identity_gate is not None:
            # the gate sees the raw context, before any features are taken from it
            gate = jnp.vectorize(bijection.identity_gate, signature="(c)->()")(context)
        if bijection.feature_extractor is not None:
            check_features("context", context, bijection.feature_extractor.in_dim)
            context = bijection.feature_extractor.apply(params["feature_extractor"], context)
    return getattr(bijection.transform, direction)(params["transform"], x, context, gate)


@jax.jit
def _log_prob(flow, params, x, context):
    z, log_det = flow.inverse(params, x, context)
    return flow.base_dist.log_prob(params["base"], z) + log_det


@functools.partial(jax.jit, static_argnames="shape")
def _sample(flow, params, key, shape, context):
    # noise of the parameters' own type, so that a float64 flow is not fed float32 noise
    leaves = jax.tree_util.tree_leaves((params["base"], params["transform"]))
    dtype = jnp.result_type(*leaves) if leaves else None
    return _push(flow, params, flow.base_dist.sample(params["base"], key, shape, dtype), context)


@jax.jit
def _from_noise(flow, params, noise, context):
    return _push(flow, params, flow.base_dist.from_noise(params["base"], noise), context)


def _push(flow, params, z, context):
    # The density at x is that of z over the volume that the map stretches to: no inverse is needed.
    x, log_det = flow.forward(params, z, context)
    return x, flow.base_dist.log_prob(params["base"], z) - log_det
