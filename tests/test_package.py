"""The package as it is imported and shipped."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fastvi

ROOT = Path(__file__).parents[1]


def test_public_names_are_where_type_checkers_are_told():
    tree = ast.parse(Path(fastvi.__file__).read_text(encoding="utf-8"))
    (told,) = [node for node in tree.body if isinstance(node, ast.If)]
    names = {
        alias.name: node.module.removeprefix("fastvi.")
        for node in told.body
        for alias in node.names
    }
    assert names == fastvi._HOME_OF
    assert sorted(names) == sorted(fastvi.__all__) == fastvi.__all__
    assert set(fastvi.__all__) < set(dir(fastvi))
    for name, home in names.items():
        assert getattr(fastvi, name) is getattr(importlib.import_module(f"fastvi.{home}"), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastvi' has no attribute 'estimate_lcl'"):
        fastvi.estimate_lcl  # noqa: B018
    assert fastvi.flows.__name__ == "fastvi.flows"


def test_importing_it_imports_little():
    program = "import sys, fastvi; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    heavy = {"jax", "equinox", "optax", "numpy", "matplotlib", "scipy"}
    assert heavy.isdisjoint(done.stdout.split())


def test_what_is_shipped_says_its_types_and_its_version_in_one_place():
    assert (Path(fastvi.__file__).parent / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "fastvi/_version.py"
    for name in ("pyproject.toml", "CITATION.cff"):
        assert fastvi.__version__ not in (ROOT / name).read_text(encoding="utf-8")
