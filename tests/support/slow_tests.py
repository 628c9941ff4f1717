"""Which tests are left to `make slow`, by the time that they took.

The argument is the file of a run with `--junit-xml`. It writes `slow_tests.txt` beside this file:
the tests of more than `SECONDS`, by which the fast ones stay within ten minutes on two idle cores.
"""

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

LISTED = Path(__file__).with_name("slow_tests.txt")
SECONDS = 3.0
# Estimates against closed forms: the fast tests are not without them, whatever they take.
KEPT = (
    "tests/api/test_truth.py",
    "tests/api/test_more.py",
    "tests/test_docs.py::test_examples_run",
)


def read_listed(path: Path = LISTED) -> frozenset[str]:
    """Return the node ids of the slow tests."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def node_id(case: ET.Element) -> str:
    """Return the node id of a case: pytest writes a file as the module of a class."""
    module, name = case.get("classname", ""), case.get("name", "")
    return f"{module.replace('.', '/')}.py::{name}"


def slow_ones(cases: Iterable[ET.Element], known: frozenset[str]) -> list[str]:
    """Return those of these cases that took long, and those known that did not run."""
    took: dict[str, float] = {}
    for case in cases:
        if case.find("skipped") is None:
            took[node_id(case)] = float(case.get("time", "0"))
    slow = {name for name, seconds in took.items() if seconds > SECONDS and not is_kept(name)}
    return sorted(slow | (known - took.keys()))


def is_kept(name: str) -> bool:
    """Say whether a test is fast whatever it takes."""
    return name.startswith(KEPT)


if __name__ == "__main__":
    found = slow_ones(ET.parse(sys.argv[1]).iter("testcase"), read_listed())
    header = (
        f"# Tests of more than {SECONDS:g} s; python tests/support/slow_tests.py writes them.\n"
    )
    LISTED.write_text(header + "".join(f"{name}\n" for name in found), encoding="utf-8")
