"""How `make matrix` finds interpreters, and what it says of them."""

import sys

from tests.support.matrix import Cell, describe, find_python, supported


def script(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(("#!/bin/sh", *lines)))
    file.chmod(0o755)
    return file


def test_an_interpreter_counts_only_if_it_runs_and_says_its_version(tmp_path, monkeypatch):
    first, second = tmp_path / "shims", tmp_path / "other"
    script(first / "python3.99", "exit 127")
    script(second / "python3.99", "echo 3.98.1")
    monkeypatch.setenv("PATH", f"{first}:{second}")
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    assert find_python("3.99", home=tmp_path) is None
    real = script(tmp_path / ".pyenv" / "versions" / "3.99.2" / "bin" / "python3.99", "echo 3.99.2")
    assert find_python("3.99", home=tmp_path) == (real, "3.99.2")


def test_the_versions_are_those_of_the_classifiers():
    assert supported()[0] == (3, 11)
    assert sys.version_info[:2] in supported()


def test_a_cell_is_one_line():
    cell = Cell("3.12", sys.executable, "3.12.1", None)
    text = "== 2 failed, 1070 passed, 3 skipped, 1 error in 401.20s (0:06:41) ==\n"
    text += "1 failed, 15 passed, 1759 deselected in 50.02s\n"
    passed = {"test": False, "lint": True, "docs": True}
    line = (
        "python 3.12.1, jax 0.12.0: 1085 passed, 4 failed; "
        "test FAILED, lint passed, docs passed; 7.5 min"
    )
    assert describe(cell, "0.12.0", text, passed, 7.52) == line
    assert "no tests ran" in describe(cell, "none", "error: no index", passed, 0.1)
