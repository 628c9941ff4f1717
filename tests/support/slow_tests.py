"""Which tests are left to `make slow`, by the time that they took.

The argument is the file of a run with `--junit-xml`. It writes `slow_tests.txt` beside this file:
the tests of more than `SECONDS`, by which the fast ones stay within ten minutes on two idle cores.
"""

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

LISTED = Path(__file__).with_name("slow_tests.txt")
SECONDS = 2.0
# What is in the fast tests whatever it takes: estimates against closed forms, several devices and
# processes, killed jobs and runs, and that the first pages run.
KEPT = (
    "tests/api/test_truth.py",
    "tests/api/test_more.py",
    "tests/api/test_processes.py",
    "tests/cli/test_sweep_jobs.py",
    "tests/integrations/test_lambda_hat.py",
    "tests/results/test_resume.py",
    "tests/sampling/test_devices.py",
    "tests/sampling/test_sharded_parameters.py",
    "tests/sampling/test_correction.py::test_reweighting_finds_it_too",
    "tests/sampling/test_correction.py::test_sampling_finds_the_posterior_s_llc",
    "tests/sampling/test_from_localizer.py::test_a_walk_finds_the_llc",
    "tests/test_docs.py::test_diagnostics_page",
    "tests/test_docs.py::test_examples_run",
    "tests/test_docs.py::test_math_page",
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
