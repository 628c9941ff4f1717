"""The documents say what the package does.

Examples run, tables are complete, links lead somewhere.
"""

import dataclasses
import doctest
import inspect
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import fastvi
from fastvi import FlowConfig, VIConfig
from fastvi.api import estimate as api
from fastvi.cli.sweep_plan import read_plan
from fastvi.families import BACKENDS
from fastvi.results import findings as health
from tests.support.markdown import python_blocks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


NESTED = {"flow": "FlowConfig()", "sampler": "SamplerSettings()"}


def config_rows(heading):
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", section, flags=re.MULTILINE))


@pytest.mark.parametrize("cls", [VIConfig, FlowConfig], ids=lambda cls: cls.__name__)
def test_configuration_page_lists_every_field_with_its_default(cls):
    expected = {
        field.name: NESTED.get(field.name) or repr(field.default)
        for field in dataclasses.fields(cls)
    }
    assert config_rows(cls.__name__) == expected


SMALL = {"M": 1, "r": 0}


@pytest.fixture
def short_fits(monkeypatch):
    """Cut fits short, without a walk.

    An example shows how to call, the numbers have tests of their own.

    A flow is a small one, which compiles in half the time, and a mixture has one component without
    factors, which takes two thirds.
    """
    create = VIConfig.create.__func__

    def short(cls, source=None, /, **overrides):
        config = create(cls, source, **overrides)
        method = config.method or "variational"
        short = {"steps": min(config.filled.steps, 20), "eval_samples": 4, "method": method}
        if method == "variational":  # which refuses what bounds a walk
            short |= {"error": None, "budget": None}
        if config.family == "flow":
            short["flow"] = dataclasses.replace(config.flow, depth=2, hidden=(8,))
        else:
            short |= SMALL
        return dataclasses.replace(config, **short)

    monkeypatch.setattr(VIConfig, "create", classmethod(short))


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/first-estimate.md",
        "docs/loss.md",
        "docs/is-my-number-right.md",
        "docs/adapters.md",
    ],
)
def test_examples_run(name, short_fits, capsys):
    namespace = {}
    for block in python_blocks(ROOT / name):
        exec(compile(block.replace("length=50_000", "length=50"), name, "exec"), namespace)
    assert capsys.readouterr().out
    if "one" in namespace:
        assert jax.numpy.isfinite(namespace["one"]["lambda_hat"])


def test_examples_of_checkpoints_run(capsys, tmp_path, monkeypatch):
    """With the losses alone of the curve: one over a folder is tested beside the other readers."""

    def losses_of(loss_fn, checkpoints, data, **options):
        losses = [float(loss_fn(params, data)) for params in checkpoints]
        return SimpleNamespace(init_loss=losses, llc=[math.nan] * len(losses))

    monkeypatch.setattr(fastvi, "llc_curve", losses_of)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in python_blocks(DOCS / "checkpoints.md"):
        exec(compile(block, "checkpoints.md", "exec"), namespace)
    printed = re.findall(r"^step (\d+): loss", capsys.readouterr().out, re.M)
    assert printed == ["0", "200", "400"]
    losses = namespace["curve"].init_loss
    assert losses == sorted(losses, reverse=True)
    data = namespace["inputs"], namespace["targets"]
    np.testing.assert_array_equal(namespace["trained"]["w"], namespace["checkpoints"][2]["w"])
    assert losses[2] == float(namespace["loss_fn"](namespace["trained"], data))


def test_examples_of_language_models_run(capsys):
    """On a model of a few thousand parameters that has hardly been trained."""
    blocks = python_blocks(DOCS / "language-models.md")
    for whole, small in (
        (
            "CONTEXT, WIDTH, HEADS, STEPS = 32, 32, 4, 600",
            "CONTEXT, WIDTH, HEADS, STEPS = 8, 8, 2, 9",
        ),
        ("[make_block(keys[2]), make_block(keys[3])]", "[make_block(keys[2])]"),
    ):
        assert whole in blocks[0]
        blocks[0] = blocks[0].replace(whole, small)
    # what has hardly been trained has an llc near zero, to which no relative error can be had
    blocks = [one.replace("localization=300.0", "localization=300.0, budget=3e3") for one in blocks]
    namespace = {}
    for block in blocks:
        exec(compile(block, "language-models.md", "exec"), namespace)
    results = [namespace[name] for name in ("result", "streamed", "part", "one")]
    assert not any(result.has_fit for result in results)
    assert namespace["part"].dim == 3 * 8**2
    out = capsys.readouterr().out
    assert "Langevin dynamics from the localizer" in out
    assert "checkpoint 3: loss" in out
    # the same posterior by arrays and by a generator
    llcs, errors = zip(*((result.llc, result.llc_sem) for result in results[:2]), strict=True)
    assert abs(llcs[0] - llcs[1]) < 4 * math.hypot(*errors)


