"""Configuration of a variational fit: `VIConfig`, from keywords, mappings, OmegaConf, dataclasses or YAML.

Unknown names and impossible values are refused where they enter, with the rule, what came and the likely fix.
"""

import difflib
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, final, get_args, get_origin, get_type_hints

from fastvi import _checks as checks
from fastvi import _sources as sources
from fastvi._errors import UnavailableError
from fastvi.basis import Basis

__all__ = ["FlowConfig", "VIConfig"]

Rule = Callable[[str, Any, str], Any]

_ALIASES = {"algo": "family"}
_ALIASES |= {"flow_type": "flow.template", "flow_depth": "flow.depth", "flow_hidden": "flow.hidden"}
_SEEDS_PRUNE_THRESHOLD = 1e-3
_DEFAULT_RANK = 2
_DEFAULT_EVALUATION_DRAWS = 64
_DEFAULT_CURVATURE_EXAMPLES = 4096
CORRECTIONS = ("none", "auto", "importance", "mcmc")
FULL_LATENT_DIM, AUTO_LATENT_DIM = 64, 8  # d_latent="auto": all of up to so many dimensions, else so many


def _flow(name: str, value: Any, fix: str) -> "FlowConfig":
    entries = sources.entries(name, value, fix)
    _refuse_unknown(FlowConfig, entries)
    return FlowConfig(**entries)


class _CheckedFields:
    """Base of the config dataclasses: refuse unknown keywords, hold every field to its annotation's rule."""

    _prefix = ""

    def __new__(cls, *_args: Any, **values: Any) -> Self:
        _refuse_unknown(cls, values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in _rules(type(self)):
            object.__setattr__(self, name, _checked(type(self), name, getattr(self, name)))


@cache
def _rules(cls: type[Any]) -> dict[str, tuple[Rule, bool, str]]:
    """Each field's rule, whether it may be None, and an example, read from its annotation and default."""
    hints, rules = get_type_hints(cls, include_extras=True), {}
    for field in fields(cls):
        hint = hints[field.name]
        kind, rule = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, checks.boolean)
        if get_origin(kind) is Literal:
            rule = partial(checks.choice, choices=get_args(kind))
        optional = type(None) in get_args(kind)
        example = f"for example {field.default!r}" + (" (null in YAML)" if field.default is None else "")
        rules[field.name] = (rule, optional, example)
    return rules


def _checked(cls: type[_CheckedFields], name: str, value: Any) -> Any:
    rule, optional, fix = _rules(cls)[name]
    return None if value is None and optional else rule(cls._prefix + name, checks.plain(value), fix)


def _refuse_unknown(cls: type[Any], given: Mapping[Any, Any], also: Collection[str] = ()) -> None:
    known = _rules(cls)
    candidates = {name.lower(): name for name in known}
    if cls is not FlowConfig:
        candidates |= _ALIASES | {f"flow.{name}": f"flow.{name}" for name in _rules(FlowConfig)}
    for name, value in given.items():
        if name not in known and name not in also:
            near = difflib.get_close_matches(str(name).lower(), candidates, 1)
            fix = f"did you mean {candidates[near[0]]!r}?" if near else "remove it"
            rule = f"a field of {cls.__name__} ({', '.join([*known][:5])}, ... {len(known)} in all)"
            raise checks.refusal(f"{cls._prefix}{name}", rule, value, fix)


@final
@dataclass(frozen=True, kw_only=True)
class FlowConfig(_CheckedFields):
    """Configure the normalizing flow of the "flow" family.

    Attributes:
        template: Architecture of the flow.
        depth: Number of transforms.
        hidden: Widths of the conditioner's hidden layers.
        bins: Number of bins of a spline.
        init_scale: Scale of the initial weights; small values start near the identity.
    """

    _prefix = "flow."

    template: Literal["realnvp", "maf", "spline_coupling", "nsf_ar"] = "realnvp"
    depth: Annotated[int, checks.integer] = 4
    hidden: Annotated[tuple[int, ...], checks.widths] = (64, 64)
    bins: Annotated[int, partial(checks.integer, minimum=2)] = 8
    init_scale: Annotated[float, checks.nonnegative] = 1e-2


