"""Fields of a configuration that nothing reads beside its others: whoever gives one is told why."""

import dataclasses
from typing import Any, NamedTuple

from fastvi.families import FAMILIES
from fastvi.geometry.start import StartSettings, rank_limit


def fields_of_family(name: str) -> set[str]:
    """Return what a family reads: fields of the configuration, and options of its own."""
    return {field.name for field in dataclasses.fields(FAMILIES[name].Settings)}


class Idle(NamedTuple):
    """Why a field has no effect: it must be `rule`, and `fix` is what to do."""

    rule: str
    fix: str


def idle_fields(config: Any, dim: int | None = None) -> dict[str, Idle]:
    """Return the fields that have no effect in a configuration, given or not.

    Args:
        config: A `VIConfig`.
        dim: Number of parameters, where it is known: it decides whether a flow leaves any direction
            out.
    """
    filled, found = config.filled, _of_other_families(config)
    if config.family == "flow":
        found |= _of_the_flow(filled, dim)
    conditions = {
        "trace_probes": (filled.control_variate == "hvp", 'control_variate="hvp"'),
        "whitening_decay": (
            filled.whitening in ("rmsprop", "adam"),
            'whitening_mode="rmsprop" or "adam"',
        ),
        "entropy_bonus_steps": (filled.entropy_bonus > 0, "an entropy_bonus above 0"),
        "lr_end_fraction": (filled.lr_schedule != "none", 'lr_schedule="cosine" or "linear_decay"'),
        **dict.fromkeys(
            ("error", "budget", "sampler"),
            (filled.method in (None, "auto", "sample"), 'method="auto" or "sample"'),
        ),
        "alpha_temperature_frac": (
            filled.alpha_temperature != 1,
            "an alpha_temperature other than 1",
        ),
    }
    return found | {
        name: Idle(f"left out without {what}, which alone reads it", f"add {what}, or drop it")
        for name, (is_met, what) in conditions.items()
        if not is_met and name not in found
    }


def _of_other_families(config: Any) -> dict[str, Idle]:
    read = fields_of_family(config.family)
    return {
        name: Idle(
            f"left out with family={config.family!r}, which does not read it",
            f"use family={family!r}, or drop it",
        )
        for family in FAMILIES
        for name in fields_of_family(family) - read
        if hasattr(config, name)
    }


def _of_the_flow(filled: Any, dim: int | None) -> dict[str, Idle]:
    found = {}
    if filled.means == "component":
        found["means"] = Idle(
            "'shared' or 'center' with family='flow', which has one mean", "use family='mfa'"
        )
    if filled.lift == "injective" and filled.means != "center":
        found["means"] = Idle(
            "'center' with lift='injective', which keeps w* as its mean", "use lift='core'"
        )
    if not filled.family_settings.flow.has_splines:
        rule = f"left out with flow.template={filled.flow.template!r}, which has no splines"
        found["flow.bins"] = Idle(
            rule, "use flow.template='nsf_ar' or 'spline_coupling', or drop it"
        )
    # In all coordinates nothing is off the flow's subspace.
    if dim is not None and filled.family_settings.latent_dim(dim) == dim:
        rule = (
            f"left out where the flow acts on all d = {dim} dimensions: nothing is left for the "
            "noise beyond them"
        )
        idle = ("sigma_perp",) if filled.learn_sigma_perp else ("sigma_perp", "learn_sigma_perp")
        found |= dict.fromkeys(idle, Idle(rule, "give a d_latent below d, or drop it"))
    return found


def may_cover_all(config: Any, dim: int) -> bool:
    """Say whether flow and core may leave no direction for the noise beyond them."""
    filled, latent = config.filled, config.family_settings.latent_dim(dim)
    rank = None if config.curvature_rank == "auto" else config.curvature_rank
    core = 0 if filled.lift == "injective" else rank_limit(StartSettings(rank), dim, itemsize=4)
    # Along the curvature the flow's directions are rows of the core, elsewhere its own.
    own = 0 if filled.latent_basis == "curvature" else latent
    return max(latent, own + core) >= dim