def test_examples_of_the_flow_family_run(short_fits, capsys):
    namespace = {}
    try:
        for block in python_blocks(DOCS / "vi_flow.md"):
            exec(compile(block, "vi_flow.md", "exec"), namespace)
    finally:
        BACKENDS.pop("stretch", None)
    assert jax.numpy.isfinite(namespace["result"].llc)
    assert capsys.readouterr().out.endswith("stretch\n")


def test_examples_of_draws_and_influence_run(capsys):
    of_influence, of_draws = (
        python_blocks(DOCS / name) for name in ("influence.md", "posterior-draws.md")
    )
    # one run of many draws has a known answer, the others show how to call
    for blocks, which in ((of_influence, 2), (of_draws, 0)):
        assert "    200,\n" in blocks[which]
        blocks[which] = blocks[which].replace("    200,\n", "    24,\n")
    # both pages begin with the same estimate
    estimate = "result = fastvi.estimate_llc(loss_fn, params, data, progress=False)\n"
    before, after = of_draws[0].split(estimate)
    assert of_influence[0].startswith(before + estimate)
    of_draws[0] = after
    namespace = {}
    for block in of_influence:
        exec(compile(block, "influence.md", "exec"), namespace)
    assert namespace["influence"].value.shape == (300, 300)
    # by chance it would be one of the twelve in two
    assert len(namespace["found"]) >= 4
    for block in of_draws:
        exec(compile(block, "posterior-draws.md", "exec"), namespace)
    assert "slopes of llc" in capsys.readouterr().out


def test_example_of_sgld_runs(short_fits, capsys):
    (block,) = python_blocks(DOCS / "coming-from-sgld.md")
    exec(compile(block, "coming-from-sgld.md", "exec"), {})
    assert "diverges above" in capsys.readouterr().out


def test_examples_of_data_run(short_fits, capsys):
    namespace = {}
    for block in python_blocks(DOCS / "data.md"):
        exec(compile(block, "data.md", "exec"), namespace)
    assert "of 500 rows" in capsys.readouterr().out


