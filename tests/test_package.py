"""The package as it is imported and shipped."""

import ast
import importlib
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import fastvi
from tests.support.slow_tests import read_listed, slow_ones

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


def test_every_slow_test_is_there():
    for name in read_listed():
        path, function = name.partition("[")[0].split("::")
        assert f"\ndef {function}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_slow_tests_are_those_that_took_long():
    xml = """<testsuites><testsuite>
      <testcase classname="tests.a.test_b" name="test_c[x.y]" time="9.5" />
      <testcase classname="tests.a.test_b" name="test_quick" time="0.5" />
      <testcase classname="tests.a.test_b" name="test_absent" time="9"><skipped /></testcase>
      <testcase classname="tests.api.test_truth" name="test_kept" time="9" />
    </testsuite></testsuites>"""
    known = frozenset({"tests/a/test_b.py::test_quick", "tests/a/test_b.py::test_absent"})
    found = slow_ones(ET.fromstring(xml).iter("testcase"), known)
    assert found == ["tests/a/test_b.py::test_absent", "tests/a/test_b.py::test_c[x.y]"]


def test_what_is_shipped_says_its_types_and_its_version_in_one_place():
    assert (Path(fastvi.__file__).parent / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "fastvi/_version.py"
    for name in ("pyproject.toml", "CITATION.cff"):
        assert fastvi.__version__ not in (ROOT / name).read_text(encoding="utf-8")
