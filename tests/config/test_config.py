import json
import pickle
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fastvi._errors import ConfigError, UnavailableError
from fastvi.config import FlowConfig, VIConfig

BACKEND_YAML = """
name: vi
vi:
  algo: flow
  M: 4
  r: 3
  steps: 200
  batch_size: 64
  lr: 0.02
  eval_every: 10
  eval_samples: 32
  dtype: float64
  whitening_mode: none
  whitening_decay: 0.9
  clip_global_norm: null
  alpha_temperature: 1.5
  tensorboard: false
  r_per_component: null
  alpha_dirichlet_prior: null
  lr_schedule: null
  lr_warmup_frac: 0.1
  entropy_bonus: 0.0
  d_latent: 5
  sigma_perp: 1e-3
  flow_depth: 6
  flow_hidden: [32, 16]
  flow_type: nsf_ar
"""
BACKEND_CONFIG = VIConfig(
    family="flow",
    M=4,
    r=3,
    steps=200,
    batch_size=64,
    lr=0.02,
    eval_every=10,
    eval_samples=32,
    dtype="float64",
    whitening_decay=0.9,
    clip_global_norm=None,
    alpha_temperature=1.5,
    lr_schedule="none",
    lr_warmup_frac=0.1,
    d_latent=5,
    sigma_perp=1e-3,
    flow=FlowConfig(template="nsf_ar", depth=6, hidden=(32, 16)),
)

MIXTURE_YAML = """
vi:
  M: 16
  r: 2
  steps: 10000
  batch_size: 512
  lr: 0.005
  eval_every: 50
  gamma: 0.001
  eval_samples: 128
  dtype: float32
  use_whitening: true
  r_per_component: [4, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
  mixture_cap: 16
  prune_threshold: 1e-3
  alpha_dirichlet_prior: 1.1
  clip_global_norm: 5.0
  lr_schedule: cosine
  lr_warmup_frac: 0.05
  entropy_bonus: 0.0
  alpha_temperature: 1.0
  whitening_mode: rmsprop
  whitening_decay: 0.99
"""

FAMILIES_YAML = """
name: vi
vi:
  family: mfa
  steps: 5000
  batch_size: 256
  gamma: 0.001
  lr_schedule: null
  prune_threshold: 1e-3
  backend: flowjax
  d_latent: 8
  sigma_perp: 1e-3
  flow: {template: maf, depth: 4, hidden: [128, 128], bins: 8, init_scale: 1e-2}
"""
FAMILIES_CONFIG = VIConfig(
    steps=5000,
    prune_threshold=1e-3,
    batch_size=256,
    gamma=0.001,
    lr_schedule="none",
    backend="flowjax",
    d_latent=8,
    sigma_perp=1e-3,
    flow=FlowConfig(template="maf", depth=4, hidden=(128, 128), bins=8, init_scale=1e-2),
)


@dataclass
class OtherConfig:
    algo: str = "mfa"
    steps: int = 7
    lr_schedule: str | None = None
    flow_hidden: list[int] = field(default_factory=lambda: [3, 5])


OTHER = VIConfig(steps=7, lr_schedule="none", flow=FlowConfig(hidden=(3, 5)))


def sources_of_backend_config(tmp_path):
    path = tmp_path / "vi.yaml"
    path.write_text(BACKEND_YAML)
    parsed = yaml.safe_load(BACKEND_YAML)
    return {
        "config": BACKEND_CONFIG,
        "file": parsed,
        "vi alone": {"vi": parsed["vi"]},
        "entries": parsed["vi"],
        "namespace": SimpleNamespace(**parsed["vi"]),
        "omegaconf file": OmegaConf.create(BACKEND_YAML),
        "omegaconf entry": OmegaConf.create(BACKEND_YAML).vi,
        "omegaconf in dict": {"vi": OmegaConf.create(BACKEND_YAML).vi},
        "dict of omegaconf leaves": dict(OmegaConf.create(BACKEND_YAML).vi.items()),
        "path": path,
        "path string": str(path),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "config",
        "file",
        "vi alone",
        "entries",
        "namespace",
        "omegaconf file",
        "omegaconf entry",
        "omegaconf in dict",
        "dict of omegaconf leaves",
        "path",
        "path string",
    ],
)
def test_every_source_gives_the_same_config(kind, tmp_path):
    assert VIConfig.create(sources_of_backend_config(tmp_path)[kind]) == BACKEND_CONFIG


