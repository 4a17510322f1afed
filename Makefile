# Everything runs in .venv, which is made at first need with the versions of requirements.lock.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# No program used here tells its maker that it ran.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

TESTS := not docker and not gpu
ifneq ($(CI),true)
TESTS += and not slow
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check bench format lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## trains a first model, in seconds, and says where its report is
	@$(BIN)/fedsim run fedavg/digits

test: $(READY) ## runs the tests; the slow ones only with CI=true; ARGUMENTS="..." go to pytest
	@$(BIN)/python -m pytest -m "$(TESTS)" $(ARGUMENTS)

check: $(READY) ## looks for mistakes, unusual form and wrong types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY) ## measures how fast the engines are
	@$(BIN)/python -m experiments.benchmarks

format: $(READY) ## puts the code into its usual form
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

# What a CUDA build of torch brings along is left out: another build of the same version would not need it.
lock: ## makes requirements.lock anew: the newest versions allowed, but for those in KEEP="torch==2.13.0 ..."
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/pip install -qq '.[dev]' $(KEEP)
	@{ sed '/^[^#]/,$$d' requirements.lock; build/lock/bin/pip freeze --exclude fedsim \
	   | grep -vE '^(cuda|nvidia|triton)' | sed 's/+.*//' | LC_ALL=C sort -f; } > build/requirements.lock
	@mv build/requirements.lock requirements.lock
	@rm -rf build/lock

clean: ## removes caches and what was built, not .venv and not runs
	@rm -rf build dist htmlcov .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fedsim needs Python 3.11 or later; name one with make PYTHON=...")'
	@test -x $(BIN)/python || { echo "Making .venv, which takes some minutes the first time."; $(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip install -qq -r requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@
