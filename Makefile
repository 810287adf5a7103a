# From a bare checkout: `make quickstart` and `make test` do all the set-up they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install quickstart test test-all lint clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: .venv/.installed ## make .venv with megarec and its development tools

quickstart: install ## log -> shards -> train -> evaluate -> convert -> recommend -> report, on the CPU
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run.sh

lint: install ## format, ruff, mypy, import floors, shell scripts, Dockerfiles
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run examples/*/*.sh examples/*/*.sbatch
	$(BIN)/hadolint --config docker/hadolint.yaml docker/Dockerfile.*

# Tests fork several ranks: one thread each, and nothing to compile.
test test-all: export OMP_NUM_THREADS = 1
test test-all: export TORCHDYNAMO_DISABLE = 1

test: lint ## everything that needs no GPU and takes less than a quarter of an hour
	$(BIN)/python -m pytest -m "not slow and not gpu" --durations=15

test-all: lint ## the slower proofs too
	$(BIN)/python -m pytest -m "not gpu" --durations=30

clean: ## remove .venv and everything generated
	rm -rf .venv outputs quickstart build dist *.egg-info