def test_examples_of_parts_run(capsys):
    namespace = {}
    for block in python_blocks(DOCS / "parts.md"):
        exec(compile(block, "parts.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert "blocks/1/qkv  (8, 24)                 96  [:, 0:4+8:12+16:20]" in out
    assert list(namespace["found"]) == ["layer 0", "layer 1", "layer 2"]


def test_examples_of_profiles_and_comparisons_run(capsys):
    """Pages of one loss, whose programs are compiled once."""
    namespace = {}
    for name in ("choosing-nbeta-and-gamma.md", "profile.md"):
        for block in python_blocks(DOCS / name):
            exec(compile(block, name, "exec"), namespace)
    assert "localization" in capsys.readouterr().out
    profile, found = namespace["profile"], namespace["compared"].between("early", "late")
    assert profile.llc.shape == (3, 3)
    # llc falls with localization, by far more than the errors at the smallest n beta
    assert profile.llc[0, 0] > profile.llc[0, 2] + 4.5 * profile.llc_sem[0, 0]
    assert found.value > 0
    assert found.paired


def test_examples_of_diagnostics_run(short_fits, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in python_blocks(DOCS / "diagnostics.md"):
        exec(compile(block, "diagnostics.md", "exec"), namespace)
    assert "[" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "panels.png").is_file()
    assert list((tmp_path / "runs" / "live").glob("events*"))


def test_examples_of_draws_run(short_fits, capsys):
    namespace = {}
    for block in python_blocks(DOCS / "families.md"):
        exec(compile(block, "families.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert out.startswith("(1000, 2, 2) (1000, 5) True\n")
    # log Z of the quadratic, and a bound on it
    result = namespace["result"]
    log_z = 2.5 * math.log(2 * math.pi / (result.nbeta + result.localization))
    assert float(out.split("log Z ")[1].split()[0]) == pytest.approx(log_z, abs=0.05)


@pytest.mark.parametrize(
    ("page", "block"),
    [
        (name, block)
        for name in ("configuration.md", "vi_flow.md")
        for block in re.findall(
            r"^```yaml\n(.*?)^```", (DOCS / name).read_text("utf-8"), re.S | re.M
        )
    ],
)
def test_examples_of_configurations_are_read(page, block, tmp_path):
    (tmp_path / "vi.yaml").write_text(block)
    config = VIConfig.create(tmp_path / "vi.yaml")
    assert config.family == ("flow" if "flow" in block else "mfa")
    assert config != VIConfig()


def test_examples_of_notebooks_run(capsys):
    namespace = {}
    for block in python_blocks(DOCS / "notebooks.md"):
        exec(compile(block, "notebooks.md", "exec"), namespace)
    quick, further = capsys.readouterr().out.splitlines()
    assert quick.endswith("its time_limit of 5 s") or quick.endswith("None")
    assert further.endswith("True")


def test_examples_of_kernels_run(capsys):
    for block in python_blocks(DOCS / "kernels.md"):
        exec(compile(block, "kernels.md", "exec"), {})
    assert "woodbury" in capsys.readouterr().out


def test_every_page_with_examples_is_run():
    assert {page.name for page in PAGES if python_blocks(page)} == {
        "README.md",
        "first-estimate.md",
        "loss.md",
        "is-my-number-right.md",
        "choosing-nbeta-and-gamma.md",
        "flows.md",
        "vi_flow.md",
        "diagnostics.md",
        "families.md",
        "adapters.md",
        "data.md",
        "checkpoints.md",
        "parts.md",
        "posterior-draws.md",
        "influence.md",
        "coming-from-sgld.md",
        "profile.md",
        "language-models.md",
        "llc-over-training.md",
        "kernels.md",
        "notebooks.md",
        # in tests/integrations/test_torch_estimates.py
        "torch.md",
        "coming-from-devinterp.md",
        "devices.md",  # in tests/support/meshes.py and processes.py
    }


@pytest.mark.parametrize(
    "block",
    re.findall(r"^```yaml\n(.*?)^```", (DOCS / "sweeps.md").read_text("utf-8"), re.S | re.M),
)
def test_examples_of_sweeps_are_plans(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for step in (9, 10, 100):
        (tmp_path / "run" / f"step_{step}.npz").touch()
    (tmp_path / "sweep.yaml").write_text(block)
    cells = read_plan(tmp_path / "sweep.yaml").cells
    assert len({cell.name for cell in cells}) == len(cells) >= 3


def test_examples_of_flows_run(capsys):
    namespace = {}
    for block in python_blocks(DOCS / "flows.md"):
        exec(compile(block, "flows.md", "exec"), namespace)
    assert "nats per example" in capsys.readouterr().out


def test_example_of_a_curve_runs(short_fits, capsys):
    (block,) = python_blocks(DOCS / "llc-over-training.md")
    exec(compile(block, "llc-over-training.md", "exec"), {})
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["checkpoint", "loss", "llc", "FGE", "findings"]
    assert len(lines) == 3 + 2  # checkpoints and differences


def test_example_of_estimate_llc_gives_the_number_it_shows():
    tests = doctest.DocTestFinder(recurse=False).find(api.estimate_llc, "estimate_llc", module=api)
    assert sum(len(test.examples) for test in tests) > 0
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_diagnostics_page_names_every_finding_and_trace():
    text = (DOCS / "diagnostics.md").read_text(encoding="utf-8")
    names = re.findall(r'Finding\(\s*(?:"\w+"[^,]*),\s*"(\w+)"', inspect.getsource(health))
    assert len(names) >= 7
    objective = fastvi.make_flat_objective(lambda w, batch: 0.5 * w @ w)
    data = (jax.numpy.ones((10, 1)),)
    config = {"steps": 2, "eval_samples": 4, **SMALL}
    result = fastvi.fit(
        rng_key=0,
        objective=objective,
        wstar_flat=jax.numpy.zeros(2),
        data=data,
        n_data=10,
        beta=0.5,
        gamma=1.0,
        vi_cfg=config,
    )
    missing = [name for name in [*names, *result["traces"]] if f"`{name}`" not in text]
    assert not missing


def test_api_page_lists_every_public_name():
    listed = re.findall(
        r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert {f"fastvi.{name}" for name in fastvi.__all__} <= set(listed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_documents_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).is_file()]


def test_math_page_has_the_sections_that_comments_name():
    sections = re.findall(
        r"^## (.+)$", (DOCS / "math.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert sections == [
        "Symbols",
        "Target",
        "Coordinates",
        "Family",
        "Gradients",
        "Start",
        "Stopping",
        "Estimate",
        "Sampling",
        "Draws",
        "Work",
    ]
    for path in (ROOT / "fastvi").rglob("*.py"):
        for name in re.findall(r'docs/math\.md "(\w+)"', path.read_text(encoding="utf-8")):
            assert name in sections, path
