PYTHON ?= python3

BIN := .venv/bin
# Touched when the environment is complete; the installs run again only where setup.py is newer.
INSTALLED := .venv/.installed
# Without what only tests and conversion need, torch above all.
RUNTIME := .venv/.installed-runtime

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo demo-sam test test-full lint types format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): setup.py
	@echo "Installing osprey-jax and what its tests need into .venv (minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(RUNTIME) $@

$(RUNTIME): setup.py
	@echo "Installing osprey-jax into .venv"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

install: $(INSTALLED) ## make .venv, which all targets share

# Huge pages, where glibc has them: a step frees and takes again hundreds of megabytes.
demo demo-sam: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: $(RUNTIME) ## train a small model from nothing and look at what it says of new scenes
	$(BIN)/python -m osprey_jax.demo

demo-sam: $(RUNTIME) ## after demo: train a small segmenter, and let the model say what it finds
	$(BIN)/python -m osprey_jax.sam.demo

# Programs are compiled once and kept: without the two limits JAX would skip most of the tests' small ones.
test test-full: export JAX_PLATFORMS = cpu
test test-full: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.cache/jax
test test-full: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test test-full: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES = -1

test: lint types ## lint, check types, run all tests but the slow ones
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations=15

test-full: lint types ## the same with the slow tests
	$(BIN)/python -m pytest -m "" --numprocesses 2 --dist loadfile --durations=15

lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy over the packages
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build products; .venv stays
	rm -rf .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
