"""Every field of the configurations and every keyword.

A value has an effect that is seen, or is refused with why.

Who adds a field or a keyword adds a row here, else `test_every_*_is_listed` fails. Nothing is
fitted: effects are seen in the plan, in the family, in the schedule, and in the traced programs of
single stages.
"""

import dataclasses
import functools
import inspect
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import fastvi
import fastvi.api.curve
import fastvi.api.estimate
import fastvi.api.flat
from fastvi import ConfigError, DataError, FlowConfig, UnavailableError, VIConfig
from fastvi.api.arguments import (
    choose_localization,
    make_problem,
    nonnegative_scalar,
    positive_scalar,
)
from fastvi.api.plan import (
    family_choice,
    fit_schedule,
    fit_settings,
    plan_estimate,
    start_settings,
)
from fastvi.cli.target import parse_settings
from fastvi.families import FAMILIES
from fastvi.families.backends import BACKENDS, NativeBackend
from fastvi.families.backends.base import Architecture
from fastvi.fitting.stages import _evaluation, build_family, nothing_seen
from fastvi.fitting.step import init_state, run_steps
from fastvi.fitting.step_plan import fixed_phases, plan_steps
from fastvi.flows import build_realnvp
from fastvi.geometry.start import make_start
from fastvi.sampling.settings import SamplerSettings
from fastvi.target.data import hold
from fastvi.target.keys import as_key
from fastvi.target.objective import make_flat_objective
from tests.support.stand_ins import begun, finished

DIM, COUNT = 3, 40
HESSIAN = jnp.array([4.0, 2.0, 1.0])
DATA = (np.ones((COUNT, 1), np.float32),)
KEYS = jax.random.split(jax.random.key(0), 1)
START = begun(jnp.ones(DIM), jnp.eye(1, DIM), 1)


def loss(w, batch):
    return 0.5 * jnp.sum(HESSIAN * w**2) * jnp.mean(batch[0])


def tree_loss(params, batch):
    return loss(jnp.concatenate([params["a"], params["b"]]), batch)


PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
OBJECTIVE = make_flat_objective(loss)
BASE = {
    "mfa": {"M": 2, "r": 1, "steps": 4, "batch_size": 8},
    "flow": {
        "steps": 4,
        "batch_size": 8,
        "d_latent": 2,
        "curvature_rank": 0,
        "flow": {"depth": 2, "hidden": [3]},
    },
}


def problem_of(config):
    dtype = jnp.dtype(config.dtype)
    data = hold(jax.tree_util.tree_map(lambda leaf: jnp.asarray(leaf, dtype), DATA))
    return make_problem(jnp.zeros(DIM, dtype), data, 8.0, 1.0, config, "nbeta")


def text_of(function):
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(KEYS)))


def built(config):
    rows = (
        0 if config.family == "flow" else 1
    )  # a flow on all but one direction, for the noise there
    family = build_family(family_choice(config), start_settings(config), START, rows)
    return family, lambda key: family.init(key, START.core[:rows], jnp.zeros(DIM))


def family_of(config):
    """What the family is made of, its numbers, and how its parameters begin."""
    family, _ = built(config)
    leaves, structure = jax.tree_util.tree_flatten(family)
    numbers = [np.asarray(leaf).tolist() for leaf in leaves]
    return text_of(lambda keys: built(config)[1](keys[0])), str(structure), numbers


def state_of(config, keys):
    family, init = built(config)
    params = jax.vmap(init)(keys)
    return (
        family,
        params,
        jax.vmap(lambda one: init_state(family, one, fit_settings(config).step))(params),
    )


def steps_of(config):
    def run(keys):
        family, _, state = state_of(config, keys)
        settings, plan = fit_settings(config).step, planned(config)
        return run_steps(family, OBJECTIVE, problem_of(config), settings, state, keys, plan)[1]

    return text_of(run)


def start_of(config):
    problem = problem_of(config)
    settings = fit_settings(config).start
    rows = problem.data.subset(jax.random.key(0), settings.examples)
    arguments = OBJECTIVE, problem.posterior, rows, problem.next_data, settings
    return text_of(lambda keys: make_start(*arguments, keys[0], None).core)


