# make demo | make test | make fuzz | make coverage | make lint | make docs | make clean: each sets up the environment
# .venv by itself. Wants only make and Python >= 3.10. To choose another interpreter or other wheels (torch's CPU wheels,
# say, which spare a machine without CUDA gigabytes; their index is named in torch's own installation guide):
#   make test PYTHON=python3.12 PIP_ARGS="--extra-index-url INDEX"

SHELL := /bin/bash
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# Threads that spin for long while they wait slow each other down many times over as soon as anything else wants the
# cores; threads that do not spin at all wake up too slowly for small layers.
export GOMP_SPINCOUNT := 10000

HALF := tests/engine tests/attacks tests/integration tests/tools tests/configs/test_coco_configs.py

.PHONY: demo test fuzz coverage lint docs clean setup

demo: setup
	$(BIN)/python tools/demo.py

test: lint
	@# Two processes, each with its own folders in a fixed order: what one test leaves behind never depends on timing.
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest $(HALF) > $(VENV)/half.log 2>&1 & half=$$!; \
	$(BIN)/python -m pytest tests $(HALF:%=--ignore=%); rest=$$?; \
	wait $$half; half=$$?; cat $(VENV)/half.log; exit $$((half + rest))

# All property tests with examples that are new every time, a hundred times as many where the input is strange.
fuzz: setup
	OMP_NUM_THREADS=1 MMITP_FUZZ=100 $(BIN)/python -m pytest tests -m hypothesis

# Which lines of mmitp/ the tests run, also in the processes that they start; fails under nine tenths.
coverage: export COVERAGE_FILE := $(CURDIR)/$(VENV)/coverage
coverage: setup
	rm -f $(COVERAGE_FILE)*
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m coverage run -m pytest $(HALF) > $(VENV)/half.log 2>&1 & half=$$!; \
	$(BIN)/python -m coverage run -m pytest tests $(HALF:%=--ignore=%); rest=$$?; \
	wait $$half; half=$$?; cat $(VENV)/half.log; test $$((half + rest)) = 0
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --fail-under=90

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site; fails on a broken link, a missing page, or a function that is not there.
docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs-ready: $(STAMP)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[docs]"
	touch $@

setup: $(STAMP)

# torch comes first and alone, so that nothing else decides which build of it is taken
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'mmitp needs Python 3.10 or newer, this is ' + sys.version)"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[mm,dev]"
	touch $@

clean:
	rm -rf $(VENV) work_dirs/demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