@pytest.mark.parametrize(
    "source", [None, {}, {"vi": {}}, {"vi": None, "name": "vi"}, OmegaConf.create({})]
)
def test_empty_sources_give_the_defaults(source):
    assert VIConfig.create(source) == VIConfig()


@pytest.mark.parametrize("beside", [{"name": "vi"}, {}])
def test_overrides_of_a_sampler_entry_are_unwrapped(beside):
    source = {**beside, "overrides": {"M": 3, "algo": "flow", "flow_depth": 2, "gamma": 1e-3}}
    expected = VIConfig(M=3, family="flow", flow=FlowConfig(depth=2), gamma=1e-3)
    assert VIConfig.create(source) == expected
    assert VIConfig.create(OmegaConf.create(source)) == expected
    assert VIConfig.create({**beside, "overrides": None}) == VIConfig()


def test_empty_yaml_file_gives_the_defaults(tmp_path):
    (tmp_path / "vi.yaml").write_text("")
    assert VIConfig.create(tmp_path / "vi.yaml") == VIConfig()


def test_dataclass_sources():
    assert VIConfig.create(OtherConfig()) == OTHER
    assert VIConfig.create(OmegaConf.structured(OtherConfig())) == OTHER
    assert VIConfig.create(flow=FlowConfig(depth=2)).flow == FlowConfig(depth=2)


def test_mixture_example():
    config = VIConfig.create(OmegaConf.create(MIXTURE_YAML))
    assert config == VIConfig.create(yaml.safe_load(MIXTURE_YAML))
    assert config.ranks == (4, 2, 2) + (1,) * 13
    assert (config.rank, config.whitening, config.gamma, config.prune_threshold) == (
        4,
        "rmsprop",
        1e-3,
        1e-3,
    )


def test_families_example():
    assert VIConfig.create(yaml.safe_load(FAMILIES_YAML)) == FAMILIES_CONFIG
    assert VIConfig.create(OmegaConf.create(FAMILIES_YAML)) == FAMILIES_CONFIG


def test_interpolations_resolve_against_the_whole_tree():
    tree = OmegaConf.create(
        {"widths": [9, 9], "rate": 0.3, "vi": {"lr": "${rate}", "flow_hidden": "${widths}"}}
    )
    config = VIConfig.create(tree.vi)
    assert (config.lr, config.flow.hidden) == (0.3, (9, 9))


@pytest.mark.parametrize("entry", ["???", "${nowhere}"])
def test_unresolved_omegaconf_entries_are_refused(entry):
    with pytest.raises(ConfigError, match="steps|nowhere"):
        VIConfig.create(OmegaConf.create({"steps": entry}))


def test_overrides_replace_what_the_source_says():
    config = VIConfig.create(
        {"algo": "mfa", "steps": 3, "flow": {"depth": 6, "bins": 3}}, algo="flow", flow_depth=2
    )
    assert config == VIConfig(family="flow", steps=3, flow=FlowConfig(depth=2, bins=3))
    assert config.replace(steps=4, flow={"bins": 4}) == VIConfig(
        family="flow", steps=4, flow=FlowConfig(depth=2, bins=4)
    )


def test_aliases_may_agree_with_the_names_they_stand_for():
    given_twice = {
        "algo": "flow",
        "family": "flow",
        "flow_hidden": [2, 3],
        "flow": {"hidden": (2, 3)},
    }
    assert VIConfig.create(given_twice) == VIConfig(family="flow", flow=FlowConfig(hidden=(2, 3)))


def test_numpy_values_become_python_values():
    config = VIConfig.create(
        M=np.int64(2),
        lr=np.float64(0.5),
        antithetic=np.bool_(False),
        r_per_component=np.array([1, 3]),
    )
    assert config == VIConfig(M=2, lr=0.5, antithetic=False, r_per_component=(1, 3))
    assert [type(x) for x in (config.M, config.lr, config.antithetic, config.ranks[0])] == [
        int,
        float,
        bool,
        int,
    ]


