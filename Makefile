# `make run` and `make test` need Python 3.10 or newer and nothing else; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# Not from the environment: shells and conda set HOST and PORT for other ends.
WORKERS = 2
LOAD = 2
HOST = 127.0.0.1
PORT = 8080
CONFIG ?= config/lmcache.yaml
BIN := $(VENV)/bin
SOURCES := src tests tools benchmarks hatch_build.py
.DEFAULT_GOAL := help
.PHONY: help run test test-lmcache test-vllm lint format docs screenshots bench bench-lmcache wheel clean

help:  ## show this
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.run  ## start a local cluster, its controller and its dashboard (PORT=8080 WORKERS=2 LOAD=2 HOST=127.0.0.1 CONFIG=config/lmcache.yaml); Ctrl-C stops it
	@$(BIN)/python tools/local_cluster.py --config $(CONFIG) --workers $(WORKERS) --load $(LOAD) --host $(HOST) --port $(PORT)

test: $(VENV)/.test  ## run all tests but those that need a real LMCache or vLLM (ARGS="-k proxy")
	@tools/ensure_programs.sh
	@$(BIN)/python -m pytest $(ARGS)

test-lmcache: $(VENV)/.test  ## install the real LMCache beside the project (cached) and test against it
	@LMCACHE_PYTHON=$$(tools/install_lmcache.sh $(PYTHON)) && export LMCACHE_PYTHON && $(BIN)/python -m pytest -m lmcache $(ARGS)

test-vllm: $(VENV)/.test  ## install vLLM's CPU build and LMCache beside the project (cached) and test inside them
	@VLLM_PYTHON=$$(tools/install_vllm.sh $(PYTHON)) && export VLLM_PYTHON && $(BIN)/python -m pytest -m vllm $(ARGS)

lint: $(VENV)/.lint  ## check format, lint, types and layers
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/mypy tools benchmarks
	@$(BIN)/lint-imports --no-cache

format: $(VENV)/.lint  ## format the code
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

docs: $(VENV)/.run  ## write the tables of settings and options into docs/
	@$(BIN)/python tools/docs_tables.py

screenshots: $(VENV)/.test  ## take the dashboard's pictures for the docs, of a cluster that runs for five minutes (ARGS="--seconds 60")
	@$(BIN)/python tools/screenshots.py $(ARGS)

bench: $(VENV)/.bench  ## measure beside FastAPI and uvicorn
	@$(BIN)/python benchmarks/in_process.py $(ARGS)

bench-lmcache: $(VENV)/.run  ## install the real LMCache beside the project (cached) and measure beside its own server
	@LMCACHE_PYTHON=$$(tools/install_lmcache.sh $(PYTHON)) && export LMCACHE_PYTHON && \
	  $(BIN)/python benchmarks/engine.py && $(BIN)/python benchmarks/operations.py && $(BIN)/python benchmarks/metrics.py

wheel: $(VENV)/.run  ## build the wheel into dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist src/lmcache_frontend/pages/static/vendor .*_cache .hypothesis

# The environment, once per set of dependencies; an interrupted installation is done again.
$(VENV)/.run $(VENV)/.test $(VENV)/.lint $(VENV)/.bench: pyproject.toml hatch_build.py assets/package-lock.json
	@tools/make_venv.sh $(PYTHON) $(VENV) $(patsubst .%,%,$(notdir $@))
	@touch $@
