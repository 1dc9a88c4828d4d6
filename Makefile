# Two commands: `make demo` tunes the embedded model and shows before and after; `make test` sets up and runs the tests.
# Both make .venv on the first call and do no set-up again until pyproject.toml or constraints.txt change.
PYTHON  ?= python3
WORKERS ?= 2
BIN     := .venv/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test gpu-test soak lint clean
.DEFAULT_GOAL := demo

# A .venv without pip is what a set-up leaves that was stopped half-way, or a Python without ensurepip: it is made anew.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)"; echo "fix: make PYTHON=python3.12 (any of 3.11 or newer that you have)"; exit 2; }
	@echo "Setting up .venv, once. Installing PyTorch and a few small packages takes a few minutes ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { echo "fix: install your system's venv package (Debian, Ubuntu: apt install python3-venv)"; exit 2; }
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing what the tests need, once ..."
	@$(PIP) -e ".[dev]"
	@touch $@

demo: .venv/.installed  ## tune the embedded model on the embedded data and show before and after
	@$(BIN)/python -m tunesmith.demo

test: .venv/.installed-dev  ## floors, style, then every test but the long campaigns
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/ruff check -q .
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not soak"

gpu-test:  ## the tests that need a GPU, with the Python that has torch for it: make gpu-test PYTHON=python3; installs nothing
	@PYTHONPATH=src $(PYTHON) -m pytest tests/gpu tests/ops tests/models tests/train tests/serve/test_kernels.py -m gpu -rs

soak: .venv/.installed-dev  ## the long campaigns; results go into docs/soak.md
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak --durations=20

lint: .venv/.installed-dev
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