def finish_of(config):
    finish = _evaluation(OBJECTIVE, fit_settings(config).evaluation, None)
    return text_of(lambda keys: finish(*_evaluated(config, keys))[0].evaluation.llc)


def _evaluated(config, keys):
    family, params, _ = state_of(config, keys)
    problem = problem_of(config)
    draws = fit_settings(config).evaluation.num_draws
    nothing = nothing_seen(problem, keys.size, num_draws=draws, has_slope=True)
    return family, problem, params, keys, problem.data, nothing, 1.0


def planned(config):
    schedule = fit_schedule(config)
    return plan_steps(schedule, fixed_phases(schedule), 0, 4, 9, np.float32)


def schedule_of(config):
    """Return the numbers that the program of the steps reads."""
    return str(planned(config))


def plan_of(config):
    return plan_estimate(config.applied(DIM), problem_of(config), None)


def held_of(config):
    """Return the examples that a pass may take."""
    arguments = tree_loss, PARAMS, DATA, 8.0, 1.0, config, jax.random.key(0)
    return fastvi.api.estimate.assemble(*arguments).problem.data.max_batch


def settings_of(config):
    """What `check_dtype` and `save` read directly."""
    return config.dtype, config.tensorboard


@functools.cache
def evidence(seen, config):
    return seen(config)


REFUSED = "refused"
BASIS = np.eye(DIM, 2)[:, ::-1]
# field: what is given, beside what, and where it is seen under mfa and under flow
FIELDS = {
    "family": ("flow", {}, REFUSED, None),
    "options": ({"stretch": 2.0}, {}, REFUSED, REFUSED),
    "M": (3, {}, family_of, REFUSED),
    "r": (0, {}, family_of, REFUSED),
    "r_per_component": ((1, 0), {}, family_of, REFUSED),
    "means": ("component", {}, family_of, REFUSED),
    "implementation": ("xla", {}, family_of, REFUSED),
    "curvature_rank": (1, {}, start_of, start_of),
    "curvature_examples": (4, {}, start_of, start_of),
    "mixture_cap": (1, {}, schedule_of, REFUSED),
    "prune_threshold": (1e-3, {}, schedule_of, REFUSED),
    "alpha_dirichlet_prior": (2.0, {}, family_of, REFUSED),
    "entropy_bonus": (0.5, {}, family_of, family_of),
    "entropy_bonus_steps": (2, {"entropy_bonus": 0.5}, schedule_of, schedule_of),
    "alpha_temperature": (2.0, {}, family_of, REFUSED),
    "alpha_temperature_frac": (0.5, {"alpha_temperature": 2.0}, schedule_of, REFUSED),
    "steps": (5000, {}, plan_of, plan_of),
    "batch_size": (4, {}, steps_of, steps_of),
    "lr": (0.5, {}, schedule_of, schedule_of),
    "lr_schedule": ("linear_decay", {}, schedule_of, schedule_of),
    "lr_warmup_frac": (0.5, {}, schedule_of, schedule_of),
    "lr_end_fraction": (0.1, {}, schedule_of, schedule_of),
    "clip_global_norm": (2.0, {}, steps_of, steps_of),
    "samples_per_step": (4, {}, steps_of, steps_of),
    "antithetic": (False, {"samples_per_step": 4}, steps_of, steps_of),
    "early_stop": (True, {}, plan_of, plan_of),
    "eval_every": (7, {}, schedule_of, schedule_of),
    "eval_samples": (64, {}, plan_of, plan_of),
    "control_variate": ("none", {"eval_samples": 32}, finish_of, finish_of),
    "trace_probes": (3, {"control_variate": "hvp", "eval_samples": 32}, finish_of, finish_of),
    "method": ("sample", {}, plan_of, plan_of),
    "error": (0.1, {}, plan_of, plan_of),
    "budget": (7.0, {}, plan_of, plan_of),
    "max_batch": (4, {}, held_of, held_of),
    "sampler": ({"walkers": 16}, {}, plan_of, plan_of),
    "whitening_mode": ("rmsprop", {}, start_of, start_of),
    "whitening_decay": (0.5, {"whitening_mode": "adam"}, start_of, start_of),
    "use_whitening": (False, {"whitening_mode": "adam"}, start_of, start_of),
    "dtype": ("float64", {}, settings_of, settings_of),
    "tensorboard": (True, {}, settings_of, settings_of),
    "gamma": (2.0, {}, None, None),  # test_gamma_of_the_configuration
    "backend": ("other", {}, REFUSED, family_of),
    "d_latent": (1, {}, REFUSED, family_of),
    "sigma_perp": (0.5, {}, REFUSED, family_of),
    "learn_sigma_perp": (False, {}, REFUSED, family_of),
    "lift": ("injective", {}, REFUSED, family_of),
    "latent_basis": (BASIS, {}, REFUSED, family_of),
    "flow": ({"depth": 3}, {}, REFUSED, family_of),
}
FLOW_FIELDS = {
    "template": ("maf", {}),
    "depth": (3, {}),
    "hidden": ([4], {}),
    "bins": (8, {}),
    "init_scale": (0.5, {}),
}


