# Everything here works from a fresh clone with Python 3.11+, make and a C++20 compiler; the first target
# that needs it creates .venv and installs the package and its tools into it.
#
#   make demo    train, convert and freeze a small network; writes sparsight-demo/report.html
#   make test    the test suite, in two processes   PYTEST_ARGS='-k sites -x' narrows it
#   make bench   the benchmarks, written to runs/bench/<time>; some 20 minutes on two cores
#                BENCH_ARGS=--quick shortens them; BENCH_OUT=<folder> BENCH_ARGS=--resume goes on with a run
#   make lint    ruff, pyright, clang-format
#   make clean   remove .venv, the build and the caches

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
BENCH_ARGS ?=
# A folder per run, so that no report is overwritten by accident. roofline reads what block wrote.
BENCH_OUT ?= runs/bench/$(shell date -u +%Y-%m-%d-%H%M%S)
DEMO_ARGS ?=

# What the compiled package is made of; Python files are not here, because the installation is editable.
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

# An interpreter can build the package if it is new enough, can make a virtual environment and has its C headers.
# PYTHON=... overrides the search.
PROBE := import sys, sysconfig, pathlib, venv, ensurepip; \
	sys.exit(sys.version_info < (3, 11) or not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())
FIND_PYTHON = $(if $(PYTHON),echo '$(PYTHON)',for candidate in python3 python3.13 python3.12 python3.11; do \
	"$$candidate" -c '$(PROBE)' 2>/dev/null && echo "$$candidate" && break; done)

.PHONY: help setup demo test bench lint format clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

$(BIN)/python:
	@python="$$($(FIND_PYTHON))"; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.11 or newer with venv, ensurepip and Python.h was found;" \
	       "install one (Debian: python3-dev python3-venv) or name it: make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	"$$python" -m venv $(VENV)

$(STAMP): $(BUILD_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --editable '.[all,dev,bench]'
	@touch $@

demo: $(STAMP)
	$(BIN)/sparsight demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not network' $(PYTEST_ARGS)

bench: $(STAMP)
	@out="$(BENCH_OUT)"; failed=; \
	measure() { echo "== $$*"; \
	  $(BIN)/python bench/"$$1".py --out "$$out" "$${@:2}" $(BENCH_ARGS) || failed="$$failed $$1"; }; \
	measure block; measure network; measure overhead; measure memory; measure crossover; measure roofline; \
	measure training_step; measure training_step --dtype bfloat16; measure pool; measure assemble; \
	measure block --dtype bfloat16; measure network --dtype bfloat16 --only features; \
	case "$(BENCH_ARGS)" in *--quick*) measure compress; measure compress --wide; measure frrn;; esac; \
	echo "== report"; $(BIN)/python bench/report.py --json "$$out" || failed="$$failed report"; \
	if [ -n "$$failed" ]; then echo "make bench: failed:$$failed; the rest is in $$out" >&2; exit 1; fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*.cpp)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests bench recipes -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
