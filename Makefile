# Everruns in Python. Needs python3 (3.11 or newer) and make; everything else is set up here, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup dev demo test lint format bench lock clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv and install the locked packages

$(STAMP): requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v.major}.{v.minor} (set PYTHON=python3.x)")'
	@echo "==> creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "==> installing the locked packages (about a minute the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "==> ready"

dev: $(STAMP) ## Start everything: PostgreSQL, Temporal with its Web UI, API and worker (ARGS="--data-dir .data" keeps the data)
	@exec $(BIN)/everruns dev $(ARGS)

demo: $(STAMP) ## A conversation with tools that survives two SIGKILLs of its worker
	@exec $(BIN)/everruns demo $(ARGS)

test: $(STAMP) ## Run the tests (ARGS="tests/unit -k name" narrows them)
	@$(BIN)/python -m pytest -n 4 --dist loadfile $(ARGS)

lint: $(STAMP) ## ruff (lint and format) and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: $(STAMP) ## Format the code and sort imports
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench: $(STAMP) ## Measure; prints a table and writes benchmarks/results/
	@$(BIN)/python -m benchmarks $(ARGS)

lock: ## Resolve pyproject.toml again into the lock files (needs uv)
	uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --extra dev -o requirements.lock
	uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --extra dev --group test --group lint --group build -o requirements-dev.lock
	uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --constraints requirements.lock -o requirements-server.lock
	uv pip compile --group build --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --constraints requirements-dev.lock -o requirements-build.lock

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
