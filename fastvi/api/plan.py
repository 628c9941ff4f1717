"""The plan of an estimate: every open choice made, by pure functions, and the stages' settings."""

import dataclasses
from typing import Any, NamedTuple

from fastvi._errors import ConfigError
from fastvi.config import VIConfig
from fastvi.evaluation.control_variate import pairs_for
from fastvi.evaluation.llc import EvaluationSettings
from fastvi.evaluation.stein import even_monomials
from fastvi.fitting.schedule import few_dimensions_factor
from fastvi.fitting.stages import FamilyChoice, FitSettings
from fastvi.fitting.step import StepSettings
from fastvi.fitting.step_plan import MOST_COMPONENTS, ScheduleSettings
from fastvi.geometry.start import StartSettings
from fastvi.results.work import bound_work
from fastvi.sampling.gradients import block_counts
from fastvi.sampling.settings import SamplerSettings
from fastvi.target.checks import LossLook
from fastvi.target.data import Problem

DEFAULT_BATCH_SIZE = 256  # examples; half is noisier a step, double dearer
DEFAULT_CHAINS = 4  # of a fit that nothing follows: their spread is the error's upper bound
# Examples that a fit in few dimensions takes whole at each step.
WHOLE_DATA = 2 * DEFAULT_BATCH_SIZE
# A fit that only prepares walkers; what it leaves undone costs them a few steps.
PREPARATION = {
    "steps": 200,
    "batch_size": 64,
    "samples_per_step": 1,
    # Reweighted draws state their own error: of 32 draws it was a half of the real one where it was
    # small enough to be taken, of 128 within a tenth, at a tenth of the work of a walk.
    "eval_samples": 128,
    "curvature_examples": 512,
}
# Least draws of a step and of the evaluation for a flow on some and on all dimensions: the gradient
# of a flow that bends has noise even where it fits as well as it can, unlike that of a Gaussian.
FLOW_STEP_DRAWS, FLOW_EVALUATION_DRAWS = (8, 128), (64, 512)
FAMILY_COLUMNS = 3  # control variates of each family's own, `AbstractMoments.control_variates`
MOST_STEP_GRADIENTS = 24  # full gradients of a step of one chain that draws beyond two may take
MAX_STEP_FACTOR, MAX_EVALUATION_FACTOR = 128, 32  # in few dimensions
PASSES = 20_000  # full passes over the data that a budget is worth where nobody gives one
# Sample gradients of a walk in a large model, or over data of unknown size; ten times what an
# estimate of a language model usually pays. Half of it ends a hard one early, twice as much only
# bounds later.
BUDGET_OF_UNKNOWN_DATA = 1e6


class Plan(NamedTuple):
    """A configuration with nothing left open, and the number of chains."""

    config: VIConfig
    num_chains: int


# Sample gradients that a walk from the localizer takes at most, where none were given and n is
# known, and those times the parameters: two to four minutes on two cores. Walks that settle take
# less; at half, those of a few directions among thousands end unsettled, at double, twice as late.
MOST_OF_WALK, WALK_NUMBERS = 1e7, 5e10


def walk_budget(num_data: int | None, dim: int) -> float:
    """Return the default budget of a walk from the localizer."""
    affordable = min(MOST_OF_WALK, WALK_NUMBERS / dim)
    return min(default_budget(num_data), max(BUDGET_OF_UNKNOWN_DATA, affordable))


def default_budget(num_data: int | None) -> float:
    """Return the most sample gradients of an estimate that names no budget."""
    return BUDGET_OF_UNKNOWN_DATA if num_data is None else float(PASSES * num_data)


def plan_estimate(config: VIConfig, problem: Problem, num_chains: int | None) -> Plan:
    """Return the plan of `estimate_llc`.

    A fit that only prepares walkers is one short chain on little data, where the configuration
    leaves that open. In few dimensions a step takes all data: the noise of minibatches would cost
    more draws than they save.
    """
    dim, num_data = problem.posterior.center.size, problem.num_data
    prepares = config.method not in ("variational", "reweight") and not config.early_stop
    changes: dict[str, Any] = {"batch_size": problem.batch_size}
    if few_dimensions_factor(dim, 2) > 1 and problem.holds_all and num_data <= WHOLE_DATA:
        changes["batch_size"] = num_data
    if prepares:
        batch = min(PREPARATION["batch_size"], num_data)
        changes = {**PREPARATION, "batch_size": batch, "samples_per_step": config.step_draws}
    changes |= {
        "early_stop": not prepares and config.early_stop is not False,
        # gradients that are named are not for draws to be reweighted instead
        "method": config.method or ("auto" if config.sampler.gradients == "auto" else "sample"),
        "curvature_examples": changes.get("curvature_examples", config.hessian_examples),
        # Covariance has no more directions than dimensions.
        "r": min(config.filled.r, dim),
    }
    # What was given is honoured or refused, never replaced.
    open_fields = {name: value for name, value in changes.items() if getattr(config, name) is None}
    config = config.replace(**open_fields)
    share = min((config.batch_size or num_data) / num_data, 1.0)
    config = with_control_variate(with_draws(config, dim, share), dim)
    return Plan(config.recorded, num_chains or (1 if prepares else DEFAULT_CHAINS))


def bound_fit(
    problem: Problem, plan: Plan, look: LossLook = LossLook(), is_warm: bool = False
) -> float:
    """Return the most sample gradients that fit and evaluation can take, the look's among them."""
    work = bound_work(
        problem, plan.config, start_settings(plan.config), plan.num_chains, look, is_warm
    )
    return float(work.total_fge * problem.num_data)


