# Two commands on a bare machine: `make demo` runs a small study, `make test` the whole test suite.
PYTHON ?= python3
BIN := .venv/bin
export VLM_JAX_CACHE ?= $(CURDIR)/.cache
export TF_CPP_MIN_LOG_LEVEL := 2

.PHONY: demo test lint docs bench setup clean

demo: .venv/installed  ## data, a grid of small models, a law, a plan and a report, in minutes
	$(BIN)/python -m experiments.demo --workdir workdirs/demo

test: .venv/installed  ## every test; needs no accelerator
	$(BIN)/python -m pytest -n auto --dist loadgroup tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed  ## the pages of docs/ and the API, into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: .venv/installed  ## every speed claim, as ratios measured side by side
	$(BIN)/python -m experiments.bench

setup: .venv/installed

.venv/installed: setup.py constraints.txt
	@echo "installing into .venv: about a minute"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .cache workdirs site build
