# Everything is installed into .venv inside the checkout, from the lock files in requirements/.
# `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
# The libraries that `make bench` measures, which nothing else here needs.
BENCH_VENV := .venv-bench
PEERS := dspy==3.4.1 litellm openai httpx urllib3 aiohttp fastapi uvicorn
# uv only resolves, in an environment of its own; pip installs.
LOCK_VENV := .venv-lock
COMPILE := $(LOCK_VENV)/bin/uv pip compile pyproject.toml --quiet --upgrade --universal \
	--python-version 3.11 --generate-hashes --no-header --no-annotate

# A development install has all that the demo needs, so the demo reuses it when it is there.
RUN_STAMP := $(if $(wildcard $(VENV)/.dev),$(VENV)/.dev,$(VENV)/.run)
# Tests of the pages under docs/ and of the scripts in examples/, as far as there are any.
DOCS_TESTS := $(wildcard tests/docs tests/examples tests/test_docs.py tests/test_examples.py)

# pyright runs on the node that the lock file installs: no system node, no npm, no version check.
export PYRIGHT_PYTHON_GLOBAL_NODE := 0
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check bench lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(RUN_STAMP) ## Show what the package does, with no key and no network
	@$(BIN)/dspylite demo

test: $(VENV)/.dev ## Run the test suite
	@$(BIN)/python -m pytest

check: $(VENV)/.dev ## Lint, format, types, house rules, docstring examples, documented commands
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_readme.py $(DOCS_TESTS)
	DSPYLITE_CACHE=off $(BIN)/python -m pytest -q --doctest-modules dspylite

bench: $(BENCH_VENV)/.ready ## Measure side by side with other libraries (ARGS="--quick --only call")
	@$(BENCH_VENV)/bin/python -m tests.benchmarks $(ARGS)

lock: ## Resolve the lock files anew, to the newest versions that go together
	@$(PYTHON) -m venv $(LOCK_VENV)
	@$(LOCK_VENV)/bin/python -m pip -qq install --upgrade uv
	$(COMPILE) --group dev --extra progress -o requirements/dev.txt >/dev/null
	$(COMPILE) --group build --extra progress -c requirements/dev.txt -o requirements/run.txt >/dev/null

clean: ## Remove .venv, caches and build results
	rm -rf .venv .venv-* build dist htmlcov .coverage .coverage.*
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find dspylite tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "dspylite needs Python 3.11 or newer; '$(PYTHON)' is" \
			"$$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo 'not there')." \
			"Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments." \
			"On Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version): a few seconds ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --upgrade pip
	@touch $@

$(VENV)/.run: requirements/run.txt pyproject.toml | $(VENV)/.made
	@echo "Installing dspylite and what it needs into $(VENV): about one minute, once ..."
	@$(PIP) install --require-hashes -r requirements/run.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements/dev.txt pyproject.toml | $(VENV)/.made
	@echo "Installing dspylite and the development tools into $(VENV): one to two minutes, once ..."
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(BENCH_VENV)/.ready: pyproject.toml
	@echo "Installing dspylite and its peers into $(BENCH_VENV): one to two minutes, once ..."
	@$(PYTHON) -m venv --clear $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip -qq --disable-pip-version-check --no-input install -e . $(PEERS)
	@touch $@
