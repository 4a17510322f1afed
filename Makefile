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
.PHONY: help demo test check bench docker-build docker-demo docker-flower docker-engine format lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

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

docker-build: docker-engine ## builds the image fedsim; DOCKER_BUILD="--build-arg ..." goes to docker build
	@docker build --file docker/Dockerfile --tag fedsim --build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
	    --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) $(DOCKER_BUILD) .

DEMO := docker compose --project-name fedsim-demo --file docker/compose.ray.yaml

docker-demo: docker-build ## trains on a Ray cluster of containers, and brings the run back to runs/
	@trap '$(DEMO) down --volumes --remove-orphans --timeout 0 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	unset FEDSIM_IMAGE FEDSIM_RUNS; $(DEMO) run --rm -T driver && mkdir -p runs && \
	$(DEMO) run --rm -T --no-deps --entrypoint tar driver -C runs -c . | tar -C runs -x --no-same-owner --no-same-permissions && \
	echo "The run is in runs/ of this folder, and nothing of it is left in Docker but the image."

FLOWER := docker compose --project-name fedsim-flower-demo --file docker/compose.flower.yaml

docker-flower: docker-build ## trains on three nodes of Flower in containers, over TLS, and brings the run back to runs/
	@trap '$(FLOWER) down --volumes --remove-orphans --timeout 0 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	unset FEDSIM_IMAGE FEDSIM_RUNS FEDSIM_KEYS NODES; export FEDSIM_USER=$$(id -u) \
	    EXPERIMENT="$${EXPERIMENT:-fedavg/digits --set rounds=10}"; \
	if [ "$$FEDSIM_USER" = 0 ]; then export FEDSIM_USER=1000; chown 1000 docker/keys; fi; \
	$(FLOWER) run --rm -T certify && $(FLOWER) run --rm -T runner && mkdir -p runs && \
	$(FLOWER) run --rm -T --no-deps --entrypoint tar runner -C runs -c . | tar -C runs -x --no-same-owner --no-same-permissions && \
	echo "The run is in runs/ of this folder. The keys stay in docker/keys, and nothing else but the image in Docker."

docker-engine:
	@command -v docker >/dev/null || { echo "This needs Docker, and there is no command docker here." >&2; exit 1; }
	@docker info >/dev/null 2>&1 || { echo "No Docker engine answers: start one, or name one in DOCKER_HOST. What docker says:" >&2; \
	    docker info 2>&1 >/dev/null | tail -1 >&2; exit 1; }
	@docker buildx version >/dev/null 2>&1 || { echo "This needs Docker's plug-in buildx." >&2; exit 1; }
	@docker compose version >/dev/null 2>&1 || { echo "This needs Docker's plug-in compose." >&2; exit 1; }

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
