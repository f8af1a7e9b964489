# `make help` lists what can be made. PYTHON and VENV given on the command line or in the environment are respected.
VENV ?= .venv
PYTHON ?= python3

BIN := $(VENV)/bin
# What is compiled is kept, whatever the environment says: else every worker and every command line under test compiles it
# again. The tests of a file stay together, so that what they share is made once.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
COVERAGE := --cov=nlme_sbi --cov=simulators
INSTALL_INPUTS := setup.cfg pyproject.toml constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

# Two pips in one environment would trip over each other.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-fast test-thorough check docs clean

help: ## show this list
	@grep -E '^[a-z_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):.*## /  make \1\t/' | expand -t 24
	@echo "  VENV=DIR and PYTHON=EXECUTABLE choose the environment (now $(VENV)) and what creates it (now $(PYTHON))."

demo: $(VENV)/.installed-demo ## population parameters of the theophylline data, from simulation to report, in minutes
	$(BIN)/python scripts/simulate.py experiment=theophylline
	$(BIN)/python scripts/train_flow.py experiment=theophylline
	$(BIN)/python scripts/fit_population.py experiment=theophylline
	$(BIN)/python scripts/diagnose.py experiment=theophylline fit=latest
	$(BIN)/python scripts/report.py experiment=theophylline

# Shape checks of every annotated function double the time of fits: what takes long runs without them.
test: $(VENV)/.installed-test ## all tests
	NLME_SBI_SHAPE_CHECKS=off $(PYTEST) -m 'slow and not thorough' $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(PYTEST) -m 'not slow and not thorough' $(PYTEST_ARGS)

# A tracer doubles the time of much that runs beside the package, too; hence a target of its own.
coverage: $(VENV)/.installed-test ## all tests, and the lines that they run: at least 90%
	NLME_SBI_SHAPE_CHECKS=off $(PYTEST) -m 'slow and not thorough' $(COVERAGE) --cov-report= $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(PYTEST) -m 'not slow and not thorough' $(COVERAGE) --cov-append --cov-report=term:skip-covered --cov-fail-under=90 \
		$(PYTEST_ARGS)

test-fast: $(VENV)/.installed-test ## the tests that take less than seconds each, under shape checks
	$(PYTEST) -m 'not slow and not thorough' $(PYTEST_ARGS)

test-thorough: $(VENV)/.installed-test ## more of what is tested anyway: kills at twenty moments, disks full at every file
	$(PYTEST) -m thorough $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## lint, format, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Open site/index.html; with search: $(BIN)/python -m http.server -d site"

clean: ## remove the environment made here and all caches; outputs/ stays
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +

# The stamp is inside the environment, so that a new environment installs and an unchanged one does not.
$(VENV)/.installed-demo: $(INSTALL_INPUTS) | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-test: $(INSTALL_INPUTS) | $(BIN)/python
	$(INSTALL) '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(INSTALL_INPUTS) | $(BIN)/python
	$(INSTALL) '.[docs]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
