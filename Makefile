# make quickstart   environment, then the main job end to end on the real data that is shipped (7 minutes on 2 cores after the downloads)
# make quickstart-3d  the same in 3-D: blocks of CT, Astra's encoder (11 minutes on 2 cores after the downloads)
# make quickstart-clip contrastive pretraining: zero-shot and retrieval on held-out volumes, the tower in an LVLM (8 minutes on 2 cores after the downloads)
# make quickstart-seg answers with masks: a mask head behind a small LLM, Dice on held-out volumes (10 minutes on 2 cores after the downloads)
# make uni-med-demo several tasks: experts against the dense baseline on held-out volumes, one table (half an hour on 2 busy cores)
# make motor-demo   pretraining on studies with and without knowledge, three seeds, one table of held-out volumes (8 minutes on 2 cores after the downloads)
# make test         environment, then the tests
# make campaign     the fault campaign: damage, kills, stops, hostile content; a table in campaign/results (12 minutes on 2 idle cores)
# make check        environment, then lint, format, types and import layers: what has to pass before a commit
# make format       ruff's fixes and formatting
# make docs         the generated pages of docs/
# make site         the documentation as a site, with search, in site/
# make golden       the resolved recipes that tests/test_golden_recipes.py compares with
# make env          the environment alone
#
# make lock         renew requirements/*.txt, the exact versions that the environment is made from
#
# Variables: PYTHON (3.11 or newer), VENV (folder), VERSIONS (locked, oldest or newest of the ranges in pyproject.toml; each
# has a folder of its own), TORCH (what pip installs first; empty: use the torch that is there), VENV_FLAGS.
# On a machine that has its own torch build:  make env VENV_FLAGS=--system-site-packages TORCH=

PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13,$(shell $(p) -c \
	'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VERSIONS ?= locked
VENV ?= .venv$(if $(filter-out locked,$(VERSIONS)),-$(VERSIONS))
VENV_FLAGS ?=
TORCH ?= torch==2.13.0
EXTRAS ?= dev
PIP := -m pip install --quiet --disable-pip-version-check

BIN := $(VENV)/bin
STAMP := $(VENV)/.medm-$(EXTRAS)
PINS := $(filter-out requirements/newest.txt,requirements/$(VERSIONS).txt)
PYTEST ?= $(BIN)/python -m pytest
# A file's tests stay together, since they share what they prepare; one thread each, or processes wait for one another.
PYTEST_ARGS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile

# Nothing that is run from here asks a hub, and compiled extensions are kept between runs.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions/$(VERSIONS)

.PHONY: help env quickstart quickstart-3d quickstart-clip quickstart-seg uni-med-demo motor-demo test campaign check lint types layers format docs site golden lock clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

env: $(STAMP)

# torch is installed first and alone: an open requirement would install the newest build with several GB of CUDA libraries.
# It is left out of the pins, so that a machine keeps its own build (TORCH=).
$(STAMP): pyproject.toml setup.py $(PINS)
	@test -n "$(PYTHON)" || { echo "medm needs Python 3.11 or newer; none was found (set PYTHON=/path/to/python3)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "medm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || $(PYTHON) -m virtualenv $(VENV_FLAGS) $(VENV) || \
		{ echo "no virtual environment could be made at $(VENV): install python3-venv, or 'pip install virtualenv'"; exit 1; }
	@echo "preparing $(VENV) with $(VERSIONS) versions; the first time takes a few minutes"
	@grep -hv '^torch==' $(PINS) /dev/null > $(VENV)/constraints.txt || true
	$(if $(TORCH),$(BIN)/python $(PIP) "$(TORCH)")
	$(BIN)/python $(PIP) --constraint $(VENV)/constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

# The CUDA libraries that torch's package names are left out: the CPU build needs none, and a CUDA build brings its own.
lock:
	@test -x .cache/lock/bin/uv || { $(PYTHON) -m venv .cache/lock && .cache/lock/bin/python $(PIP) uv; }
	@echo "$(TORCH)" > .cache/lock/torch.txt
	for end in locked:highest oldest:lowest-direct; do \
		.cache/lock/bin/uv pip compile --quiet pyproject.toml --extra $(EXTRAS) --resolution $${end#*:} --upgrade \
			--python-version 3.11 --override .cache/lock/torch.txt --no-annotate --no-header \
			| grep -vE '^(nvidia-|triton==|cuda-)' > .cache/lock/new.txt && \
		{ echo "# Written by make lock: $${end#*:} versions of the ranges in pyproject.toml, Python 3.11, CPU."; \
			cat .cache/lock/new.txt; } > requirements/$${end%:*}.txt || exit 1; \
	done

quickstart: env
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart/run.sh

quickstart-3d: env
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart_3d/run.sh

quickstart-clip: env
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart_clip/run.sh

quickstart-seg: env
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart_seg/run.sh

uni-med-demo: env
	PATH="$(abspath $(BIN)):$$PATH" bash examples/uni_med_demo/run.sh

motor-demo: env
	PATH="$(abspath $(BIN)):$$PATH" bash examples/motor_demo/run.sh

test: env
	OMP_NUM_THREADS=1 $(PYTEST) $(PYTEST_ARGS)

# The options of python -m campaign: make campaign CAMPAIGN="--only media --count 50"
CAMPAIGN ?=
campaign: env
	OMP_NUM_THREADS=1 $(BIN)/python -m campaign $(CAMPAIGN)

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

site: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html: $(BIN)/mkdocs serve shows it at http://127.0.0.1:8000"

golden: env
	$(BIN)/python -m tests.test_golden_recipes

clean:
	rm -rf build dist site *.egg-info .cache .mypy_cache .ruff_cache .pytest_cache
