# All commands run in .venv, which is created from constraints.txt on first use; `make help` lists the targets.

PYTHON ?= python3
TORCH ?= 2.13.0
# Without pins, `CONSTRAINTS=/dev/null` installs the newest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
FUZZ_SECONDS ?= 60
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint $(CONSTRAINTS)
# On all cores, where pip uses one. Some packages contain files that are not valid Python.
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true
RESOLVE := .venv/resolver/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header
.DEFAULT_GOAL := help

.PHONY: help serve test test-all test-page test-ray coverage test-without-halide check format bench layers learning wire overload soak fuzz gpu monitoring constraints estimates pictures clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

serve: .venv/serve.stamp  ## start the service (settings: CORR2D_* or `corr2d serve --help`)
	@exec $(BIN)/corr2d serve

test: .venv/dev.stamp  ## run the tests that a commit needs (3 minutes)
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-all: test  ## then run those that start processes, wait, or compute for long, and those of the page
	$(BIN)/pytest -n 2 --dist worksteal -m slow --ignore tests/playground
	TEST_SERVER=uvicorn $(BIN)/pytest -n 2 --dist worksteal -m "not slow" tests/service
	$(MAKE) test-page
	@if test -e .venv/ray.stamp; then $(MAKE) test-ray; else echo "make test-ray installs Ray and runs its tests"; fi

test-page: .venv/dev.stamp  ## run the tests of the page in the Chromium of the system (90 seconds)
	$(BIN)/pytest -n 2 --dist worksteal tests/playground


test-ray: .venv/ray.stamp  ## run the tests of responses against Ray Serve, with replicas that fail, start and stop (2 minutes)
	TEST_SERVER=ray $(BIN)/pytest -p no:randomly -m "not slow or ray" tests/service tests/ray_serve

# With an empty cache of compiled pipelines: the functions that build them run only if they are not cached.
coverage: .venv/dev.stamp  ## run all tests with branch coverage
	rm -rf .pytest_cache/home
	XDG_CACHE_HOME=$(CURDIR)/.pytest_cache/home $(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term

test-without-halide: .venv/dev.stamp  ## run the tests as on a platform without a Halide wheel
	$(BIN)/pytest -n 2 --dist loadfile --without-halide tests/service tests/robustness tests/core/test_conv2d_layer.py

check: .venv/dev.stamp  ## check lint, format, types, import rules, dependencies, and docs against the code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/pytest -q -p no:randomly tests/project

format: .venv/dev.stamp  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/bench.stamp  ## compare the engines with torch, scipy, OpenCV, libvips and DIPlib (30 minutes)
	$(BIN)/python benchmarks/engines.py --choice --output benchmarks/engines.md --plot docs/images/engines.png

layers: .venv/bench.stamp  ## compare layers of many channels with torch, ONNX Runtime and OpenVINO (4 minutes)
	$(BIN)/python benchmarks/layers.py --output benchmarks/layers.md

learning: .venv/bench.stamp  ## compare learning with autograd and with numpy's and scipy's least squares (10 minutes)
	$(BIN)/python benchmarks/learning.py --output benchmarks/learning.md --plot docs/images/learning.png

wire: .venv/bench.stamp  ## compare the service with other servers over HTTP (12 minutes; needs wrk)
	$(BIN)/python benchmarks/wire.py --output benchmarks/wire.md --plot docs/images/wire.png

overload: .venv/bench.stamp  ## send up to ten times the load that the service can process (7 minutes)
	$(BIN)/python benchmarks/overload.py --output benchmarks/overload.md --plot docs/images/overload.png

soak: .venv/bench.stamp  ## send forty thousand valid and invalid requests and measure the memory (12 minutes)
	$(BIN)/python benchmarks/soak.py --output benchmarks/soak.md --plot docs/images/soak.png

fuzz: .venv/fuzz.stamp  ## send random requests from the OpenAPI schema, then fuzz every decoder for FUZZ_SECONDS (60)
	HYPOTHESIS_PROFILE=thorough $(BIN)/pytest -q tests/service/test_schema_fuzz.py
	formats=$$($(BIN)/python tests/fuzz/decoders.py --list) || exit 1; for format in $$formats; do \
		$(BIN)/python tests/fuzz/decoders.py $$format --seconds $(FUZZ_SECONDS) || exit 1; done

gpu: .venv/dev.stamp  ## check and time the engines on a GPU, if there is one
	$(BIN)/python benchmarks/gpu.py

monitoring: .venv/dev.stamp  ## check alerts and dashboard with promtool, if it is installed (apt-get install prometheus)
	$(BIN)/pytest -q -rs -p no:randomly tests/project/test_monitoring.py

estimates: .venv/dev.stamp  ## compare estimates of time and memory with 500 random requests (10 minutes)
	$(BIN)/python benchmarks/estimates.py --requests 500

pictures: .venv/bench.stamp  ## regenerate the images of the README
	$(BIN)/python docs/pictures.py

constraints:  ## resolve constraints.txt and requirements.lock again from the ranges in pyproject.toml, with torch $(TORCH)
	$(PYTHON) -m venv .venv/resolver
	.venv/resolver/bin/pip install --quiet uv
	echo "torch==$(TORCH)" > .venv/resolver/torch.txt
	( echo "# Generated by \`make constraints\`: every dependency, pinned."; $(RESOLVE) --upgrade --no-annotate \
		--constraint .venv/resolver/torch.txt --all-extras --group dev --group bench --group fuzz pyproject.toml ) \
		> .venv/resolver/constraints.txt
	( echo "# Generated by \`make constraints\`: what the service needs but torch, with the hashes of all files."; \
		$(RESOLVE) --no-annotate --constraint .venv/resolver/constraints.txt --extra plot --generate-hashes \
		--no-emit-package torch pyproject.toml ) > .venv/resolver/requirements.lock
	mv .venv/resolver/constraints.txt .venv/resolver/requirements.lock .

clean:  ## remove the virtual environment and all caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*

# torch has no hash, since each index has builds of its own (CPU, CUDA).
.venv/serve.stamp: pyproject.toml constraints.txt requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --no-deps torch
	$(INSTALL) --no-deps --require-hashes --requirement requirements.lock
	$(INSTALL) --no-deps --editable .
	@$(COMPILE)
	@touch $@

# pip 25.1 introduced --group.
.venv/dev.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) 'pip>=25.1'
	$(INSTALL) --editable '.[plot,telemetry]' --group dev
	@$(COMPILE)
	@touch $@ .venv/serve.stamp

.venv/ray.stamp: pyproject.toml constraints.txt .venv/dev.stamp
	$(INSTALL) --editable '.[ray]'
	@touch $@

.venv/bench.stamp: pyproject.toml constraints.txt .venv/dev.stamp
	$(INSTALL) --group bench
	@touch $@

.venv/fuzz.stamp: pyproject.toml constraints.txt .venv/dev.stamp
	$(INSTALL) --group fuzz
	@touch $@
