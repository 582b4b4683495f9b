# make quickstart   environment, then the main job end to end on the real data that is shipped (12 minutes on 2 cores after the downloads)
# make quickstart-3d  the same in 3-D: blocks of CT, Astra's encoder (11 minutes on 2 cores after the downloads)
# make uni-med-demo several tasks: experts against the dense baseline on held-out volumes, one table (half an hour on 2 busy cores)
# make test         environment, then the tests
# make check        environment, then lint, format, types and import layers: what has to pass before a commit
# make format       ruff's fixes and formatting
# make docs         the generated pages of docs/
# make env          the environment alone
#
# Variables: PYTHON (3.11 or newer), VENV (folder), TORCH (what pip installs first; empty: take the torch that is there),
# VENV_FLAGS. On a machine that has its own torch build:  make env VENV_FLAGS=--system-site-packages TORCH=

PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13,$(shell $(p) -c \
	'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV ?= .venv
VENV_FLAGS ?=
TORCH ?= torch==2.13.0
EXTRAS ?= dev

BIN := $(VENV)/bin
STAMP := $(VENV)/.medm-$(EXTRAS)
PYTEST ?= $(BIN)/python -m pytest
# A file's tests stay together, since they share what they prepare; one thread each, or processes wait for one another.
PYTEST_ARGS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile

# Nothing that is run from here asks a hub, and compiled extensions are kept between runs.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.PHONY: help env quickstart quickstart-3d uni-med-demo test check lint types layers format docs clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

env: $(STAMP)

# torch goes first and alone: an open requirement would draw in the newest build with several GB of CUDA libraries.
$(STAMP): pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "medm needs Python 3.11 or newer; none was found (set PYTHON=/path/to/python3)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || $(PYTHON) -m virtualenv $(VENV_FLAGS) $(VENV) || \
		{ echo "no virtual environment could be made at $(VENV): install python3-venv, or 'pip install virtualenv'"; exit 1; }
	@echo "preparing $(VENV); the first time takes a few minutes"
	$(if $(TORCH),$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	@touch $@

quickstart: env
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart/run.sh

quickstart-3d: env
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart_3d/run.sh

uni-med-demo: env
	PATH="$(abspath $(BIN)):$$PATH" bash examples/uni_med_demo/run.sh

test: env
	OMP_NUM_THREADS=1 $(PYTEST) $(PYTEST_ARGS)

check: lint types layers

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

layers: env
	$(PYTEST) -q tests/test_layers.py tests/test_forbidden.py

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: env
	$(BIN)/medm reference recipes docs/recipe-reference.md
	$(BIN)/medm reference commands docs/cli.md

clean:
	rm -rf build dist *.egg-info .cache .mypy_cache .ruff_cache .pytest_cache
