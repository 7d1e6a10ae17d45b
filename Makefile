# Everything a new clone needs: `make test` and `make quickstart` set up .venv by themselves. No root, no GPU.
PYTHON ?= python3
VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
# megatron-core 0.16.1 with Python 3.11, else 0.19.2. Another Python needs another VENV.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS ?= constraints/python$(if $(filter 3.11,$(PYTHON_VERSION)),3.11,3.12).txt
READY := $(VENV)/.ready-$(PYTHON_VERSION)
EXTRAS ?= dev
RUN := $(VENV)/bin/python
# Where CUDA is, torch often comes with the machine: no virtual environment of ours. What such an image lacks is
# downloaded on a machine with a network (make gpu-wheels) and carried to it. Further wheels in that folder go along.
GPU_PYTHON ?= python3
GPU_PYTHON_VERSION ?= 3.12
GPU_WHEELS ?= build/gpu-wheels
# Reports and results of make gpu-check.
OUT ?= build

# Processes of `make test`.
WORKERS ?= 2
# Markers of the tests that need more than this environment.
ELSEWHERE := pretrained or sglang or browser or slurm

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast test-browser test-pretrained test-slurm sglang-env test-sglang lint format docs docs-serve bench gpu-wheels gpu-check verify clean

help: ## What there is to run
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{ printf "  make %-16s %s\n", $$1, $$2 }'

setup: $(READY) ## Virtual environment in .venv with everything pinned in constraints/

$(READY): pyproject.toml $(CONSTRAINTS) constraints/cpu.txt
	@test ! -e $(RUN) || $(RUN) -c 'import sys; found = "%d.%d" % sys.version_info[:2]; found == "$(PYTHON_VERSION)" or sys.exit("VENV=$(VENV) has Python " + found + ", PYTHON=$(PYTHON) is $(PYTHON_VERSION); choose another with VENV=.venv-$(PYTHON_VERSION), or remove it")'
	tools/install/trainer.sh --python $(PYTHON) --venv $(VENV) --constraints $(CONSTRAINTS) --extras "$(EXTRAS)"
	@touch $@

sglang-env: $(SGLANG_VENV)/.ready ## The rollout server's own environment in .venv-sglang (1.6 GB)

$(SGLANG_VENV)/.ready: constraints/sglang-cpu.txt
	tools/install/sglang.sh --python $(PYTHON) --venv $(SGLANG_VENV)
	@touch $@

quickstart: setup ## Trains a tiny model with FIPO: two minutes, no GPU, no download
	$(RUN) -m examples.quickstart

# One process; no ranks and no other programs that import torch.
test-fast: setup ## The tests of one process, for every change: two minutes
	$(RUN) -m pytest -m "not ($(ELSEWHERE) or gpu or distributed or processes or slow)"

# By file, in two workers: most tests keep one core busy.
test: setup ## All tests that need nothing but this environment
	$(RUN) -m pytest -m "not ($(ELSEWHERE))" -n $(WORKERS) --dist loadfile

test-sglang: setup sglang-env ## Against real SGLang servers on this machine
	$(RUN) -m pytest -m sglang

test-browser: setup ## The report's page in a real chromium
	@for program in chromium chromedriver; do command -v $$program >/dev/null || \
		{ echo "test-browser: there is no $$program; Debian: apt-get install chromium chromium-driver" >&2; exit 1; }; done
	$(RUN) -m pytest -m browser

# Two workers, each with a Slurm of its own: much of the time is waiting for Slurm. Without groups of tests, loadgroup hands
# out one test at a time: the two that take minutes come first and go to different workers.
test-slurm: setup sglang-env ## The job scripts in a local Slurm of several nodes; root on Debian
	@for program in slurmctld slurmd munged srun; do PATH=$$PATH:/usr/sbin command -v $$program >/dev/null || \
		{ echo "test-slurm: there is no $$program; Debian: apt-get install slurmctld slurmd slurm-client munge" >&2; exit 1; }; done
	@[ "$$(id -u)" = 0 ] || { echo "test-slurm: Slurm's daemons need root" >&2; exit 1; }
	$(RUN) -m pytest -m slurm -n $(WORKERS) --dist loadgroup tests/slurm

test-pretrained: setup ## A real model (SmolLM2-135M, a download of 93 MB) to Megatron and back
	$(RUN) -m pytest -m pretrained tests/pretrained

lint: setup ## ruff (format and lint), mypy, shellcheck and hadolint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck -x tools/install/*.sh examples/slurm/* .ci/run
	$(VENV)/bin/hadolint Dockerfile

format: setup ## Let ruff rewrite what it can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# Not --quiet: with it --strict sees no warnings.
docs: setup ## The documentation in build/site; a broken link or a stale page is an error
	$(RUN) -m tools.reference --check
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

docs-serve: setup ## The documentation at http://127.0.0.1:8000, built again whenever a page changes
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve

bench: setup sglang-env ## Benchmarks: print tables, write benchmarks/results/
	$(RUN) -m benchmarks.future_kl
	$(RUN) -m benchmarks.future_kl_share
	$(RUN) -m benchmarks.log_probs
	$(RUN) -m benchmarks.actor
	$(RUN) -m benchmarks.balance
	$(RUN) -m benchmarks.reward
	$(RUN) -m benchmarks.rollout
	$(RUN) -m benchmarks.conversion

gpu-wheels: setup ## Wheels that images with CUDA often lack, for Python GPU_PYTHON_VERSION, into build/gpu-wheels (5 MB)
	$(RUN) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--implementation cp --python-version $(GPU_PYTHON_VERSION) $(addprefix --platform ,manylinux_2_28_x86_64 \
		manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64) -r constraints/gpu-wheels.txt -d $(GPU_WHEELS)

# A package of the image and its replacement must not be mixed: the wheels go into a folder of their own, searched first.
# Gloo finds no interface by itself where the name of the host does not resolve; one GPU needs the loopback only.
gpu-check: ## The gpu-marked tests and the GPU benchmark; needs CUDA (GPU_PYTHON=python3, no .venv); reports into OUT
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu-check: needs CUDA, and this torch (" + torch.__version__ + ") finds no device; choose another Python with GPU_PYTHON=...")'
	$(if $(wildcard $(GPU_WHEELS)/*.whl),rm -rf build/gpu-site && $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps \
		--no-compile --target build/gpu-site $(wildcard $(GPU_WHEELS)/*.whl))
	mkdir -p $(OUT)
	export PYTHONPATH=$(CURDIR)/build/gpu-site:$$PYTHONPATH GLOO_SOCKET_IFNAME=$${GLOO_SOCKET_IFNAME:-lo}; status=0; \
	$(GPU_PYTHON) -m pytest -W default -m gpu -rPs -o junit_family=xunit1 --junitxml=$(OUT)/gpu-tests.xml tests/gpu || status=1; \
	$(GPU_PYTHON) -m benchmarks.gpu --results $(OUT) || status=1; exit $$status

verify: setup sglang-env ## Everything slow: property tests with many more examples, then the benchmarks
	$(RUN) -m benchmarks.verify
	test -d build/quickstart/sft/hf || $(RUN) -m examples.quickstart
	$(RUN) -m benchmarks.soak
	$(MAKE) bench

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) $(SGLANG_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
