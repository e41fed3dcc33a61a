# Every target sets up what it needs: a clean machine needs Python >= 3.11, make and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.dit-sparse-installed

.PHONY: setup demo test lint format bench

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dit-sparse needs Python >= 3.11, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/dit-sparse demo

test: setup
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/dit-sparse bench

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
