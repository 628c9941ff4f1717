"""What a change of the configuration compiles: a table of all its fields."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi import VIConfig
from fastvi._compilation import CompileWatch
from fastvi.api.arguments import make_problem
from fastvi.api.plan import family_choice, fit_settings
from fastvi.fitting.stages import build_family
from fastvi.target.data import hold
from tests.support.stand_ins import begun

DIM, COUNT = 33, 48
DATA = (np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32),)
COMMON = {"M": 2, "r": 1, "curvature_rank": 0, "eval_samples": 8, "progress": False}
BASES = {
    "fit": {"method": "variational", "steps": 60, "early_stop": False, "batch_size": 8},
    "changing": {
        "method": "variational",
        "steps": 60,
        "early_stop": False,
        "batch_size": 8,
        "mixture_cap": 2,
        "alpha_temperature": 2.0,
        "alpha_temperature_frac": 0.5,
        "entropy_bonus": 0.5,
        "entropy_bonus_steps": 20,
    },
    "walk": {"method": "sample", "error": 0.5, "budget": 2000.0 * COUNT},
}
# Fields that a change of compiles nothing: beside what, and the new value.
NOTHING = {
    "alpha_dirichlet_prior": ("fit", 2.0),
    "entropy_bonus": ("fit", 0.5),
    "alpha_temperature": ("fit", 1.5),
    "steps": ("fit", 130),
    "lr": ("fit", 0.02),
    "lr_schedule": ("fit", "linear_decay"),
    "lr_warmup_frac": ("fit", 0.2),
    "lr_end_fraction": ("fit", 0.1),
    "early_stop": ("fit", True),
    "eval_every": ("fit", 7),
    "gamma": ("fit", 2.0),
    "mixture_cap": ("changing", 1),
    "prune_threshold": ("changing", 0.1),
    "alpha_temperature_frac": ("changing", 0.3),
    "entropy_bonus_steps": ("changing", 30),
    "error": ("walk", 0.4),
    "budget": ("walk", 1000.0 * COUNT),
}
# Fields that programs, the shapes of arrays or the family are made of.
PROGRAMS = {
    "family": "flow",
    "M": 3,
    "r": 2,
    "r_per_component": (1, 0),
    "means": "component",
    "curvature_rank": 1,
    "curvature_examples": 16,
    "batch_size": 16,
    "clip_global_norm": 2.0,
    "samples_per_step": 4,
    "antithetic": False,
    "eval_samples": 64,
    "control_variate": "none",
    "max_batch": 4,
    "trace_probes": 3,
    "whitening_mode": "rmsprop",
    "whitening_decay": 0.5,
    "use_whitening": False,
    "dtype": "float64",
}
# Fields that a choice of another entry beside them makes programs of.
BESIDE = {
    "antithetic": {"samples_per_step": 4},
    "control_variate": {"eval_samples": 64},
    "trace_probes": {"control_variate": "hvp", "eval_samples": 64},
    "whitening_decay": {"whitening_mode": "adam"},
    "use_whitening": {"whitening_mode": "adam"},
}
FLOW = {"backend", "d_latent", "sigma_perp", "learn_sigma_perp", "lift", "latent_basis", "flow"}
# The method chooses among programs; snapshots of q for TensorBoard are read by one of their own.
# Options belong to families that are not of the package. An implementation is refused where it
# cannot run, and makes programs of its own where it can: tests/kernels/test_pallas.py.
# The sampler's settings say themselves which of them shape programs; where it starts, like the
# method, chooses among them.
OTHER = {"method", "tensorboard", "sampler", "options", "implementation"}


def loss(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w) ** 2)


def estimate(base, **changes):
    options = COMMON | BASES[base] | changes
    return fastvi.estimate_llc(loss, jnp.zeros(DIM), DATA, throw=False, **options)


def test_every_field_is_in_the_table():
    tables = ({*NOTHING}, {*PROGRAMS}, FLOW, OTHER)
    assert set.union(*tables) == {field.name for field in dataclasses.fields(VIConfig)}
    assert sum(map(len, tables)) == len(set.union(*tables))


@pytest.mark.parametrize("base", BASES)
def test_tolerances_budgets_and_lengths_compile_nothing(base):
    estimate(base)
    estimate(base, key=1)  # what only a second call compiles
    compiled = {}
    for field, (beside, value) in NOTHING.items():
        if beside == base:
            with CompileWatch() as watch:
                estimate(base, **{field: value})
            compiled[field] = watch.programs
    assert compiled == dict.fromkeys(compiled, 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("field", PROGRAMS)
def test_the_others_are_what_programs_are_made_of(field):
    beside = COMMON | BASES["fit"] | BESIDE.get(field, {})
    beside.pop("progress")
    changed = {name: value for name, value in beside.items() if name not in ("M", "r")}
    changed = changed if field in ("family", "r_per_component") else beside
    configs = VIConfig.create(beside), VIConfig.create(changed | {field: PROGRAMS[field]})
    assert made_of(configs[0]) != made_of(configs[1])


def made_of(config):
    """Return the keys of the programs: settings, the structure of the family, shapes."""
    center = jnp.zeros(DIM, config.dtype)
    settings = fit_settings(config)
    problem = make_problem(center, hold(DATA, config.max_batch), 12.0, 1.0, config, "nbeta")
    start = begun(jnp.ones(DIM, config.dtype), jnp.zeros((0, DIM), config.dtype), 0)
    family = build_family(family_choice(config), settings.start, start, 0)
    params = jax.eval_shape(
        lambda key: family.init(key, jnp.zeros((0, DIM), config.dtype), center), jax.random.key(0)
    )
    structures = jax.tree_util.tree_structure((family, problem, params))
    leaves = jax.tree_util.tree_leaves(params)
    return settings, str(structures), [(leaf.shape, leaf.dtype) for leaf in leaves]