def test_integers_and_numeric_strings_become_floats():
    config = VIConfig.create(lr="1e-3", gamma=2)
    assert (config.lr, config.gamma, type(config.gamma)) == (0.001, 2.0, float)


@pytest.mark.parametrize(
    "config",
    [VIConfig(), BACKEND_CONFIG, FAMILIES_CONFIG, VIConfig.create(yaml.safe_load(MIXTURE_YAML))],
)
def test_round_trips(config, tmp_path):
    config.to_yaml(tmp_path / "vi.yaml")
    assert VIConfig.create(tmp_path / "vi.yaml") == config
    assert VIConfig.create(json.loads(json.dumps(config.to_dict()))) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert VIConfig.create(OmegaConf.create(config.to_dict())) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_configs_hash_by_value():
    same = VIConfig.create(M=2, r_per_component=[1, 2], flow={"hidden": [4]})
    other = VIConfig(M=2, r_per_component=(1, 2), flow=FlowConfig(hidden=(4,)))
    assert hash(same) == hash(other)
    assert {same: "found"}[other] == "found"
    with pytest.raises(AttributeError):
        same.M = 3  # pyright: ignore[reportAttributeAccessIssue]


positive = st.floats(1e-300, 1e300)
natural = st.integers(1, 10**6)


@st.composite
def configs(draw):
    components = draw(st.integers(1, 6))
    ranks = st.lists(st.integers(0, 9), min_size=components, max_size=components)
    flow = {
        "depth": draw(natural),
        "hidden": draw(st.lists(natural, min_size=1)),
        "init_scale": draw(positive),
    }
    return VIConfig.create(
        family=draw(st.sampled_from(["mfa", "flow"])),
        d_latent=draw(st.just("auto") | natural),
        latent_basis=draw(
            st.sampled_from(["curvature", "random", [[1.0, 0.0], [0.5, 1e-3], [0.0, 2.0]]])
        ),
        M=components,
        r_per_component=draw(st.none() | ranks),
        curvature_rank=draw(st.just("auto") | natural),
        batch_size=draw(st.none() | natural),
        lr=draw(positive),
        lr_schedule=draw(st.sampled_from([None, "none", "cosine", "linear_decay"])),
        lr_warmup_frac=draw(st.floats(0, 1, exclude_max=True)),
        clip_global_norm=draw(st.none() | positive),
        early_stop=draw(st.none() | st.booleans()),
        gamma=draw(st.none() | st.floats(0, 1e300)),
        flow=flow,
    )


