"""Flows in one call."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError
from fastvi._typing import Any, Key
from fastvi.flows.assemble import (
    Block,
    assemble_bijection,
    create_feature_extractor,
    make_alternating_mask,
    with_base,
)
from fastvi.flows.distributions import AbstractBase, DiagNormal, StandardNormal
from fastvi.flows.elementwise import AbstractElementwise, BoundedAffine, RationalQuadratic
from fastvi.flows.flow import Bijection, Flow, Gate, Params
from fastvi.flows.networks import Activation
from fastvi.flows.transforms import (
    Coupling,
    LinearTransform,
    LoftTransform,
    MaskedAutoregressive,
    Permutation,
)
from fastvi.flows.transforms.masked_autoregressive import FastDirection

Built = tuple[Flow | Bijection, Params]
MakeLayer = Callable[[Key, int], Block]
Map = TypeVar("Map", bound=AbstractElementwise)


@dataclasses.dataclass(frozen=True)
class BuilderOptions:
    """Options that every builder takes by name.

    Attributes:
        context_dim: Size of the context; 0: the flow is unconditional.
        context_extractor_hidden_dim: Width of a network that the context passes through first; 0:
            none.
        context_extractor_n_layers: Residual blocks of that network; refused where there is none.
        context_feature_dim: Its outputs; None: context_dim.
        res_scale: Factor on what a residual block adds.
        use_permutation: Reverse the features between layers.
        use_linear: Begin with a linear map in LU form.
        use_loft: End with logarithmic tails.
        loft_tau: Where those tails begin.
        trainable_base: Base distribution N(loc, diag(exp(log_scale))^2) with parameters, in place
            of N(0, I).
        base_dist: Base distribution in place of either.
        base_params: Parameters of `base_dist`; None: `base_dist.init_params()`.
        activation: Activation of all networks.
        return_transform_only: Return a `Bijection`, without a base distribution.
        identity_gate: Function of one raw context vector; 0 makes the map the identity, 1 is the
            full map.
    """

    context_dim: int = 0
    context_extractor_hidden_dim: int = 0
    context_extractor_n_layers: int = 2
    context_feature_dim: int | None = None
    res_scale: float = 0.1
    use_permutation: bool = False
    use_linear: bool = False
    use_loft: bool = True
    loft_tau: float = 1000.0
    trainable_base: bool = False
    base_dist: AbstractBase | None = None
    base_params: Any = None
    activation: Activation = jax.nn.tanh
    return_transform_only: bool = False
    identity_gate: Gate | None = None

    def __post_init__(self):
        if self.context_dim < 0:
            raise ConfigError(f"context_dim must not be negative, but is {self.context_dim}.")
        for name in ("context_extractor_hidden_dim", "identity_gate", "context_feature_dim"):
            if getattr(self, name) and not self.context_dim:
                raise ConfigError(f"{name} works on the context: give context_dim, its size.")
        if self.context_feature_dim is not None and not self.context_extractor_hidden_dim:
            raise ConfigError(
                "context_feature_dim needs a feature extractor: give context_extractor_hidden_dim."
            )
        if self.identity_gate is not None:
            if self.use_permutation:
                raise ConfigError(
                    "identity_gate and use_permutation exclude each other: a permutation has no "
                    "gate."
                )
            _check_gate(self.identity_gate, self.context_dim)
        if self.base_params is not None and self.base_dist is None:
            raise ConfigError("base_params are those of base_dist: give both.")
        if self.return_transform_only and (self.trainable_base or self.base_dist is not None):
            raise ConfigError(
                "return_transform_only leaves the base out: do not give trainable_base or "
                "base_dist."
            )

    @property
    def feature_dim(self) -> int:
        """Return the size of the context that the layers see."""
        return self.context_dim if self.context_feature_dim is None else self.context_feature_dim

    @property
    def network(self) -> dict[str, Any]:
        """Return the settings of a layer's network."""
        return {
            "context_dim": self.feature_dim,
            "activation": self.activation,
            "res_scale": self.res_scale,
        }