class OtherBackend(NativeBackend):
    pass


@pytest.fixture
def nothing_is_fitted(monkeypatch):
    """Let an entry point come as far as the fit, and hand back what it would fit."""

    class Reached(Exception):
        pass

    def reached(*args, **kwargs):
        raise Reached((*args, *kwargs.values()))

    for module in (fastvi.api.estimate, fastvi.api.flat):
        monkeypatch.setattr(module, "run_fit", reached)

    def call(function, **arguments):
        with pytest.raises(Reached) as caught:
            function(**arguments)
        return caught.value.args[0]

    return call


def given(family, *more):
    entries = {"family": family} | BASE[family]
    for one in more:
        entries = entries | one
    return entries


def test_every_field_is_listed():
    assert [*FIELDS] == [field.name for field in dataclasses.fields(VIConfig)]
    assert [*FLOW_FIELDS] == [field.name for field in dataclasses.fields(FlowConfig)]


CELLS = [
    pytest.param(family, name, value, beside, seen, id=f"{family}-{name}")
    for name, (value, beside, *columns) in FIELDS.items()
    for family, seen in zip(BASE, columns, strict=True)
    if seen is not None
]


@pytest.mark.parametrize(("family", "name", "value", "beside", "seen"), CELLS)
def test_every_field_has_an_effect_or_is_refused(family, name, value, beside, seen, monkeypatch):
    monkeypatch.setitem(BACKENDS, "other", OtherBackend)
    if seen is REFUSED:
        with pytest.raises((ConfigError, UnavailableError), match=r"family"):
            fastvi.estimate_llc(
                loss, jnp.zeros(DIM), DATA, progress=False, **given(family, beside, {name: value})
            )
        return
    without = given(family, beside)
    if name != "steps":
        without = {key: entry for key, entry in without.items() if key != name}
    assert evidence(seen, VIConfig.create(without)) != seen(
        VIConfig.create(without, **{name: value})
    )


@pytest.mark.parametrize("name", FLOW_FIELDS)
def test_every_field_of_the_flow_has_an_effect_or_is_refused(name):
    value, _ = FLOW_FIELDS[name]
    config = VIConfig.create(given("flow"))
    if name == "bins":
        with pytest.raises(
            ConfigError, match=r"^flow.bins must be left out with flow.template='realnvp'.*splines"
        ):
            config.replace(flow={"bins": value}).applied(DIM)
        config, value = config.replace(flow={"template": "nsf_ar"}), 5
    assert evidence(family_of, config) != family_of(config.replace(flow={name: value}))


