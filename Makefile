# Two commands: `make demo` tunes the embedded model and shows before and after; `make test` sets up and runs the tests.
# Both make .venv on the first call and do no set-up again until pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A failing run must never look like a passing one.
SHELL       := /bin/bash
.SHELLFLAGS := -o pipefail -ec

.PHONY: demo test soak lint clean
.DEFAULT_GOAL := demo

$(VENV)/python: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, this is $$($(PYTHON) --version)"; echo "fix: make PYTHON=python3.12"; exit 2; }
	@echo "Setting up .venv (once; torch is the large part) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/dev: $(VENV)/python
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/python  ## tune the embedded model on the embedded data and show before and after
	@$(BIN)/python -m tunesmith.demo

test: $(VENV)/dev  ## floors, style, then every test but the long campaigns
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/ruff check -q .
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not soak"

soak: $(VENV)/dev  ## the long campaigns; results go into docs/soak.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak --durations=20

lint: $(VENV)/dev
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