def _check_gate(gate, context_dim):
    """Refuse a gate that does not turn one context vector to a scalar."""
    one = jax.eval_shape(gate, jax.ShapeDtypeStruct((context_dim,), jnp.float32))
    if one.shape != ():
        raise ConfigError(
            f"identity_gate must turn one context vector to a scalar; it returns shape {one.shape}."
        )


def _read_options(
    given: dict[str, Any], elementwise: type[Map], *own: str
) -> tuple[Map, BuilderOptions]:
    """Sort options by name: the fields of a map of single numbers, and those of every builder.

    Args:
        given: The options.
        elementwise: Class of the map.
        *own: Other names that the builder takes, for the hint of an error.

    Raises:
        ConfigError: If a name belongs to neither, or an option is at odds with another.
    """
    shape, shared = (
        [field.name for field in dataclasses.fields(kind)] for kind in (elementwise, BuilderOptions)
    )
    for name in given:
        if name not in (*shape, *shared):
            near = difflib.get_close_matches(name, [*own, *shape, *shared], 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"This builder has no option {name!r}.{hint}")
    # Checked here, because the options cannot tell their default from a value that was given.
    if "context_extractor_n_layers" in given and not given.get("context_extractor_hidden_dim"):
        raise ConfigError(
            "context_extractor_n_layers needs the network: give context_extractor_hidden_dim."
        )
    found = elementwise(**{name: given[name] for name in shape if name in given})
    return found, BuilderOptions(**{name: given[name] for name in shared if name in given})


def build_realnvp(
    key: Key, dim: int, num_layers: int, hidden_dim: int, n_hidden_layers: int, **options: Any
) -> Built:
    """Build a flow of affine couplings with alternating masks (Dinh et al., 2017).

    Args:
        key: Random key of the networks.
        dim: Features.
        num_layers: Couplings.
        hidden_dim: Width of their networks.
        n_hidden_layers: Residual blocks of their networks.
        **options: Fields of `BoundedAffine` and of `BuilderOptions`, each by its name.

    Returns:
        The flow, or the bijection if `return_transform_only`, and its parameters, those of the
        identity.

    Raises:
        ConfigError: If an option is unknown, out of range or at odds with another.
    """
    return _build_couplings(
        BoundedAffine, key, dim, num_layers, hidden_dim, n_hidden_layers, options
    )


def build_spline_realnvp(
    key: Key, dim: int, num_layers: int, hidden_dim: int, n_hidden_layers: int, **options: Any
) -> Built:
    """Build a flow of spline couplings with alternating masks (Durkan et al., 2019).

    Args:
        key: Random key of the networks.
        dim: Features.
        num_layers: Couplings.
        hidden_dim: Width of their networks.
        n_hidden_layers: Residual blocks of their networks.
        **options: Fields of `RationalQuadratic`, such as `num_bins`, and of `BuilderOptions`, each
            by its name.

    Returns:
        The flow, or the bijection if `return_transform_only`, and its parameters, those of the
        identity.

    Raises:
        ConfigError: If an option is unknown, out of range or at odds with another.
    """
    return _build_couplings(
        RationalQuadratic, key, dim, num_layers, hidden_dim, n_hidden_layers, options
    )


def build_maf(
    key: Key,
    dim: int,
    num_layers: int,
    hidden_dim: int,
    n_hidden_layers: int,
    *,
    fast: FastDirection = "inverse",
    **options: Any,
) -> Built:
    """Build a flow of masked affine autoregressive layers that alternate in the order of features.

    Args:
        key: Random key of the networks.
        dim: Features.
        num_layers: Layers.
        hidden_dim: Width of their networks, best at least `dim`.
        n_hidden_layers: Residual blocks of their networks.
        fast: "inverse" for densities in one pass of the networks (Papamakarios et al., 2017),
            "forward" for samples with their densities (Kingma et al., Inverse Autoregressive Flow,
            2016); the other direction takes `dim`.
        **options: Fields of `BoundedAffine` and of `BuilderOptions`, each by its name.

    Returns:
        The flow, or the bijection if `return_transform_only`, and its parameters, those of the
        identity.

    Raises:
        ConfigError: If an option is unknown, out of range or at odds with another.
    """
    return _build_autoregressive(
        BoundedAffine, key, dim, num_layers, hidden_dim, n_hidden_layers, fast, options
    )