REFUSALS = {
    "trace_probes": ({"trace_probes": 16}, 'without control_variate="hvp"'),
    "whitening_decay": ({"whitening_decay": 0.99}, 'without whitening_mode="rmsprop" or "adam"'),
    "whitening_decay of hvp_diag": (
        {"whitening_decay": 0.9, "whitening_mode": "hvp_diag"},
        "whitening_mode",
    ),
    "entropy_bonus_steps": ({"entropy_bonus_steps": 5}, "without an entropy_bonus above 0"),
    "lr_end_fraction": (
        {"lr_end_fraction": 0.1, "lr_schedule": "none"},
        'lr_schedule="cosine" or "linear_decay"',
    ),
    "alpha_temperature_frac": (
        {"alpha_temperature_frac": 0.5},
        "an alpha_temperature other than 1",
    ),
    "error without walkers": (
        {"method": "variational", "error": 0.02},
        'method="auto" or "sample"',
    ),
    "budget of weights": (
        {"method": "reweight", "budget": 9.0},
        'method="auto" or "sample"',
    ),
    "too few draws": ({"eval_samples": 30, "control_variate": "auto"}, "32 draws or more"),
    "too few draws for hvp": ({"eval_samples": 14, "control_variate": "hvp"}, "16 draws or more"),
    "odd pairs": ({"antithetic": True, "samples_per_step": 3}, "use samples_per_step=4"),
    "mean of a flow": ({"family": "flow", "means": "component"}, "which has one mean"),
    "mean of a subspace": ({"family": "flow", "lift": "injective", "means": "shared"}, "keeps w"),
    "nothing beyond": ({"family": "flow", "sigma_perp": 0.1}, "acts on all d = 3 dimensions"),
    "nothing to learn": (
        {"family": "flow", "learn_sigma_perp": False},
        "acts on all d = 3 dimensions",
    ),
    "equal to the default": ({"flow": {"depth": 4}}, "family='mfa', which does not read it"),
    "null is not given": ({"flow": {"depth": None}, "M": None, "gamma": -1}, "gamma must be"),
    "negative seed": ({"key": -1}, "key must be a seed in"),
    "large seed": ({"key": 2**64}, "key must be a seed in"),
    "gamma twice": (
        {"gamma": 2.0, "localization": 1.0},
        "gamma is given twice and differs: 2.0 in the config",
    ),
}


