# Everything a new clone needs: `make test` and `make quickstart` set up .venv by themselves. No root, no GPU.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
EXTRAS ?= dev
RUN := $(VENV)/bin/python

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint format bench verify clean

help: ## What there is to run
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

setup: $(VENV)/.ready ## Virtual environment in .venv with everything pinned in constraints/

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] + "; choose another with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

quickstart: setup ## The algorithm on a small synthetic batch (the training loop is not there yet)
	$(RUN) -m examples.quickstart.algorithm

test: setup ## All tests
	$(RUN) -m pytest

lint: setup ## ruff (format and lint) and mypy
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: setup ## Let ruff rewrite what it can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: setup ## Benchmarks: print tables, write benchmarks/results/
	$(RUN) -m benchmarks.future_kl

verify: setup ## Everything slow: property tests with many more examples, then the benchmarks
	HYPOTHESIS_PROFILE=thorough $(RUN) -m pytest --timeout 3600
	$(MAKE) bench

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
