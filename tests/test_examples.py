"""The examples run, write their figure and numbers, and these are what theory says."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"


def run(name, out):
    """Run an example in its short form, and return the numbers that it writes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--out", str(out)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    (figure,), (numbers,) = out.glob("*.png"), out.glob("*.json")
    assert figure.stem == numbers.stem
    assert 10_000 < figure.stat().st_size < 150_000
    return json.loads(numbers.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda script: script.stem)
def test_every_example_has_a_page_with_its_figure_and_command(script):
    name = script.stem.replace("_", "-")
    text = (ROOT / "docs" / "examples" / f"{name}.md").read_text(encoding="utf-8")
    assert f"python examples/{script.name}" in text
    figures = re.findall(r"!\[[^\]]+\]\(\.\./figures/([\w-]+\.png)\)", text)
    assert figures
    assert all((ROOT / "docs" / "figures" / figure).is_file() for figure in figures)
    assert f"examples/{name}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_closed_form_of_deep_linear_networks():
    """Against what is known by hand: one inner unit at zero, and a network of full rank."""
    example = runpy.run_path(str(FOLDER / "deep_linear.py"))
    learning_coefficient = example["learning_coefficient"]
    # w2 w1 = 0 in 1 + 1 dimensions: (w1 w2)^2 has coefficient 1/2 and multiplicity 2
    assert learning_coefficient((1, 1, 1), 0) == (0.5, 2)
    # of full rank the product moves in all directions, a regular model of 9 parameters
    assert learning_coefficient((3, 3, 3), 3) == (4.5, 1)


def test_loss_of_superposition_is_the_integral():
    """The closed form against a fine sum over u, at random weights."""
    example = runpy.run_path(str(FOLDER / "superposition.py"))
    rng = np.random.default_rng(0)
    for _ in range(3):
        params = {"W": rng.normal(size=(2, 6)), "b": 0.3 * rng.normal(size=6)}
        u = (np.arange(20_000) + 0.5) / 20_000
        total = 0.0
        for one in np.eye(6):
            x = u[:, None] * one
            out = np.maximum(x @ params["W"].T @ params["W"] + params["b"], 0)
            total += np.mean(np.sum((x - out) ** 2, axis=1)) / 6
        assert float(example["loss_fn"](params, None)) == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_pentagon_of_superposition(tmp_path):
    found = run("superposition", tmp_path)["at_polygons"][0]
    assert found["polygon"] == "pentagon, other off"
    # half the directions that change the loss; the localizer holds less than a tenth of them
    assert found["theory"] == 7.0
    assert abs(found["llc"] - 7.0) < 0.7 + 4 * found["llc_sem"]


@pytest.mark.slow
def test_deep_linear_network_agrees_with_what_is_exact(tmp_path):
    (found,) = run("deep_linear", tmp_path)["by_network"]
    assert found["theory"] == 11.5
    assert abs(found["llc"] - found["exact"]) < 4 * found["llc_sem"]
    assert found["llc_sem"] < 0.05 * found["llc"]


@pytest.mark.slow
def test_influence_finds_wrong_labels(tmp_path):
    found = run("influence", tmp_path)
    # by chance it would be 1.25 of 25
    assert found["found_by_influence"] > 12
    (deleted,) = found["deletions"]
    assert deleted["change"] > 0
    assert deleted["predicted"] > 0


@pytest.mark.slow
def test_grokking_is_below_its_bound(tmp_path):
    found = run("grokking", tmp_path)
    assert found["upper_bound"] == 882
    for row in found["checkpoints"]:
        assert row["spread"] < found["upper_bound"]
        assert row["test_accuracy"] < 0.5 < row["accuracy"]


@pytest.mark.slow
def test_transformer_learns_bigrams(tmp_path):
    found = run("transformer_over_training", tmp_path)
    first, *_, last = found["checkpoints"]
    assert last["loss"] < found["known_losses"]["unigrams"] < first["loss"]
    # downhill before convergence: llc is negative at first, and its drift is below its spread
    assert first["llc"][0] < 0 < last["llc"][0]
    joint = np.hypot(last["llc"][1], last["sgld"][1])
    assert abs(last["llc"][0] - last["sgld"][0]) < 4 * joint + 0.1 * last["llc"][0]