@settings(deadline=None, derandomize=True)
@given(configs())
def test_any_config_survives_dict_and_yaml(config):
    assert VIConfig.create(config.to_dict()) == config
    assert VIConfig.create(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert hash(config.replace()) == hash(config)


BAD = [
    ({"lr_scheduel": "cosine"}, "lr_scheduel", "did you mean 'lr_schedule'"),
    ({"m": 4}, "m", "did you mean 'M'"),
    ({"flow_bins": 4}, "flow_bins", "did you mean 'flow.bins'"),
    ({"depth": 4}, "depth", "did you mean 'flow.depth'"),
    ({"zzzz": 1}, "zzzz", "remove it"),
    ({"flow": {"dept": 2}}, "flow.dept", "did you mean 'depth'"),
    ({"flow": 4}, "flow", "{'depth': 4}"),
    ({"flow": None}, "flow", "{'depth': 4}"),
    ({"flow_depth": 0}, "flow.depth", "use 1 or more"),
    ({"flow_type": "real_nvp"}, "flow.template", "did you mean 'realnvp'"),
    ({"flow_hidden": []}, "flow.hidden", "use a list"),
    ({"flow_hidden": [64, 64.0]}, "flow.hidden[1]", "use 64"),
    ({"flow": {"bins": 1}}, "flow.bins", "use 2 or more"),
    ({"algo": "mfa", "family": "flow"}, "algo", "give family alone"),
    ({"flow_depth": 2, "flow": {"depth": 3}}, "flow_depth", "give flow.depth alone"),
    ({"family": "MFA"}, "family", "did you mean 'mfa'"),
    ({"M": 0}, "M", "use 1 or more"),
    ({"M": True}, "M", "for example 8"),
    ({"r": -1}, "r", "use 0 or more"),
    ({"steps": 5.0}, "steps", "use 5"),
    ({"steps": "5e3"}, "steps", "use 5000"),
    ({"steps": np.float32(3)}, "steps", "use 3"),
    ({"steps": "0"}, "steps", "for example 5000"),
    ({"steps": 2.5}, "steps", "for example 5000"),
    ({"steps": float("inf")}, "steps", "for example 5000"),
    ({"M": 2, "r_per_component": [1, 2, 3]}, "r_per_component", "use M=3"),
    ({"r_per_component": 4}, "r_per_component", "use a list"),
    ({"r_per_component": "[4, 2]"}, "r_per_component", "use a list"),
    ({"M": 2, "r_per_component": [1, -1]}, "r_per_component[1]", "use 0 or more"),
    ({"means": "centre"}, "means", "did you mean 'center'"),
    ({"curvature_rank": "Auto"}, "curvature_rank", "for example 'auto'"),
    ({"curvature_rank": -1}, "curvature_rank", "use 0 or more"),
    ({"mixture_cap": 0}, "mixture_cap", "null"),
    ({"prune_threshold": 1.0}, "prune_threshold", "for example 0.001"),
    ({"alpha_dirichlet_prior": 0}, "alpha_dirichlet_prior", "null"),
    ({"entropy_bonus": -0.1}, "entropy_bonus", "for example 0.0"),
    ({"alpha_temperature": 0.49}, "alpha_temperature", ">= 0.5"),
    ({"batch_size": 0}, "batch_size", "null"),
    ({"lr": 0.0}, "lr", "for example 0.01"),
    ({"lr": "fast"}, "lr", "for example 0.01"),
    ({"lr": float("nan")}, "lr", "for example 0.01"),
    ({"lr": "inf"}, "lr", "for example 0.01"),
    ({"lr": 10**400}, "lr", "for example 0.01"),
    ({"lr": True}, "lr", "for example 0.01"),
    ({"lr": None}, "lr", "for example 0.01"),
    ({"lr_schedule": "cosin"}, "lr_schedule", "did you mean 'cosine'"),
    ({"lr_schedule": "None"}, "lr_schedule", "did you mean 'none'"),
    ({"lr_warmup_frac": 1}, "lr_warmup_frac", "in [0, 1)"),
    ({"clip_global_norm": 0}, "clip_global_norm", "for example 5.0"),
    ({"samples_per_step": 0}, "samples_per_step", "null"),
    ({"antithetic": 1}, "antithetic", "for example True"),
    ({"early_stop": "yes"}, "early_stop", "null"),
    ({"eval_samples": 3}, "eval_samples", "use 4 or more"),
    ({"control_variate": "hpv"}, "control_variate", "did you mean 'hvp'"),
    ({"trace_probes": 0}, "trace_probes", "use 1 or more"),
    ({"whitening_mode": None}, "whitening_mode", "did you mean 'none'"),
    ({"whitening_mode": False}, "whitening_mode", "did you mean 'none'"),
    ({"whitening_decay": 1.0}, "whitening_decay", "for example 0.99"),
    ({"dtype": "float16"}, "dtype", "did you mean 'float"),
    ({"tensorboard": "false"}, "tensorboard", "for example False"),
    ({"gamma": -1.0}, "gamma", "null"),
    ({"backend": "flow_jax"}, "backend", "did you mean 'flowjax'"),
    ({"sigma_perp": 0}, "sigma_perp", "for example None"),
    ({"options": ((1, 2, 3),)}, "options", "give names with values"),
    ({"options": (([], 2),)}, "options", "give names with values"),
    ({"sampler": ((1, 2, 3),)}, "sampler", "give names with values"),
]


@pytest.mark.parametrize(("values", "name", "fix"), BAD, ids=[str(values) for values, _, _ in BAD])
def test_bad_values_name_the_field_and_the_fix(values, name, fix):
    with pytest.raises(ConfigError) as caught:
        VIConfig.create(values)
    problem, likely_fix = str(caught.value).split("; got ", 1)
    assert problem.startswith(f"{name} must be ")
    assert fix in likely_fix or fix in problem


def test_keywords_are_checked_like_sources():
    with pytest.raises(ConfigError, match="did you mean 'lr_schedule'"):
        VIConfig(lr_scheduel="cosine")  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match="did you mean 'family'"):
        VIConfig(algo="mfa")  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match="flow.depth.*use 1 or more"):
        FlowConfig(depth=0)
    assert VIConfig(lr_schedule=None).lr_schedule == "none"  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        (3, "give names with values, or a path"),
        (["M", 3], "give names with values, or a path"),
        (VIConfig, "give names with values, or a path"),
        ({"name": "sgld", "vi": {}}, "give the vi entry by itself"),
        ({"M": 3, "vi": {}}, "give the vi entry by itself"),
        ({"vi": 3}, "give names with values"),
        ({"name": "sgld", "overrides": {}}, "give the overrides entry by itself"),
        ({"vi": {}, "overrides": {}}, "give the vi entry by itself"),
        ({"overrides": 3}, "give names with values"),
        ({1: 2}, "remove it"),
        ("no/such/file.yaml", "check the path"),
        ("M: 3\nr: 2", "check the path"),
    ],
    ids=str,
)
def test_sources_that_cannot_be_read(source, fix):
    with pytest.raises(ConfigError, match=fix):
        VIConfig.create(source)