@pytest.mark.usefixtures("nothing_is_fitted")
@pytest.mark.parametrize(("options", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_has_no_effect_beside_the_others_is_refused(options, words):
    with pytest.raises(ConfigError) as caught:
        fastvi.estimate_llc(loss, jnp.zeros(DIM), DATA, progress=False, **options)
    assert words in str(caught.value)


PLANS = {
    "nothing": (
        {},
        {
            "steps": 200,
            "batch_size": 40,
            "eval_samples": 128,
            "early_stop": False,
            "method": "auto",
        },
    ),
    "the default": ({"steps": 5000}, {"steps": 5000, "batch_size": 40}),
    "another": ({"steps": 5001}, {"steps": 5001}),
    "no walkers": (
        {"method": "variational"},
        {"steps": 5000, "early_stop": True, "error": None, "trace_probes": None},
    ),
    "pairs": ({"antithetic": True}, {"samples_per_step": 2}),
    "stopping": (
        {"early_stop": True},
        {"steps": 5000, "early_stop": True, "error": 0.02},
    ),
    "few draws": ({"eval_samples": 20}, {"control_variate": "none"}),
    "pruning": ({"prune_threshold": 1e-3}, {"prune_threshold": 1e-3, "mixture_cap": None}),
    "a cap": ({"mixture_cap": 3}, {"prune_threshold": 1e-3, "mixture_cap": 3}),
    "ranks": ({"r_per_component": [1, 2, 0]}, {"M": 3}),
    "mixture": ({}, {"M": 8, "r": 2, "backend": None, "flow": FlowConfig()}),
    "flow": (
        {"family": "flow"},
        {"M": None, "backend": "native", "d_latent": "auto", "lift": "core"},
    ),
}


@pytest.mark.parametrize(("options", "expected"), PLANS.values(), ids=PLANS)
def test_the_plan_leaves_nothing_open_and_plans_itself(options, expected):
    config = VIConfig.create(options)
    plan, chains = plan_estimate(config.applied(DIM), problem_of(config), None)
    assert {name: getattr(plan, name) for name in expected} == expected
    again, chains_again = plan_estimate(plan.applied(DIM), problem_of(plan), None)
    assert (again, chains_again) == (plan, chains)
    assert VIConfig.create(plan.to_dict()) == plan


def test_a_smaller_problem_cuts_the_default_rank_alone():
    assert VIConfig().check_against(1, COUNT) is None
    with pytest.raises(ConfigError, match=r"^r must be <= dim=1"):
        VIConfig(r=2).check_against(1, COUNT)


SEEDS_FORM = """
family: mfa
steps: 4
batch_size: 8
eval_samples: 64
gamma: 0.001
whitening_mode: none
whitening_decay: 0.99
clip_global_norm: 5.0
tensorboard: false
M: 2
r: 1
r_per_component: null
lr_schedule: null
prune_threshold: 1e-3
backend: flowjax
d_latent: 2
sigma_perp: 1e-3
flow: {template: maf, depth: 4, hidden: [8, 8], bins: 8, init_scale: 1e-2}
"""


@pytest.mark.parametrize("family", ["mfa", "flow"])
def test_a_file_for_both_families_is_read_for_the_one_it_names(family, nothing_is_fitted):
    entries = yaml.safe_load(SEEDS_FORM) | {"family": family, "backend": "native"}
    _, problem, choice, *_ = nothing_is_fitted(
        fastvi.estimate_llc,
        loss_fn=loss,
        params=jnp.zeros(DIM),
        data=DATA,
        config=entries,
        progress=False,
    )
    assert float(problem.posterior.gamma) == pytest.approx(1e-3)
    settings = choice.settings
    if family == "mfa":
        assert (settings.M, settings.prune_threshold) == (2, 1e-3)
    else:
        assert (settings.d_latent, settings.backend, settings.sigma_perp) == (2, "native", 1e-3)
        assert settings.flow == Architecture(template="maf", depth=4, hidden=(8, 8))
    other: dict = {"lift": "core"} if family == "mfa" else {"alpha_temperature": 2.0}
    with pytest.raises(
        ConfigError, match=r"^(lift|alpha_temperature) must be left out with family"
    ):
        fastvi.estimate_llc(loss, jnp.zeros(DIM), DATA, config=entries, progress=False, **other)


FLAT = {
    "wstar_flat": jnp.zeros(DIM),
    "data": DATA,
    "n_data": COUNT,
    "beta": 0.2,
    "rng_key": 0,
    "objective": OBJECTIVE,
}
RUN = {
    "key": 0,
    "posterior": jnp.zeros(DIM),
    "data": DATA,
    "num_chains": 2,
    "loss_minibatch_flat": loss,
    "grad_loss_minibatch": None,
    "loss_full_flat": lambda w: loss(w, DATA),
    "beta": 0.2,
}


def test_gamma_of_the_configuration(nothing_is_fitted):
    """Where no argument says another: in a mapping, a keyword, and under a trace."""
    for arguments, expected in (
        ({"config": {"gamma": 0.25}}, 0.25),
        ({"gamma": 0.25}, 0.25),
        ({"gamma": 0.25, "localization": 0.25}, 0.25),
        ({}, 1.0),
    ):
        reached = nothing_is_fitted(
            fastvi.estimate_llc,
            loss_fn=loss,
            params=jnp.zeros(DIM),
            data=DATA,
            progress=False,
            **arguments,
        )
        assert float(reached[1].posterior.gamma) == expected
    assert (
        float(nothing_is_fitted(fastvi.fit, vi_cfg={"gamma": 0.5}, **FLAT)[1].posterior.gamma)
        == 0.5
    )
    assert (
        float(nothing_is_fitted(fastvi.run_vi, config={"gamma": 0.5}, **RUN)[1].posterior.gamma)
        == 0.5
    )
    with pytest.raises(ConfigError, match="gamma must be given to run_vi"):
        fastvi.run_vi(config=None, **RUN)
    with pytest.raises(ConfigError, match="gamma is given twice and differs"):
        fastvi.fit(gamma=1.0, vi_cfg={"gamma": 0.5}, **FLAT)


@pytest.mark.usefixtures("nothing_is_fitted")
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"tensorboard": True}, "write_events"),
        ({"early_stop": True}, "estimate_llc"),
        ({"method": "sample"}, "estimate_llc"),
        ({"error": 0.02}, "left out without method"),
        ({"budget": 20_000.0}, "left out without method"),
        ({"d_latent": 2}, "family='mfa'"),
        ({"family": "flow", "M": 8}, "family='flow'"),
    ],
)
def test_flat_entry_points_refuse_what_they_do_not_do(entries, words):
    for call in (
        lambda: fastvi.fit(gamma=1.0, vi_cfg=entries, **FLAT),
        lambda: fastvi.run_vi(gamma=1.0, config=entries, **RUN),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert words in str(caught.value)


def seen_by_estimate(reached):
    """Numbers that name the problem, the keys and the options of a fit."""
    _, problem, _, _, keys, *rest = reached
    posterior = problem.posterior
    return [
        np.asarray(jax.random.key_data(keys)).tolist(),
        float(posterior.nbeta),
        float(posterior.gamma),
        np.asarray(posterior.center).tolist(),
        [np.asarray(leaf).tolist() for leaf in jax.tree_util.tree_leaves(problem.data)],
        [
            None if one is None else (one.report is not None, one.keeper is not None)
            for one in rest
            if hasattr(one, "report")
        ],
    ]


ESTIMATE = {"loss_fn": tree_loss, "params": PARAMS, "data": DATA, "progress": False, "steps": 4}
ESTIMATE_KEYWORDS = {
    "loss_fn": None,  # the checks of its values are tests/test_look.py
    "params": {"a": jnp.ones(2), "b": jnp.zeros(1)},
    "data": (2 * DATA[0],),
    "key": 1,
    "nbeta": 3.0,
    "localization": 2.0,
    "config": {"gamma": 3.0},
    "num_chains": 2,
    "progress": lambda progress: None,
    "throw": None,  # tests/test_bad_input.py: a fit that is not finite
    "param_mask": {"a": True, "b": False},
    "resume_from": "folder",
    "time_limit": None,  # tests/api/test_more.py
    "overrides": None,  # FIELDS above
}


def test_every_keyword_of_estimate_llc(nothing_is_fitted, tmp_path):
    assert [*ESTIMATE_KEYWORDS] == [*inspect.signature(fastvi.estimate_llc).parameters]
    plain = seen_by_estimate(nothing_is_fitted(fastvi.estimate_llc, **ESTIMATE))
    for name, value in ESTIMATE_KEYWORDS.items():
        if value is not None:
            value = tmp_path if name == "resume_from" else value
            reached = nothing_is_fitted(fastvi.estimate_llc, **ESTIMATE | {name: value})
            assert seen_by_estimate(reached) != plain, name


def test_every_keyword_of_the_flat_contracts(nothing_is_fitted):
    whitened = types.SimpleNamespace(A_sqrt=jnp.array([1.0, 2.0, 3.0]))
    changes = {
        "rng_key": 1,
        "wstar_flat": jnp.ones(DIM),
        "data": (2 * DATA[0],),
        "beta": 0.3,
        "gamma": 2.0,
        "vi_cfg": {"gamma": 2.0},
        "whitener": whitened,
    }
    elsewhere = {
        "objective",
        "n_data",
        "loss_full_flat",
    }  # tests/test_bad_input.py, tests/test_fit_contract.py
    assert changes.keys() | elsewhere == inspect.signature(fastvi.fit).parameters.keys()
    plain = nothing_is_fitted(fastvi.fit, **FLAT, gamma=1.0)
    for name, value in changes.items():
        arguments = FLAT | ({} if name == "vi_cfg" else {"gamma": 1.0}) | {name: value}
        reached = nothing_is_fitted(fastvi.fit, **arguments)
        if name == "whitener":
            assert (reached[-1] is not None, plain[-1]) == (True, None)
        else:
            assert seen_by_estimate(reached) != seen_by_estimate(plain), name
    run = {"key": 1, "posterior": jnp.ones(DIM), "beta": 0.3, "gamma": 2.0, "num_chains": 3}
    others = {
        "loss_minibatch_flat",
        "grad_loss_minibatch",
        "loss_full_flat",
        "data",
        "n_data",
        "config",
    }
    assert run.keys() | others == inspect.signature(fastvi.run_vi).parameters.keys()
    plain = seen_by_estimate(nothing_is_fitted(fastvi.run_vi, **RUN, config=None, gamma=1.0))
    for name, value in run.items():
        reached = nothing_is_fitted(
            fastvi.run_vi, **{"config": None, "gamma": 1.0} | RUN | {name: value}
        )
        assert seen_by_estimate(reached) != plain, name


KEYWORDS = {
    fastvi.correct: [
        "result",
        "method",
        "error",
        "budget",
        "sampler",
        "time_limit",  # tests/api/test_more.py
        "progress",
        "throw",
    ],
    fastvi.llc_on: ["result", "data"],
    fastvi.example_losses: ["result", "data"],
    fastvi.restrict: ["loss_fn", "params", "param_mask"],
    fastvi.virial_llc: [
        "samples",
        "gradients",
        "losses",
        "nbeta",
        "localization",
        "center",
        "init_loss",
        "discard",
    ],
}


def test_the_other_functions_take_no_more_than_they_use():
    """Who adds a keyword to one of these adds a test of its effect."""
    for function, names in KEYWORDS.items():
        assert [*inspect.signature(function).parameters] == names, function.__name__
    estimate, curve = (
        inspect.signature(fastvi.estimate_llc).parameters,
        inspect.signature(fastvi.llc_curve).parameters,
    )
    assert curve.keys() - estimate.keys() == {"checkpoints", "warm_start", "warm_steps"}


def test_correct_takes_its_two_settings_alone():
    result = finished(DIM, VIConfig(method="variational").recorded, fitted=object())
    with pytest.raises(TypeError, match="M"):
        fastvi.correct(result, "reweight", M=32)  # pyright: ignore[reportCallIssue]
    for method in ("reweight", "variational"):
        for name in ("error", "budget"):
            with pytest.raises(ConfigError, match=f"^{name} must be left out without method"):
                fastvi.correct(result, method, **{name: 0.02})
    with pytest.raises(ConfigError, match="^method must be one of"):
        fastvi.correct(result, "mcm")
    assert fastvi.correct(result, "variational") is result


def test_warm_steps_equal_to_the_default_are_taken(monkeypatch):
    steps = []

    def run(target, num_chains, **options):
        steps.append((target.config.steps, options["warm"] is not None))
        return finished(DIM, fitted=types.SimpleNamespace(problem=target.problem))

    monkeypatch.setattr(fastvi.api.curve, "run_estimate", run)
    checkpoints = [jnp.zeros(DIM)] * 2
    fastvi.llc_curve(loss, checkpoints, DATA, steps=7, warm_steps=5000, progress=False)
    fastvi.llc_curve(loss, checkpoints, DATA, steps=7, warm_start=False, progress=False)
    assert steps == [(7, False), (5000, True), (7, False), (7, False)]


def test_dotted_names_reach_the_flow():
    assert VIConfig.create(
        **parse_settings(["flow.hidden=[16]", "flow.depth=3"])
    ).flow == FlowConfig(hidden=(16,), depth=3)
    assert VIConfig.create({"flow": {"depth": 2}}, **{"flow.hidden": [4]}).flow == FlowConfig(
        depth=2, hidden=(4,)
    )
    with pytest.raises(ConfigError, match="give flow.depth alone"):
        VIConfig.create({"flow.depth": 2, "flow_depth": 3})
    with pytest.raises(ConfigError, match="did you mean 'flow.hidden'"):
        VIConfig.create({"flow.hiden": [4]})


def test_all_bits_of_a_seed_count():
    def words(seed):
        return np.asarray(jax.random.key_data(as_key(seed))).tolist()

    assert (
        words(3)
        == words(np.int64(3))
        == np.asarray(jax.random.key_data(jax.random.key(3))).tolist()
    )
    assert words(2**32 - 1) == [0, 2**32 - 1]
    assert words(np.uint64(2**32 + 3)) == [1, 3]
    assert words(2**64 - 1) == [2**32 - 1, 2**32 - 1]


def test_a_traced_number_out_of_range_is_nan():
    """Which makes the fit's result NaN and its `result_code` 1, tests/test_bad_input.py."""
    config = VIConfig(gamma=2.0)

    @jax.jit
    def seen(beta, gamma):
        localization = choose_localization(gamma, config)
        return positive_scalar("beta", beta), nonnegative_scalar("gamma", gamma), localization

    for beta, gamma, expected in (
        (-1, 2.0, [np.nan, 2.0, 2.0]),
        (0.0, -0.5, [np.nan, np.nan, np.nan]),
        (np.inf, 0, [np.nan, 0.0, np.nan]),
        (0.25, np.nan, [0.25, np.nan, np.nan]),
    ):
        np.testing.assert_array_equal(seen(beta, gamma), expected)


def test_a_depth_of_no_extractor_is_refused():
    with pytest.raises(ConfigError, match="context_extractor_n_layers needs the network"):
        build_realnvp(jax.random.key(0), 3, 2, 8, 1, context_extractor_n_layers=2)


def test_events_of_run_vi(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from fastvi.results.report.tensorboard import write_events

    names = {
        "lambda_hat_mean": 2.0,
        "lambda_hat_std": 0.5,
        "Eq_Ln_mean": 1.0,
        "Ln_wstar": 0.5,
        "total_fge": 9.0,
    }
    traces = {"elbo": jnp.arange(120.0).reshape(2, 60), "Ln": jnp.full((2, 60), jnp.nan)}
    result = fastvi.SamplerRunResult(traces, {}, names)
    write_events(result, tmp_path)
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("vi/elbo")] == [
        (49, 54.5),
        (59, 84.5),
    ]
    assert events.Scalars("vi/lambda_hat_mean")[0].value == 2.0
    assert "vi/Ln" not in events.Tags()["scalars"]
    with pytest.raises(DataError, match="what estimate_llc or run_vi returned; got dict"):
        write_events({}, tmp_path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="every must be an integer >= 1; got 0"):
        write_events(result, tmp_path, every=0)


def described(cls):
    """Name and description of every field, as the docstring and as the page have them."""
    attributes = inspect.cleandoc(cls.__doc__).split("Attributes:\n")[1]
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", attributes, flags=re.MULTILINE)
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {cls.__name__}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}, dict(rows)


