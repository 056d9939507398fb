# Everything runs in one virtual environment, .venv, made on first use and remade when pyproject.toml changes.
# Needed beforehand: Python >= 3.10 with venv and its C headers, and a C++ compiler.

PYTHON  ?= python3
VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
# Test processes. Each one keeps to a single thread, so that two of them fit two cores.
WORKERS ?= 2
# Passed on to the demo, the tests or the benchmarks: make test ARGS="-k router"
ARGS    ?=

# Inductor runs $CXX, or g++ where it is unset; make knows which compilers there are.
ifeq ($(origin CXX),default)
CXX := $(shell command -v g++ || command -v clang++ || command -v c++)
endif
export CXX

# No test may reach a model hub; models are built from small configurations.
TEST_ENV := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 HF_HUB_OFFLINE=1
PYTEST   := $(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint test-slow bench docs wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

# One pip call, so that the bounds on torch hold for everything that asks for torch.
# pip below 22.3 cannot install into another environment, which tests/test_wheel.py does.
$(STAMP): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null 2>&1 || \
	  { echo "error: no '$(PYTHON)' found; install Python >= 3.10 or pass PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $$("$(PYTHON)" -V 2>&1) is too old; Python >= 3.10 is needed (pass PYTHON=...)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import os, sysconfig as s; open(os.path.join(s.get_path("include"), "Python.h"))' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no C headers; install them (Debian, Ubuntu: apt install python3-dev)" >&2; exit 1; }
	@[ -n "$(CXX)" ] && command -v $(firstword $(CXX)) >/dev/null 2>&1 || \
	  { echo "error: no C++ compiler found; install g++ or clang++, or set CXX" >&2; exit 1; }
	@echo "Installing into $(VENV); the first time this takes some minutes."
	@"$(PYTHON)" -m venv $(VENV)
	@$(PY) -m pip install -qq --disable-pip-version-check "pip>=22.3"
	@$(PY) -m pip install -qq --disable-pip-version-check --editable ".[dev]"
	@touch $@

venv: $(STAMP) ## Make the virtual environment

demo: $(STAMP) ## Run the quick start (ARGS="..." is passed on), then dense and sparse models on text
	@$(PY) examples/quickstart.py $(ARGS)
	@$(PY) -m examples.small_lm.demo

test: lint ## Lint, then run the tests (WORKERS=2, ARGS="...")
	@$(PYTEST) $(ARGS)

test-slow: $(STAMP) ## Run the slow tests only
	@$(PYTEST) -m slow $(ARGS)

lint: $(STAMP) ## Check style, formatting and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

bench: $(STAMP) ## Run the benchmarks; results go to benchmarks/results (some hours; leave the machine alone)
	@$(PY) -m benchmarks.block
	@$(PY) -m benchmarks.compile_time
	@$(PY) -m benchmarks.dump
	@$(PY) -m benchmarks.matching
	@$(PY) -m benchmarks.memory
	@$(PY) -m benchmarks.cpu
	@$(PY) -m benchmarks.cpu.peak
	@$(PY) -m benchmarks.generate
	@$(PY) -m benchmarks.quality
	@$(PY) -m benchmarks.page

docs: $(STAMP) ## Build the site of the guide into site/ (installs mkdocs)
	@$(PY) -m pip install -qq --disable-pip-version-check "mkdocs-material>=9.6" "mkdocstrings[python]>=0.29"
	@$(PY) -m mkdocs build --strict

wheel: $(STAMP) ## Build the wheel into dist/
	@$(PY) -m build --wheel --no-isolation

clean: ## Remove the environment, caches and build outputs
	@rm -rf $(VENV) build dist site samoyeds_dump .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