def build_spline_maf(
    key: Key,
    dim: int,
    num_layers: int,
    hidden_dim: int,
    n_hidden_layers: int,
    *,
    fast: FastDirection = "inverse",
    **options: Any,
) -> Built:
    """Build a flow of autoregressive splines (Durkan et al., 2019).

    Arguments are those of `build_maf`; `options` are the fields of `RationalQuadratic` and of
    `BuilderOptions`.
    """
    return _build_autoregressive(
        RationalQuadratic, key, dim, num_layers, hidden_dim, n_hidden_layers, fast, options
    )


def _build_couplings(kind, key, dim, num_layers, hidden_dim, n_hidden_layers, given):
    elementwise, options = _read_options(given, kind)

    def make_layer(layer_key, parity):
        mask = make_alternating_mask(dim, parity)
        return Coupling.create(
            layer_key,
            dim,
            mask,
            hidden_dim,
            n_hidden_layers,
            elementwise=elementwise,
            **options.network,
        )

    # Reversed, an alternating mask is the other one if the number of features is even.
    return _build(key, dim, num_layers, make_layer, options, reversal_alternates=dim % 2 == 0)


def _build_autoregressive(kind, key, dim, num_layers, hidden_dim, n_hidden_layers, fast, given):
    elementwise, options = _read_options(given, kind, "fast")

    def make_layer(layer_key, parity):
        return MaskedAutoregressive.create(
            layer_key,
            dim,
            hidden_dim,
            n_hidden_layers,
            elementwise=elementwise,
            fast=fast,
            reverse=bool(parity),
            **options.network,
        )

    # Reversed features come in the other order, whatever their number.
    return _build(key, dim, num_layers, make_layer, options, reversal_alternates=True)


def _build(
    key: Key,
    dim: int,
    num_layers: int,
    make_layer: MakeLayer,
    options: BuilderOptions,
    *,
    reversal_alternates: bool,
) -> Built:
    """Put layers, the optional blocks around them, the extractor and the base together."""
    if dim < 1 or num_layers < 1:
        raise ConfigError(f"dim and num_layers must be positive, not {dim} and {num_layers}.")
    # The layers draw the same numbers with and without an extractor.
    key_features, key_layers = jax.random.split(key)
    blocks = _blocks(key_layers, dim, num_layers, make_layer, options, reversal_alternates)
    extractor = features = None
    if options.context_extractor_hidden_dim:
        extractor, features = create_feature_extractor(
            key_features,
            options.context_dim,
            options.context_extractor_hidden_dim,
            options.feature_dim,
            options.context_extractor_n_layers,
            options.activation,
            options.res_scale,
        )
    bijection, params = assemble_bijection(
        blocks, extractor, features, identity_gate=options.identity_gate
    )
    if options.return_transform_only:
        return bijection, params
    base = options.base_dist or (DiagNormal(dim) if options.trainable_base else StandardNormal(dim))
    return with_base(bijection, params, base, options.base_params)


def _blocks(key, dim, num_layers, make_layer, options, reversal_alternates):
    # Reversing the features may already alternate what a layer moves; alternating masks would
    # cancel it.
    fixed = options.use_permutation and reversal_alternates
    # Without a context the linear map has no network, and so needs no key.
    blocks: list[Block] = [LinearTransform.create(None, dim)] if options.use_linear else []
    for index, layer_key in enumerate(jax.random.split(key, num_layers)):
        if options.use_permutation and index:
            blocks.append(Permutation.create(None, np.arange(dim)[::-1]))
        # a single feature must move: nothing else is there to condition it
        parity = 1 if dim == 1 else 0 if fixed else index % 2
        blocks.append(make_layer(layer_key, parity))
    if options.use_loft:
        blocks.append(LoftTransform.create(None, dim, options.loft_tau))
    return blocks