def check_budget(
    problem: Problem, plan: Plan, look: LossLook = LossLook(), is_warm: bool = False
) -> None:
    """Refuse a budget that the fit alone may exceed.

    Raises:
        ConfigError: If it may.
    """
    budget, most = plan.config.budget, bound_fit(problem, plan, look, is_warm)
    if budget is not None and budget < most:
        raise ConfigError(
            f"budget={budget:.4g} sample gradients do not pay for the fit, which may take "
            f"{most:.4g} of them. Give twice that, fewer steps or eval_samples; or leave out what "
            "asks for a fit: a walk from the localizer keeps to any budget."
        )


def check_blocks(problem: Problem, sampler: SamplerSettings) -> None:
    """Refuse gradients of blocks where the data cannot be split into any.

    Raises:
        ConfigError: If they are asked for.
    """
    dim = problem.posterior.center.size
    if sampler.gradients == "blocks" and block_counts(problem.num_data, dim, sampler) == (1,):
        raise ConfigError(
            f'sampler.gradients="blocks" must have four blocks of min_block={sampler.min_block} '
            f"examples, and their gradients at one point in table_floats={sampler.table_floats} "
            f'numbers; got {problem.num_data} examples in {dim} dimensions. Take "full", or change '
            "these."
        )


def with_draws(config: VIConfig, dim: int, share: float) -> VIConfig:
    """Fill in the draws of a step and of the evaluation: more in few dimensions.

    A minibatch of this share of the data bounds the draws, but for one or two dimensions, whose
    tails take them.
    """
    step = 2 * few_dimensions_factor(dim, MAX_STEP_FACTOR)
    if dim > 2:
        # Even, since draws come in mirrored pairs.
        step = max(2, min(step, 2 * int(MOST_STEP_GRADIENTS / share / 2)))
    more = config.evaluation_draws * few_dimensions_factor(dim, MAX_EVALUATION_FACTOR)
    if config.family == "flow":
        whole = config.family_settings.latent_dim(dim) == dim
        step, more = max(step, FLOW_STEP_DRAWS[whole]), max(more, FLOW_EVALUATION_DRAWS[whole])
    return config.replace(
        samples_per_step=config.samples_per_step or step,
        eval_samples=config.eval_samples or more,
    )


def with_control_variate(config: VIConfig, dim: int) -> VIConfig:
    """Leave the control variate out where the draws are too few to find its coefficients.

    Raises:
        ConfigError: If it was asked for.
    """
    wanted, pairs = config.control_variate or "auto", config.evaluation_draws // 2
    if wanted == "none":
        return config
    # Where no polynomials are afforded, the family's own columns are taken.
    columns = 1 if wanted == "hvp" else even_monomials(dim, pairs).shape[0] or FAMILY_COLUMNS
    if pairs >= pairs_for(columns):
        return config.replace(control_variate=wanted)
    if config.control_variate is None:
        return config.replace(control_variate="none")
    raise ConfigError(
        f"control_variate={wanted!r} must have {2 * pairs_for(columns)} draws or more to find its "
        "coefficients from; "
        f'got eval_samples={config.eval_samples}: give more, or control_variate="none".'
    )


def fit_settings(config: VIConfig) -> FitSettings:
    """Return what the programs of a fit are made for.

    Of what changes during a fit only that it does: the numbers are in `fit_schedule`.
    """
    filled = config.filled
    return FitSettings(
        start=start_settings(filled),
        step=StepSettings(
            num_draws=filled.step_draws,
            mirrors=filled.mirrors,
            max_ratio=filled.clip_global_norm,
            anneals=fit_schedule(filled).anneal_until > 0,
            prunes=filled.prunes,
        ),
        evaluation=EvaluationSettings(
            filled.evaluation_draws, filled.control_variate or "auto", filled.trace_probes
        ),
    )


def family_choice(config: VIConfig) -> FamilyChoice:
    """Return the family, whose temperature and bonus are left out where they change."""
    filled = config.filled
    # Programs are made for a family; what changes from step to step reaches them as numbers.
    changing: dict[str, Any] = {}
    if filled.entropy_bonus_steps is not None:
        changing |= {"entropy_bonus": 0.0, "entropy_bonus_steps": None}
    if filled.alpha_temperature_frac > 0:
        changing |= {"alpha_temperature": 1.0, "alpha_temperature_frac": 0.0}
    settings = config.family_settings
    names = {field.name for field in dataclasses.fields(settings)} & {*changing}
    changed = dataclasses.replace(settings, **{name: changing[name] for name in names})
    return FamilyChoice(config.family, changed)


def start_settings(config: VIConfig) -> StartSettings:
    """Return what the start of a fit is made for."""
    filled, rank = config.filled, config.curvature_rank
    return StartSettings(
        # The only text is "auto".
        rank=None if isinstance(rank, str) else rank,
        examples=filled.hessian_examples,
        whitening=filled.whitening,
        whitening_decay=filled.whitening_decay,
    )


def fit_schedule(config: VIConfig) -> ScheduleSettings:
    """Return how rates, annealing and pruning go along a fit."""
    filled = config.filled
    return ScheduleSettings(
        steps=filled.steps,
        rate=filled.lr,
        decay=filled.lr_schedule,
        end_fraction=filled.lr_end_fraction,
        warmup_fraction=filled.lr_warmup_frac,
        record_every=filled.eval_every,
        temperature=filled.alpha_temperature,
        temperature_fraction=filled.alpha_temperature_frac,
        entropy_bonus=filled.entropy_bonus,
        entropy_bonus_steps=filled.entropy_bonus_steps,
        least_weight=filled.prune_threshold or 0.0,
        most_components=filled.mixture_cap or MOST_COMPONENTS,
    )
