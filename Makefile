# `make` lists the targets. PYTHON=python3.12 chooses the interpreter, VENV=folder the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check
SOURCES := $(wildcard fastvi tests bench examples)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-torch slow matrix lint format bench benchall gate package examples docs check

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.stamp-demo  ## install the package and estimate the LLC of a digits classifier
	$(BIN)/fastvi demo digits

test: $(VENV)/.stamp-test  ## run the fast tests, a part of them once more compiled as people compile
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile -m 'as_users_compile and not slow' \
	  $$(grep -rlE --include='test_*.py' 'as_users_compile|fully_optimised' tests)

# The wheel without CUDA is not on PyPI: it comes from a configured index, else from torch's own.
TORCH_VENV ?= .venv-torch
TORCH := 'torch==2.13.0+cpu' transformers grain datasets
TORCH_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INSTALL := $(TORCH_VENV)/bin/python -m pip install --quiet --no-input --disable-pip-version-check

test-torch:  ## run the tests of torch modules in an environment of their own, where torch can be had
	@$(MAKE) --no-print-directory VENV=$(TORCH_VENV) $(TORCH_VENV)/.stamp-test
	@if $(TORCH_INSTALL) $(TORCH) 2>/dev/null || \
	    $(TORCH_INSTALL) --retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX) $(TORCH); then \
	  $(TORCH_VENV)/bin/python -m pytest -n auto --maxprocesses 2 --dist loadfile \
	    tests/integrations/test_torch*.py tests/integrations/test_checkpoints.py \
	    tests/target/test_containers_optional.py; \
	else \
	  echo "!!! The tests of torch modules did NOT run: $(TORCH) cannot be had here. !!!" >&2; \
	fi

slow: $(VENV)/.stamp-test  ## run the slow tests
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile -m slow

matrix:  ## test, lint and docs on each Python found, with the newest and the lowest versions
	$(PYTHON) tests/support/matrix.py

lint: $(VENV)/.stamp-lint  ## check style, format, types and the order of the rooms
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.stamp-lint  ## apply the style that lint checks
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.stamp-bench  ## run the short benchmarks; BENCH_KEEP=1 keeps the rows for a commit
	$(BIN)/python -m pytest bench/ --benchmark-only

benchall: $(VENV)/.stamp-bench  ## run all benchmarks: 40 to 60 minutes
	$(BIN)/python -m pytest bench/ --benchmark-only -m 'slow or not slow'

gate: $(VENV)/.stamp-test  ## compare the cost of a small step with the committed one
	$(BIN)/python -m pytest -q 'bench/bench_step.py::test_step[1000]' --benchmark-only
	$(BIN)/python -m bench.gate --allow 2

# The tests' interpreter builds; each archive is installed alone, and asked from another folder.
package: $(VENV)/.stamp-lint  ## build wheel and sdist, and install each in an environment of its own
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python tests/support/package.py dist

EXAMPLES_OUT ?= runs/examples

examples: $(VENV)/.stamp-test  ## run the five examples: a quarter of an hour; EXAMPLES_OUT=docs/figures renews the pages' figures
	set -e; for script in examples/*.py; do \
	  echo "==> $$script"; $(BIN)/python $$script --out $(EXAMPLES_OUT); done

docs: $(VENV)/.stamp-docs  ## build the documents as a site in site/, strictly
	$(BIN)/python -m mkdocs build --strict  # quiet, it passes over warnings

check: test lint  ## test, then lint

# The second form is for a Python without ensurepip; pip 25.1 is the first to read dependency groups.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fastvi needs Python 3.11 or newer, but '$(PYTHON) --version' says:" \
	    "$$($(PYTHON) --version 2>&1 || true). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(INSTALL) --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.stamp-demo: pyproject.toml | $(VENV)/.stamp-venv
	$(INSTALL) --editable '.[cli,plots]'
	@touch $@

$(VENV)/.stamp-test: pyproject.toml | $(VENV)/.stamp-venv
	$(INSTALL) --editable . --group test
	@touch $@

$(VENV)/.stamp-lint: pyproject.toml | $(VENV)/.stamp-venv
	$(INSTALL) --editable . --group dev
	@touch $@

$(VENV)/.stamp-bench: pyproject.toml | $(VENV)/.stamp-venv
	$(INSTALL) --editable . --group test --group bench
	@touch $@

$(VENV)/.stamp-docs: pyproject.toml | $(VENV)/.stamp-venv
	$(INSTALL) --editable . --group docs
	@touch $@
