"""Flows and bijections from blocks of one's own choice."""

from collections.abc import Sequence

import jax
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Any, Key
from fastvi.flows.distributions import AbstractBase
from fastvi.flows.flow import Bijection, Flow, Gate, Params
from fastvi.flows.networks import Activation, ResNet
from fastvi.flows.transforms import (
    AbstractTransform,
    CompositeTransform,
    Coupling,
    Permutation,
)

Block = tuple[AbstractTransform, Any]


def make_alternating_mask(dim: int, parity: int) -> tuple[int, ...]:
    """Return the mask 1, 0, 1, 0 ... for parity 0 and 0, 1, 0, 1 ... for parity 1.

    1 marks features that pass.

    Raises:
        ConfigError: If `dim` is not positive or `parity` is not 0 or 1.
    """
    if dim < 1 or parity not in (0, 1):
        raise ConfigError(f"dim must be positive and parity 0 or 1; they are {dim} and {parity}.")
    return tuple(int((i + parity) % 2 == 0) for i in range(dim))


def analyze_mask_coverage(blocks: Sequence[AbstractTransform], dim: int) -> None:
    """Refuse couplings that never move some feature, permutations between them considered.

    Raises:
        ConfigError: If so.
    """
    # The feature at place i is number origin[i] of the input.
    origin, moved = np.arange(dim), np.zeros(dim, int)
    for block in blocks:
        if isinstance(block, Coupling):
            moved[origin[np.asarray(block.mask) == 0]] += 1
        elif isinstance(block, Permutation):
            origin = origin[np.asarray(block.perm)]
    never = np.flatnonzero(moved == 0).tolist()
    if never:
        raise ConfigError(
            f"The couplings never move features {never}; add a layer, or choose masks and "
            "permutations that do not cancel out."
        )


def create_feature_extractor(
    key: Key,
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    n_layers: int = 2,
    activation: Activation = jax.nn.tanh,
    res_scale: float = 0.1,
) -> tuple[ResNet, Params]:
    """Return a residual network for contexts and its parameters.

    Args:
        key: Random key.
        in_dim: Size of the raw context.
        hidden_dim: Width.
        out_dim: Size of the features: the `context_dim` of transforms that follow.
        n_layers: Residual blocks, at least one.
        activation: Function applied entry by entry.
        res_scale: Factor on what a block adds.

    Raises:
        ConfigError: If a size is not positive.
    """
    for name, size in (("in_dim", in_dim), ("out_dim", out_dim), ("n_layers", n_layers)):
        if size < 1:
            raise ConfigError(f"{name} of a feature extractor must be positive, not {size}.")
    network = ResNet(in_dim, hidden_dim, out_dim, n_layers, activation, res_scale)
    return network, network.init_params(key)


def assemble_bijection(
    blocks_and_params: Sequence[Block],
    feature_extractor: ResNet | None = None,
    feature_extractor_params: Params | None = None,
    validate: bool = True,
    identity_gate: Gate | None = None,
) -> tuple[Bijection, Params]:
    """Compose blocks.

    Args:
        blocks_and_params: Pairs of a transform and its parameters, as `create` returns them.
        feature_extractor: Network that the context passes through first.
        feature_extractor_params: Its parameters.
        validate: Refuse couplings that never move some feature.
        identity_gate: Function of one raw context vector; 0 makes the map the identity.

    Raises:
        ConfigError: If the blocks do not fit together, or an extractor comes without parameters.
    """
    if (feature_extractor is None) != (feature_extractor_params is None):
        raise ConfigError("feature_extractor and feature_extractor_params must be given together.")
    pairs = list(blocks_and_params)
    if not pairs or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ConfigError("blocks_and_params must hold at least one pair (transform, params).")
    transform = CompositeTransform(tuple(block for block, _ in pairs))
    # Without a coupling each block moves all features, and there is nothing to cover.
    if validate and any(isinstance(block, Coupling) for block in transform.blocks):
        analyze_mask_coverage(transform.blocks, transform.dim)
    params: Params = {"transform": [values for _, values in pairs]}
    if feature_extractor is not None:
        params["feature_extractor"] = feature_extractor_params
    return Bijection(transform, feature_extractor, identity_gate), params


def assemble_flow(
    blocks_and_params: Sequence[Block],
    base: AbstractBase,
    base_params: Any = None,
    feature_extractor: ResNet | None = None,
    feature_extractor_params: Params | None = None,
    validate: bool = True,
    identity_gate: Gate | None = None,
) -> tuple[Flow, Params]:
    """Compose blocks on a base distribution.

    Args:
        blocks_and_params: Pairs of a transform and its parameters, as `create` returns them.
        base: Base distribution.
        base_params: Its parameters; None: `base.init_params()`.
        feature_extractor: Network that the context passes through first.
        feature_extractor_params: Its parameters.
        validate: Refuse couplings that never move some feature.
        identity_gate: Function of one raw context vector; 0 makes the map the identity.

    Raises:
        ConfigError: If the parts do not fit together.
    """
    bijection, params = assemble_bijection(
        blocks_and_params, feature_extractor, feature_extractor_params, validate, identity_gate
    )
    return with_base(bijection, params, base, base_params)


def with_base(
    bijection: Bijection, params: Params, base: AbstractBase, base_params: Any
) -> tuple[Flow, Params]:
    """Put a bijection on a base distribution.

    Raises:
        ConfigError: If their dimensions differ.
    """
    if base.dim != bijection.transform.dim:
        raise ConfigError(f"The base has dim {base.dim}, the transform {bijection.transform.dim}.")
    base_params = base.init_params() if base_params is None else base_params
    flow = Flow(base, bijection.transform, bijection.feature_extractor, bijection.identity_gate)
    return flow, {"base": base_params, **params}
