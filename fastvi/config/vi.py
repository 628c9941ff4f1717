"""Configuration of a variational fit.

`VIConfig`, from keywords, mappings, OmegaConf, dataclasses or YAML.

Unknown names and impossible values are refused where they enter, with the rule, what came and the
likely fix.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, final

from fastvi._errors import UnavailableError
from fastvi.config import rules as checks
from fastvi.config import sources
from fastvi.config.effects import fields_of_family, idle_fields, may_cover_all
from fastvi.config.fields import OPEN, CheckedFields, Open, checked, nearest, refuse_unknown
from fastvi.config.nested import (
    FlowConfig,
    Options,
    flow_entry,
    nested_entries,
    options_entry,
    sampler_entry,
)
from fastvi.families import FAMILIES
from fastvi.families.backends.base import Architecture
from fastvi.families.basis import Basis
from fastvi.fitting.step_plan import FINAL_RATE
from fastvi.sampling.settings import SamplerSettings

# Names that `create` reads, and the fields that they stand for.
_ALIASES = {
    "algo": "family",
    "flow_type": "flow.template",
    "flow_depth": "flow.depth",
    "flow_hidden": "flow.hidden",
    **{name: name for name in (f"flow.{field.name}" for field in fields(FlowConfig))},
}
# Draws of a chain where neither a person nor a plan says how many. At half, the error of q's
# average is 1.4 times as large; at double, the evaluation costs twice as much.
_DEFAULT_EVALUATION_DRAWS = 64
_DEFAULT_CURVATURE_EXAMPLES = 4096  # that the Hessian at w* is averaged over, at most
# What a field that is None, not given, takes: a plan, a family or another field may put something
# else in its place.
_DEFAULTS: dict[str, Any] = {
    "M": 8,
    "r": 2,
    "means": "shared",
    "prune_threshold": 1e-3,  # where mixture_cap is given
    "alpha_temperature": 1.0,
    "alpha_temperature_frac": 0.0,
    "steps": 5000,
    "lr_end_fraction": FINAL_RATE,
    "trace_probes": 16,
    "error": 0.02,
    "whitening_decay": 0.99,
    "backend": "native",
    "d_latent": "auto",
    "learn_sigma_perp": True,
    "lift": "core",
    "latent_basis": "curvature",
}
# The same of fields that stay None in `filled`, because the counts of draws decide.
_USUAL = {"antithetic": True, "control_variate": "auto"}


@final
@dataclass(frozen=True, kw_only=True)
class VIConfig(CheckedFields):
    """Configure a variational fit: immutable and hashable; `create` builds one from other sources.

    An unknown name, an impossible value, or values at odds with each other raise ConfigError.

    Attributes:
        family: Variational family. `create` also reads it from `algo`. A field that only the other
            family reads is refused.
        options: Entries of the `Settings` of a registered family that are no fields here, such as
            `{"stretch": 2.0}`. Others are refused.
        M: Number of mixture components. None means 8, or as many as `r_per_component` has ranks.
        r: Columns of each component's covariance factor, at most d. Unused beside
            `r_per_component`. None means 2, or d if that is less.
        r_per_component: Ranks of the M components, one each, instead of `r`.
        means: What the means of the components are. "shared" learns one, "component" learns M, and
            "center" keeps w*. A flow has one. None means "shared", and "center" where `lift` is
            "injective".
        implementation: Implementation of draws from the mixture and of its density. "pallas" is for
            NVIDIA GPUs and for `means` that are shared or fixed. It is faster than "xla" from
            1,000,000 parameters on. None means "xla".
        curvature_rank: Rows of the shared precision core. "auto" takes them from the Hessian's
            spectrum, at most 64 rows and 128 MiB. 0 means no core.
        curvature_examples: Most examples that the Hessian at w* is averaged over. None means 4096,
            and 512 if the fit only prepares a walk.
        mixture_cap: Most components that pruning leaves. None means no bound.
        prune_threshold: Weight below which a component is pruned, every `eval_every` steps. The
            lightest goes first, the others share its weight, and one always stays. Pruning is on if
            this or `mixture_cap` is given. There is then a trace `effective_M`. None means 0.001
            beside `mixture_cap`. 0 prunes by the cap alone.
        alpha_dirichlet_prior: Concentration of a Dirichlet prior on the mixture weights. None means
            no prior.
        entropy_bonus: Additional weight of the entropy of q in the objective.
        entropy_bonus_steps: Steps after which `entropy_bonus` ends. None means never, and q stays
            too wide.
        alpha_temperature: Temperature of the softmax of the mixture weights. None means 1.
        alpha_temperature_frac: Fraction of the steps over which `alpha_temperature` goes to 1. 0 or
            None keeps it.
        steps: Optimisation steps. With `early_stop` they are a cap. None means 5000, and 200 if the
            fit only prepares a walk. Such a fit also takes minibatches of 64, one draw a step and
            128 evaluation draws, where these are left open.
        batch_size: Examples per minibatch, at most n. None means min(256, n), and min(64, n) if the
            fit only prepares a walk.
        lr: Peak learning rate.
        lr_schedule: How the learning rate decays after the warm-up, from the peak to
            `lr_end_fraction` of it. None is read as "none".
        lr_warmup_frac: Fraction of the steps spent warming up. With `early_stop` it is at most 100
            steps.
        lr_end_fraction: Last learning rate relative to the peak, of either schedule. None means
            0.01: see "The end of the schedule" in docs/configuration.md.
        clip_global_norm: Longest gradient, as a multiple of the running root mean square of earlier
            norms. It is not a norm: 5 means five times the usual one. The multiple grows with the
            square root of the steps after 100. None means no clipping.
        samples_per_step: Draws per step. None means 1 in `fit`, or 2 if `antithetic` is True. In
            `estimate_llc` it means 1 if the fit only prepares a walk, else 2, and more in fewer
            than 17 dimensions: 2 floor(32/d)², at most 256 and, beyond two dimensions, what costs
            24 full gradients. With the family "flow" it means at least 128 if the flow covers every
            dimension, else 8.
        antithetic: Whether the draws of a step come in pairs, mirrored about the component's mean.
            None means yes if their number is even. True beside an odd number is refused.
        early_stop: Whether to stop at convergence. None means yes in `estimate_llc`, but not in a
            fit that only prepares a walk. True makes that a full fit. `fit` and `run_vi` refuse
            True.
        eval_every: Steps between records of the D_sqrt and A_col_norm traces, which hold their
            value in between. It is also the number of steps between prunings, and between records
            for TensorBoard.
        eval_samples: Draws of the final estimate, rounded down to an even number. None means 64,
            and 128 if the fit only prepares a walk. In other fits of `estimate_llc` it means more
            in fewer than 17 dimensions: times floor(32/d)², at most 32. With the family "flow" it
            means at least 512 if the flow covers every dimension.
        control_variate: Control variate of the final estimate: q's own curvature ("auto"), the
            Hessian at w* ("hvp"), or none. None means "auto", and "none" below 32 evaluation draws,
            which are too few to find its coefficients from. There "auto" is refused. "hvp" is
            refused below 16.
        trace_probes: Hutchinson probes of `control_variate="hvp"`. Refused without it. None means
            16.
        method: How the posterior is averaged over. "variational" averages over q itself. "reweight"
            averages over the evaluation's draws of q, with importance weights. "sample" averages
            over walkers that start at draws of q. "auto" chooses between the last two. None means
            "auto" in `estimate_llc`, and "variational" in `fit` and `run_vi`, which refuse all
            else.
        error: Standard error at which sampling may end, relative to the size of llc. None means
            0.02. Near llc = 0 no error is small enough, and the budget ends the run. Refused if the
            method is "variational" or "reweight".
        budget: Sample gradients that an estimate never exceeds: look, fit, evaluation and all
            walkers together. Of `fastvi.correct` it bounds what that adds. One example's gradient
            at one point counts 1, its loss 1/3, its Hessian-vector product 2. Walkers that share a
            batch count each. None means 20,000 n for the walkers, and 1,000,000 if n is not known.
            For a walk without a fit it means at most 10,000,000, or 5e10 over the number of
            parameters, but 1,000,000 at least. Refused if the method is "variational" or
            "reweight".
        max_batch: The most examples of one forward-backward pass. Walkers, draws and tangents side
            by side share it. Larger batches are averaged in slices. None means as many as 16 MiB
            hold, of examples and of what the loss computes of them.
        sampler: How walkers move, below. A mapping replaces only the entries that it names. Refused
            if the method is "variational" or "reweight".
        whitening_mode: Diagonal whitening that is measured at the center before the fit. A
            `whitener` that `fit` is given takes its place.
        whitening_decay: Decay of the moving averages of "rmsprop" and "adam". Refused without them.
            None means 0.99.
        use_whitening: False turns `whitening_mode` off.
        dtype: Floating-point type of the fit. "float64" needs `jax_enable_x64`.
        tensorboard: Whether the command line writes events for TensorBoard to `diagnostics/tb` in
            the run folder. `estimate_llc` then keeps the shape of q after every `eval_every` steps
            for them. `fit` and `run_vi` write to no folder and refuse True: `write_events` takes
            what `run_vi` returns.
        gamma: Localization strength, where the entry point is not given one. If both are given they
            must be equal.
        backend: Library of the flow. None means "native".
        d_latent: Dimensions that the flow acts on, at most d. "auto" or None means all of up to 64,
            else 8.
        sigma_perp: Standard deviation of the flow family's noise off the subspace where it starts,
            in the whitener's coordinates. None takes it from the curvature. Refused if flow and
            core cover all dimensions.
        learn_sigma_perp: Whether `sigma_perp` is learned. None means yes.
        lift: What the flow sits on. "core" is the learned linear map of the Laplace approximation,
            with a free mean. "injective" adds isotropic noise to a subspace through w*. None means
            "core".
        latent_basis: Directions that the flow acts on: those of the largest curvature, random ones,
            or the columns of an array (d, d_latent) in model coordinates. None means "curvature".
        flow: The flow, below. `create` also reads `flow_type`, `flow_depth`, `flow_hidden`, and its
            entries by dotted names such as `flow.hidden`.
    """

    usual: ClassVar[Mapping[str, Any]] = _DEFAULTS | _USUAL
    aliases: ClassVar[Mapping[str, str]] = _ALIASES

    family: Annotated[str, checks.family] = "mfa"
    options: Annotated[Options, options_entry] = ()
    M: Annotated[Open[int], checks.integer] = OPEN
    r: Annotated[Open[int], checks.natural] = OPEN
    r_per_component: Annotated[tuple[int, ...] | None, checks.ranks] = None
    means: Open[Literal["shared", "center", "component"]] = OPEN
    implementation: Open[Literal["xla", "pallas"]] = OPEN
    curvature_rank: Annotated[Literal["auto"] | int, checks.auto_or_integer] = "auto"
    curvature_examples: Annotated[int | None, checks.integer] = None
    mixture_cap: Annotated[int | None, checks.integer] = None
    prune_threshold: Annotated[float | None, checks.fraction] = None
    alpha_dirichlet_prior: Annotated[float | None, checks.positive] = None
    entropy_bonus: Annotated[float, checks.nonnegative] = 0.0
    entropy_bonus_steps: Annotated[int | None, checks.integer] = None
    alpha_temperature: Annotated[Open[float], checks.at_least_half] = OPEN
    alpha_temperature_frac: Annotated[Open[float], checks.fraction] = OPEN
    steps: Annotated[Open[int], checks.integer] = OPEN
    batch_size: Annotated[int | None, checks.integer] = None
    lr: Annotated[float, checks.positive] = 1e-2
    lr_schedule: Literal["none", "cosine", "linear_decay"] = "cosine"
    lr_warmup_frac: Annotated[float, checks.fraction] = 0.05
    lr_end_fraction: Annotated[Open[float], checks.share] = OPEN
    clip_global_norm: Annotated[float | None, checks.positive] = 5.0
    samples_per_step: Annotated[int | None, checks.integer] = None
    antithetic: bool | None = None
    early_stop: bool | None = None
    eval_every: Annotated[int, checks.integer] = 50
    eval_samples: Annotated[int | None, partial(checks.integer, minimum=4)] = None
    control_variate: Literal["auto", "hvp", "none"] | None = None
    trace_probes: Annotated[Open[int], checks.integer] = OPEN
    method: Open[Literal["auto", "sample", "reweight", "variational"]] = OPEN
    error: Annotated[Open[float], checks.positive] = OPEN
    budget: Annotated[Open[float], checks.positive] = OPEN
    max_batch: Annotated[int | None, checks.integer] = None
    sampler: Annotated[SamplerSettings, sampler_entry] = SamplerSettings()
    whitening_mode: Literal["none", "rmsprop", "adam", "hvp_diag"] = "none"
    whitening_decay: Annotated[Open[float], checks.decay] = OPEN
    use_whitening: bool = True
    dtype: Literal["float32", "float64"] = "float32"
    tensorboard: bool = False
    gamma: Annotated[float | None, checks.nonnegative] = None
    backend: Annotated[Open[str], checks.backend] = OPEN
    d_latent: Annotated[Open[Literal["auto"] | int], checks.auto_or_positive] = OPEN
    sigma_perp: Annotated[float | None, checks.positive] = None
    learn_sigma_perp: Open[bool] = OPEN
    lift: Open[Literal["core", "injective"]] = OPEN
    latent_basis: Annotated[Open[str | Basis], checks.basis] = OPEN
    flow: Annotated[FlowConfig, flow_entry] = FlowConfig()

    def __post_init__(self) -> None:
        """Read a null schedule, check every field, then the fields against each other."""
        if self.lr_schedule is None:
            object.__setattr__(self, "lr_schedule", "none")
        super().__post_init__()
        self._check_options()
        ranks, draws = self.r_per_component, self.samples_per_step
        if ranks is not None and self.M not in (None, len(ranks)):
            fix = f"give one rank per component, or use M={len(ranks)}"
            raise checks.refusal("r_per_component", f"a list of M={self.M} ranks", ranks, fix)
        if self.implementation == "pallas" and self.means == "component":
            rule = "'xla' beside means='component', which 'pallas' does not have"
            raise checks.refusal("implementation", rule, "pallas", "use means='shared'")
        if self.antithetic and draws is not None and draws % 2:
            rule = "False beside an odd samples_per_step: mirrored draws come in pairs"
            raise checks.refusal("antithetic", rule, True, f"use samples_per_step={draws + 1}")

    def _check_options(self) -> None:
        # What is a field of this class too is given as one, where its rule checks it.
        own = fields_of_family(self.family) - {field.name for field in fields(self)}
        for name, value in self.options:
            if name not in own:
                known = ", ".join(sorted(own)) or "it has none"
                rule = f"an entry of family={self.family!r} that is no field of VIConfig ({known})"
                raise checks.refusal(
                    f"options.{name}", rule, value, nearest(name, {o: o for o in own})
                )

    @classmethod
    def create(cls, source: Any = None, /, **overrides: Any) -> Self:
        """Build a config from `source`, with `overrides` in place of what it says.

        Args:
            source: None, a VIConfig, another dataclass instance, a mapping, an OmegaConf
                DictConfig, a namespace, or the path of a YAML file. A `vi` or an `overrides` entry,
                alone or beside `name: vi`, is unwrapped.
            **overrides: Fields, aliases included. A `flow`, a `sampler` or an `options` mapping
                replaces only the entries it names.

        Raises:
            ConfigError: If the source cannot be read, a name is unknown or a value impossible.
        """
        base, changes = _canonical(sources.read(source)), _canonical(overrides)
        # Both sides are dicts of the entries that they name.
        for name in {"flow", "sampler", "options"} & base.keys() & changes.keys():
            changes[name] = base[name] | changes[name]
        return cls(**base | changes)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`, which are the overrides of `create`."""
        return type(self).create(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, mappings nested, which `create` reads back."""
        plain = asdict(
            self, dict_factory=lambda items: {name: sources.written(value) for name, value in items}
        )
        # Options are kept as pairs, so that a configuration can be hashed.
        return {**plain, "options": dict(self.options)}

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write a YAML file, which `create` reads back; needs PyYAML."""
        Path(path).write_text(sources.format_yaml(self.to_dict()), encoding="utf-8")

    @property
    def filled(self) -> "VIConfig":
        """This configuration with the default in place of what is not given, as stages read it.

        What depends on the problem or on the entry point (`batch_size`, counts of draws,
        `early_stop`) stays None.
        """
        return _filled(self)

    @property
    def recorded(self) -> "VIConfig":
        """This configuration filled, but for the fields without an effect.

        What a run says that it did.
        """
        return self.filled.reduced()

    def reduced(self, dim: int | None = None) -> Self:
        """Return a copy without the fields that have no effect beside the others."""
        return self._without(idle_fields(self, dim))

    def applied(self, dim: int) -> Self:
        """Return the configuration of a run in `dim` dimensions: every given field has an effect.

        The complete form, a configuration that gives fields of "mfa" beside d_latent and
        sigma_perp, is one for both families, of which `family` chooses: its fields without an
        effect are left aside.

        Raises:
            ConfigError: If another configuration gives a field that nothing reads.
            UnavailableError: If it prunes the components of a flow.
        """
        self.check_available(dim)
        covers_all = self._is_complete_form and self.family == "flow" and may_cover_all(self, dim)
        return self.reduced(dim)._without(["sigma_perp"] if covers_all else [])

    def check_available(self, dim: int | None = None) -> None:
        """Raise ConfigError for a field without an effect.

        Pruning with the flow family raises UnavailableError.
        """
        if not self._is_complete_form:
            self._refuse_idle(self, dim)

    def check_asked(self, asked: Mapping[str, Any]) -> None:
        """Raise the same for keywords, even beside the complete form."""
        self._refuse_idle(type(self).create(**asked), None)

    def _refuse_idle(self, given: "VIConfig", dim: int | None) -> None:
        if self.family == "flow" and given.prunes:
            raise UnavailableError(
                "the flow family has no components to prune; leave out mixture_cap and "
                "prune_threshold, or use family='mfa'"
            )
        for name, (rule, fix) in idle_fields(self, dim).items():
            if given._gives(name):
                raise checks.refusal(name, rule, given._value(name), fix)

    @property
    def _is_complete_form(self) -> bool:
        return (
            self._gives("d_latent")
            and self._gives("sigma_perp")
            and any(map(self._gives, fields_of_family("mfa") - fields_of_family("flow")))
        )

    def _gives(self, name: str) -> bool:
        # A flow or a sampler of defaults alone says no more than one that is left out.
        return self._value(name) not in (None, FlowConfig(), SamplerSettings())

    def _value(self, name: str) -> Any:
        return self.flow.bins if name == "flow.bins" else getattr(self, name)

    def _without(self, names: Collection[str]) -> Self:
        """Return a copy in which these fields are not given."""
        changes: dict[str, Any] = {name: None for name in names if "." not in name}
        if "flow" in names:
            changes["flow"] = FlowConfig()
        elif "flow.bins" in names:
            changes["flow"] = replace(self.flow, bins=None)
        return replace(self, **changes)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each of the M components."""
        filled = self.filled
        return (filled.r,) * filled.M if self.r_per_component is None else self.r_per_component

    @property
    def mirrors(self) -> bool:
        """Whether the draws of a step come in mirrored pairs, where their number is even."""
        return self.antithetic is not False

    @property
    def step_draws(self) -> int:
        """Draws of one step."""
        return self.samples_per_step or (2 if self.antithetic else 1)

    @property
    def evaluation_draws(self) -> int:
        """Draws of the final estimate: an even number, mirrored pairs."""
        draws = self.eval_samples or _DEFAULT_EVALUATION_DRAWS
        return draws - draws % 2

    @property
    def hessian_examples(self) -> int:
        """Examples of the Hessian at w*, before they are cut to the data."""
        return self.curvature_examples or _DEFAULT_CURVATURE_EXAMPLES

    @property
    def rank(self) -> int:
        """Largest rank, the columns that the factors are padded to."""
        return max(self.ranks)

    @property
    def whitening(self) -> str:
        """The whitening in effect: `whitening_mode`, or "none" when `use_whitening` is False."""
        return self.whitening_mode if self.use_whitening else "none"

    @property
    def family_settings(self) -> Any:
        """The `Settings` of the family, filled by name."""
        filled, settings = self.filled, FAMILIES[self.family].Settings
        shared = fields_of_family(self.family) & {field.name for field in fields(self)}
        given = {name: getattr(filled, name) for name in shared} | dict(self.options)
        if "flow" in given:
            given["flow"] = Architecture(**vars(filled.flow))
        return settings(**given)

    def check_against(self, dim: int, n_data: int) -> None:
        """Raise ConfigError for a rank or a latent dimension above `dim`.

        A minibatch above `n_data` is refused too.
        """
        bounded_by_dim: dict[str, Any] = {"curvature_rank": self.curvature_rank}
        FAMILIES[self.family].check(self.family_settings, dim)
        if self.family == "flow":
            bounded_by_dim["d_latent"] = self.d_latent
        elif self.r_per_component is not None:
            bounded_by_dim["r_per_component"] = self.rank
        else:
            bounded_by_dim["r"] = self.r  # the default is cut to fit
        for name, size in bounded_by_dim.items():
            if isinstance(size, int) and size > dim:
                raise checks.refusal(
                    name, f"<= dim={dim}", getattr(self, name), f"use {dim} or less"
                )
        if self.batch_size is not None and self.batch_size > n_data:
            raise checks.refusal(
                "batch_size", f"<= n_data={n_data}", self.batch_size, f"use {n_data} or less"
            )

    @property
    def of_a_fit(self) -> tuple[str, ...]:
        """Names of the given fields that only a fit, or a walk from one, has a use for."""
        pairs = ((self, type(self)(), ""), (self.sampler, SamplerSettings(), "sampler."))
        return tuple(
            prefix + name
            for given, usual, prefix in pairs
            for name, value in vars(given).items()
            if name not in OF_A_WALK and value != getattr(usual, name)
        )

    @property
    def of_a_walk(self) -> Self:
        """This configuration without the fields of a fit, and walkers that start at the localizer.

        What a walk says that it did; given again, it walks again.
        """
        kept: dict[str, Any] = {name: getattr(self, name) for name in WALK_FIELDS}
        kept["sampler"] = replace(self.sampler, start="localizer")
        return type(self)(**kept)

    @property
    def prunes(self) -> bool:
        """Whether components are pruned during the fit."""
        return self.mixture_cap is not None or self.prune_threshold is not None


# Fields, the sampler's among them, that a walk without a fit reads.
WALK_FIELDS = ("method", "error", "budget", "max_batch", "sampler", "dtype", "gamma")
OF_A_WALK = frozenset((*WALK_FIELDS, "start", "gradients", "walkers", "bin_length", "min_bins"))


@lru_cache(maxsize=256)
def _filled(config: VIConfig) -> VIConfig:
    changes = {
        name: default for name, default in _DEFAULTS.items() if getattr(config, name) is None
    }
    if config.M is None and config.r_per_component is not None:
        changes["M"] = len(config.r_per_component)
    # The default belongs to a cap: without one, only a threshold that is given prunes.
    if config.mixture_cap is None:
        changes.pop("prune_threshold", None)
    # Noise about a subspace through w* has its mean there.
    if config.means is None and config.family == "flow" and config.lift == "injective":
        changes["means"] = "center"
    return replace(config, flow=config.flow.filled, **changes)


def _canonical(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Put aliases under the names they stand for, and make mappings of the nested entries."""
    refuse_unknown(VIConfig, given, also=_ALIASES)
    found = {name: value for name, value in given.items() if name not in _ALIASES}
    if "flow" in found:
        found["flow"] = sources.entries("flow", found["flow"], "for example {'depth': 4}")
    for name in {"sampler", "options"} & found.keys():
        found[name] = nested_entries(name, found[name])
    for alias in [name for name in _ALIASES if name in given]:
        full, value = _ALIASES[alias], given[alias]
        name = full.removeprefix("flow.")
        cls, target = (
            (VIConfig, found) if name == full else (FlowConfig, found.setdefault("flow", {}))
        )
        # A field may be given under two names where they agree.
        if name in target and checked(cls, name, target[name]) != checked(cls, name, value):
            raise checks.refusal(
                alias, f"equal to {full}={target[name]!r}", value, f"give {full} alone"
            )
        target[name] = value
    return found
