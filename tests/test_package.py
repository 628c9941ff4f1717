"""The package as it is imported and shipped."""

import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import fastvi
from tests.support.slow_tests import read_listed, slow_ones

ROOT = Path(__file__).parents[1]


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