@final
@dataclass(frozen=True, kw_only=True)
class VIConfig(_CheckedFields):
    """Configure a variational fit: immutable and hashable; `create` builds one from other sources.

    An unknown name, an impossible value, or values at odds with each other raise ConfigError.

    Attributes:
        family: Variational family; `create` also reads it from `algo`.
        M: Number of mixture components.
        r: Rank budget: columns of each component's covariance factor; unused beside `r_per_component`. The default
            is cut to the dimension of a smaller problem.
        r_per_component: Ranks of the M components, one each, instead of `r`.
        means: "shared" and "component" are learned, one or M of them; "center" is fixed.
        curvature_rank: Rows of the shared precision core; "auto" takes them from the Hessian's spectrum.
        curvature_examples: Examples that the Hessian at w* is averaged over; None means 4096, and 512 where the fit
            only prepares a correction.
        mixture_cap: Most components that pruning leaves; None for no bound.
        prune_threshold: Weight below which a component is pruned every `eval_every` steps. Pruning is on where this
            is not the default, or `mixture_cap` is set; None means by the cap alone.
        alpha_dirichlet_prior: Concentration of a Dirichlet prior on the mixture weights, if any.
        entropy_bonus: Additional weight of the entropy of q in the objective.
        entropy_bonus_steps: Steps after which `entropy_bonus` ends; None means never.
        alpha_temperature: Temperature of the mixture weights' softmax.
        alpha_temperature_frac: Fraction of the steps over which `alpha_temperature` goes to 1; 0 keeps it.
        steps: Optimisation steps.
        batch_size: Examples per minibatch; None means min(256, n_data).
        lr: Peak learning rate.
        lr_schedule: Schedule of the learning rate; None is read as "none".
        lr_warmup_frac: Fraction of the steps spent warming up.
        clip_global_norm: Largest global norm of a gradient; None for no clipping.
        samples_per_step: Draws per step; None means 1 in `fit` and 2 in `estimate_llc`.
        antithetic: Whether to draw in pairs mirrored about the component's mean.
        early_stop: Whether to stop at convergence; None means yes in `estimate_llc`, no in `fit`.
        eval_every: Steps between records of the metrics.
        eval_samples: Draws of the final estimate; None means 64, and more in fewer than 32 dimensions.
        control_variate: Control variate of the final estimate.
        trace_probes: Hutchinson probes per trace.
        correction: What turns the variational value of `estimate_llc` into the posterior's own: "importance"
            reweights the evaluation's draws, "mcmc" samples from q on, "auto" chooses, "none" leaves it; None means
            "auto" in `estimate_llc` and "none" in `fit`.
        correction_error: Relative standard error at which sampling ends.
        correction_budget: Most full-gradient equivalents that sampling takes; in many dimensions it may end before,
            where steps on small blocks of data cost more than their gradients.
        whitening_mode: Diagonal whitening measured at the center before the fit.
        whitening_decay: Decay of the moving average of squared gradients.
        use_whitening: False turns `whitening_mode` off.
        dtype: Floating-point type of the fit.
        tensorboard: Whether `LLCEstimate.save` writes events for TensorBoard beside the traces, for which
            `estimate_llc` then keeps the shape of q after every `eval_every` steps.
        gamma: Localization strength; when given it must equal the one passed to the fit.
        backend: Library of the flow: "native", "flowjax", "nux" or one that `register_backend` was given.
        d_latent: Dimensions that the flow acts on; "auto" means all of up to 64, else 8.
        sigma_perp: Standard deviation of the flow family's noise off the subspace where it starts, in the
            whitener's coordinates; None takes it from the curvature.
        learn_sigma_perp: Whether it is learned.
        lift: What the flow sits on: "core" is the learned linear map of the Laplace approximation, with a free mean;
            "injective" adds isotropic noise to a subspace, about the center.
        latent_basis: Directions that the flow acts on: of the largest curvature, random, or the columns of an array.
        flow: The flow; `create` also reads `flow_type`, `flow_depth` and `flow_hidden`.
    """

    family: Literal["mfa", "flow"] = "mfa"
    M: Annotated[int, checks.integer] = 8
    r: Annotated[int, checks.natural] = _DEFAULT_RANK
    r_per_component: Annotated[tuple[int, ...] | None, checks.ranks] = None
    means: Literal["shared", "center", "component"] = "shared"
    curvature_rank: Annotated[Literal["auto"] | int, checks.auto_or_integer] = "auto"
    curvature_examples: Annotated[int | None, checks.integer] = None
    mixture_cap: Annotated[int | None, checks.integer] = None
    prune_threshold: Annotated[float | None, checks.fraction] = _SEEDS_PRUNE_THRESHOLD
    alpha_dirichlet_prior: Annotated[float | None, checks.positive] = None
    entropy_bonus: Annotated[float, checks.nonnegative] = 0.0
    entropy_bonus_steps: Annotated[int | None, checks.integer] = None
    alpha_temperature: Annotated[float, checks.at_least_half] = 1.0
    alpha_temperature_frac: Annotated[float, checks.fraction] = 0.0
    steps: Annotated[int, checks.integer] = 5000
    batch_size: Annotated[int | None, checks.integer] = None
    lr: Annotated[float, checks.positive] = 1e-2
    lr_schedule: Literal["none", "cosine", "linear_decay"] = "cosine"
    lr_warmup_frac: Annotated[float, checks.fraction] = 0.05
    clip_global_norm: Annotated[float | None, checks.positive] = 5.0
    samples_per_step: Annotated[int | None, checks.integer] = None
    antithetic: bool = True
    early_stop: Annotated[bool | None, checks.boolean] = None
    eval_every: Annotated[int, checks.integer] = 50
    eval_samples: Annotated[int | None, partial(checks.integer, minimum=4)] = None
    control_variate: Literal["auto", "hvp", "none"] = "auto"
    trace_probes: Annotated[int, checks.integer] = 16
    correction: Annotated[
        Literal["none", "auto", "importance", "mcmc"] | None, partial(checks.choice, choices=CORRECTIONS)
    ] = None
    correction_error: Annotated[float, checks.positive] = 0.02
    correction_budget: Annotated[float, checks.positive] = 20_000.0
    whitening_mode: Literal["none", "rmsprop", "adam", "hvp_diag"] = "none"
    whitening_decay: Annotated[float, checks.decay] = 0.99
    use_whitening: bool = True
    dtype: Literal["float32", "float64"] = "float32"
    tensorboard: bool = False
    gamma: Annotated[float | None, checks.nonnegative] = None
    backend: Annotated[str, checks.backend] = "native"
    d_latent: Annotated[Literal["auto"] | int, checks.auto_or_positive] = "auto"
    sigma_perp: Annotated[float | None, checks.positive] = None
    learn_sigma_perp: bool = True
    lift: Literal["core", "injective"] = "core"
    latent_basis: Annotated[str | Basis, checks.basis] = "curvature"
    flow: Annotated[FlowConfig, _flow] = FlowConfig()

    def __post_init__(self) -> None:
        """Read a null schedule, check every field, then the fields against each other."""
        if self.lr_schedule is None:
            object.__setattr__(self, "lr_schedule", "none")
        super().__post_init__()
        if self.r_per_component is not None and len(self.r_per_component) != self.M:
            fix = f"give one rank per component, or use M={len(self.r_per_component)}"
            raise checks.refusal("r_per_component", f"a list of M={self.M} ranks", self.r_per_component, fix)

    @classmethod
    def create(cls, source: Any = None, /, **overrides: Any) -> Self:
        """Build a config from `source`, with `overrides` in place of what it says.

        Args:
            source: None, a VIConfig, another dataclass instance, a mapping, an OmegaConf DictConfig, a
                namespace, or the path of a YAML file. A `vi` or an `overrides` entry, alone or beside `name: vi`, is
                unwrapped.
            **overrides: Fields, aliases included. A `flow` mapping replaces only the entries it names.

        Raises:
            ConfigError: If the source cannot be read, a name is unknown or a value impossible.
        """
        base, changes = _canonical(sources.read(source)), _canonical(overrides)
        if "flow" in base and "flow" in changes:
            changes["flow"] = base["flow"] | changes["flow"]
        return cls(**base | changes)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`, which are the overrides of `create`."""
        return type(self).create(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, with `flow` nested and lists for tuples, which `create` reads back."""
        return asdict(self, dict_factory=lambda items: {name: sources.written(value) for name, value in items})

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write a YAML file, which `create` reads back; needs PyYAML."""
        Path(path).write_text(sources.import_yaml().safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each of the M components."""
        return (self.r,) * self.M if self.r_per_component is None else self.r_per_component

    @property
    def step_draws(self) -> int:
        """Draws of one step."""
        return 1 if self.samples_per_step is None else self.samples_per_step

    @property
    def evaluation_draws(self) -> int:
        """Draws of the final estimate: an even number, mirrored pairs."""
        draws = _DEFAULT_EVALUATION_DRAWS if self.eval_samples is None else self.eval_samples
        return draws - draws % 2

    @property
    def hessian_examples(self) -> int:
        """Examples of the Hessian at w*, before they are cut to the data."""
        return _DEFAULT_CURVATURE_EXAMPLES if self.curvature_examples is None else self.curvature_examples

    @property
    def rank(self) -> int:
        """Largest rank, the columns that the factors are padded to."""
        return max(self.ranks)

    @property
    def whitening(self) -> str:
        """The whitening in effect: `whitening_mode`, or "none" when `use_whitening` is False."""
        return self.whitening_mode if self.use_whitening else "none"

    def latent_dim(self, dim: int) -> int:
        """Return `d_latent`, or where it is "auto" as many dimensions as a flow handles well."""
        if self.d_latent == "auto":
            if isinstance(self.latent_basis, Basis):
                return self.latent_basis.columns.shape[1]
            return dim if dim <= FULL_LATENT_DIM else AUTO_LATENT_DIM
        return int(self.d_latent)

    def check_against(self, dim: int, n_data: int) -> None:
        """Raise ConfigError for a rank or latent dimension above `dim`, or a minibatch above `n_data`."""
        rank_field = "r" if self.r_per_component is None else "r_per_component"
        latent = self.d_latent if self.family == "flow" else None
        if self.family == "flow":
            self._check_flow(dim)
        bounded_by_dim = {rank_field: self.rank, "curvature_rank": self.curvature_rank, "d_latent": latent}
        for name, size in bounded_by_dim.items():
            is_default = name == "r" and size == _DEFAULT_RANK  # cut to fit
            if isinstance(size, int) and size > dim and not is_default:
                raise checks.refusal(name, f"<= dim={dim}", getattr(self, name), f"use {dim} or less")
        if self.batch_size is not None and self.batch_size > n_data:
            raise checks.refusal("batch_size", f"<= n_data={n_data}", self.batch_size, f"use {n_data} or less")

    def _check_flow(self, dim: int) -> None:
        """Refuse a flow that the backend does not have."""
        from fastvi.families.backends import find_backend

        latent = self.latent_dim(dim)
        if isinstance(self.latent_basis, Basis) and self.latent_basis.columns.shape != (dim, latent):
            rule = f"an array of shape (dim={dim}, d_latent={latent})"
            raise checks.refusal("latent_basis", rule, self.latent_basis, "give one column for each latent dimension")
        find_backend(self.backend)(latent, self.flow)

    @property
    def prunes(self) -> bool:
        """Whether components are pruned during the fit."""
        return self.mixture_cap is not None or self.prune_threshold not in (_SEEDS_PRUNE_THRESHOLD, None)

    @property
    def anneals(self) -> bool:
        """Whether the temperature or the entropy bonus changes during the fit."""
        return self.settled_after > 0

    @property
    def settled_after(self) -> int:
        """Count the steps after which temperature and entropy bonus stay as they are."""
        heated = math.ceil(self.alpha_temperature_frac * self.steps) if self.alpha_temperature != 1 else 0
        ends = self.entropy_bonus > 0 and self.entropy_bonus_steps is not None
        return max(heated, min(self.entropy_bonus_steps or 0, self.steps) if ends else 0)

    def check_available(self) -> None:
        """Raise UnavailableError for pruning with the flow family."""
        if self.family == "flow" and self.prunes:
            raise UnavailableError(
                "the flow family has no components to prune; leave out mixture_cap and prune_threshold, "
                "or use family='mfa'"
            )


def _canonical(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Put aliases under the names they stand for, and make `flow` a dict of the entries that were given."""
    _refuse_unknown(VIConfig, given, also=_ALIASES)
    found = {name: value for name, value in given.items() if name not in _ALIASES}
    if "flow" in found:
        found["flow"] = sources.entries("flow", found["flow"], "for example {'depth': 4}")
    for alias in [name for name in _ALIASES if name in given]:
        full, value = _ALIASES[alias], given[alias]
        name = full.removeprefix("flow.")
        cls, target = (VIConfig, found) if name == full else (FlowConfig, found.setdefault("flow", {}))
        if name in target and _checked(cls, name, target[name]) != _checked(cls, name, value):
            raise checks.refusal(alias, f"equal to {full}={target[name]!r}", value, f"give {full} alone")
        target[name] = value
    return found
