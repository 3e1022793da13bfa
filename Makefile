# Two commands: `make demo` and `make test`. Both need Python 3.11 or 3.12 and the package index.

PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
    $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
    && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := bench,codec,data,demo,dev,ray,s3
IMAGES ?= kodak

# uv takes a third of pip's time; pip knows index settings that uv does not read.
INSTALL = install --quiet --constraint requirements/constraints.txt \
    --no-build-isolation --editable '.[$(EXTRAS)]'
INSTALL_UV = $(BIN)/uv pip $(INSTALL) --python $(BIN)/python
INSTALL_PIP = $(BIN)/python -m pip $(INSTALL)

export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where this is set, every process compiles all of torch anew: uv leaves that to the first import.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types bench clean

##@ Use

demo: $(VENV)/.installed  ## Compress a collection of photographs, verify it, look at it
	$(BIN)/python jobs/demo.py

bench: $(VENV)/.installed  ## Rate and distortion against JPEG, WebP, AVIF: make bench IMAGES=folder
	$(BIN)/dicmh bench rd $(IMAGES) --output runs/bench

##@ Develop

test: $(VENV)/.installed  ## The test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.installed  ## Style and formatting, checked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.installed  ## Style and formatting, repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed  ## mypy, strict
	$(BIN)/mypy

##@ Environment

.venv: $(VENV)/.installed  ## Everything that the above need, at fixed versions (7 GB with torch)

$(VENV)/.installed: pyproject.toml requirements/constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; name it: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt setuptools uv
	$(INSTALL_UV) || $(INSTALL_PIP)
	touch $@

clean:  ## Remove the environment and everything that was made
	rm -rf $(VENV) build dist demo-output runs *.egg-info .mypy_cache .pytest_cache .ruff_cache
	rm -rf .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	    /^[a-zA-Z_.-]+:.*## / {sub(/:.*/, "", $$1); printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