@pytest.mark.parametrize(
    ("text", "fix"), [("M: [1", "check the path and the file"), ("- 1", "give names")]
)
def test_yaml_files_that_cannot_be_read(text, fix, tmp_path):
    (tmp_path / "vi.yaml").write_text(text)
    with pytest.raises(ConfigError, match=fix):
        VIConfig.create(tmp_path / "vi.yaml")


def test_yaml_without_pyyaml_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r'pip install "fastvi\[cli\]"'):
        VIConfig().to_yaml(tmp_path / "vi.yaml")


def test_ranks_and_whitening():
    assert (VIConfig(M=3, r=4).ranks, VIConfig(M=3, r=4).rank) == ((4, 4, 4), 4)
    per_component = VIConfig(M=3, r=4, r_per_component=(1, 0, 2))
    assert (per_component.ranks, per_component.rank) == ((1, 0, 2), 2)
    assert VIConfig(whitening_mode="adam").whitening == "adam"
    assert VIConfig(whitening_mode="adam", use_whitening=False).whitening == "none"


@pytest.mark.parametrize(
    ("values", "name", "fix"),
    [
        ({"r": 11}, "r", "use 10 or less"),
        ({"M": 2, "r_per_component": [11, 0]}, "r_per_component", "use 10 or less"),
        ({"curvature_rank": 11}, "curvature_rank", "use 10 or less"),
        ({"family": "flow", "d_latent": 11}, "d_latent", "use 10 or less"),
        ({"batch_size": 21}, "batch_size", "use 20 or less"),
    ],
)
def test_values_the_problem_rules_out(values, name, fix):
    with pytest.raises(ConfigError, match=f"^{name} must be .*{fix}"):
        VIConfig.create(values).check_against(dim=10, n_data=20)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"r": 10, "curvature_rank": 10, "batch_size": 20},
        {"family": "flow", "d_latent": 10},
        {"family": "mfa", "d_latent": 11},
        {"r": 11, "M": 1, "r_per_component": [10]},
    ],
)
def test_values_the_problem_allows(values):
    config = VIConfig.create(values)
    config.check_against(dim=10, n_data=20)
    assert VIConfig.create(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "flow", "mixture_cap": 4}, "no components to prune"),
        ({"family": "flow", "prune_threshold": 0.01}, "use family='mfa'"),
    ],
)
def test_features_not_in_this_release_are_refused_on_request(values, message):
    config = VIConfig.create(values)
    with pytest.raises(UnavailableError, match=message):
        config.check_available()


@pytest.mark.parametrize(
    ("values", "prunes"),
    [
        ({}, False),
        ({"prune_threshold": "1e-3"}, True),
        ({"prune_threshold": None}, False),
        ({"prune_threshold": 0.01}, True),
        ({"mixture_cap": 4}, True),
        ({"mixture_cap": 4, "prune_threshold": None}, True),
    ],
)
def test_pruning_is_on_when_asked_for(values, prunes):
    assert VIConfig.create(values).prunes is prunes


def test_unavailable_is_both_kinds_of_error():
    assert issubclass(UnavailableError, NotImplementedError)
    assert issubclass(UnavailableError, ValueError)