def test_the_page_has_the_settings_of_the_sampler():
    docstring, page = described(SamplerSettings)
    assert [*docstring] == [field.name for field in dataclasses.fields(SamplerSettings)]
    assert docstring == page


def test_entries_of_the_sampler_are_checked():
    config = VIConfig.create({"sampler": {"walkers": 16}}, sampler={"energy_error": "1e-3"})
    assert config.sampler == SamplerSettings(walkers=16, energy_error=1e-3)
    assert VIConfig.create(config.to_dict()) == config
    for entries, words in (
        ({"walker": 16}, "did you mean 'walkers'"),
        ({"walkers": 2.5}, r"^sampler\.walkers must be an integer"),
        ({"start": "q"}, r"^sampler\.start must be "),
        ({"widest": -1}, r"^sampler\.widest must be a finite number > 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            VIConfig(sampler=entries)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="^sampler must be left out without method"):
        VIConfig.create(method="reweight", sampler={"walkers": 16}).check_available()


@dataclasses.dataclass(frozen=True)
class StretchedSettings:
    entropy_bonus: float = 0.0
    stretch: float = 1.0


def test_a_third_family_has_options_of_its_own(monkeypatch):
    monkeypatch.setitem(FAMILIES, "stretched", types.SimpleNamespace(Settings=StretchedSettings))
    config = VIConfig.create(
        {"family": "stretched", "entropy_bonus": 0.5}, options={"stretch": 2.0}
    )
    assert config.family_settings == StretchedSettings(0.5, 2.0)
    assert VIConfig.create(config.to_dict()) == config.replace(lr=0.01)
    assert hash(config) == hash(VIConfig.create(config))
    for options, words in (
        ({"strech": 2.0}, r"^options\.strech must be an entry of family='stretched'.*'stretch'"),
        ({"lr": 2.0}, r"^options\.lr must be an entry .* no field of VIConfig"),
    ):
        with pytest.raises(ConfigError, match=words):
            config.replace(options=options)


@pytest.mark.parametrize("cls", [VIConfig, FlowConfig])
def test_docstring_and_page_say_the_same(cls):
    docstring, page = described(cls)
    assert [*docstring] == [field.name for field in dataclasses.fields(cls)]
    assert docstring == page
    for field in dataclasses.fields(cls):
        default = getattr(cls().filled, field.name)
        if (
            field.default is None
            and isinstance(default, (int, float, str))
            and not isinstance(default, bool)
        ):
            shown = f'"{default}"' if isinstance(default, str) else f"{default:g}"
            assert shown in docstring[field.name], field.name
