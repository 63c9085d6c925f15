# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create or refresh .venv (the other targets do it by themselves)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sophon needs Python 3.11 or newer as '$(PYTHON)': install it, or name another with 'make PYTHON=python3.12 ...'" >&2; exit 1; }
	@test -x $(BIN)/pip || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || \
	  { echo "the venv module of '$(PYTHON)' does not work: on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV); the first time takes a minute or more." >&2
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## protect, audit and report a small model on embedded data
	@$(BIN)/sophon demo --out demo

test: $(STAMP) ## run every test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

check: $(STAMP) ## lint, formatting, types and import rules
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "run 'make format'" >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@echo "check: ruff, format, mypy and import rules are clean"

format: $(STAMP) ## format the code and sort imports
	@$(BIN)/ruff check --quiet --fix --select I .
	@$(BIN)/ruff format .

bench: $(STAMP) ## measure speed and memory, print the table (benchmarks/run.py --write keeps it in docs/results/)
	@$(BIN)/python benchmarks/run.py

docs: $(STAMP) ## build the documentation site into site/
	@$(BIN)/mkdocs build --strict --quiet

clean: ## remove .venv and everything generated; runs/ stays
	rm -rf $(VENV) demo site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests docs -name __pycache__ -prune -exec rm -rf {} +
