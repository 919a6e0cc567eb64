PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo sim test test-fast soak crash cov bench fuzz lint fmt types check docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "batchrun needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

install: $(READY)  ## make the virtual environment and install batchrun into it

demo: $(READY)  ## run a job of jobs/ on the built-in simulator, to images under runs/
	$(BIN)/batchrun run jobs/mixed.toml --simulate --out runs/demo
	@echo && find runs/demo/images -type f | sort

sim: $(READY)  ## start the simulator by itself
	$(BIN)/batchrun simulate

test: $(READY)  ## run all tests
	$(BIN)/pytest -n 6 --dist worksteal

test-fast: $(READY)  ## run the tests of the rules and properties only
	$(BIN)/pytest tests/unit tests/property -n 2

soak: $(READY)  ## run 20,000 rows under every trouble at once (twenty minutes)
	$(BIN)/python -m tests.soak

crash: $(READY)  ## kill runs at every named point and resume them
	$(BIN)/pytest tests/crash -n 6 --dist worksteal

cov: $(READY)  ## run all tests and show what they do not reach
	$(BIN)/pip install --quiet pytest-cov
	$(BIN)/pytest -n 6 --dist worksteal --cov=batchrun --cov-report=term-missing:skip-covered

GROUP = import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"][sys.argv[1]])

bench: $(READY)  ## measure what batchrun costs and how well it uses its time; draws the plots anew
	@$(BIN)/python -c 'import matplotlib, uvloop' 2>/dev/null \
	  || $(BIN)/pip install --quiet --disable-pip-version-check uvloop $$($(BIN)/python -c '$(GROUP)' bench)
	$(BIN)/python -m bench
	$(BIN)/python -m bench.report

fuzz: $(READY)  ## fuzz every parser for FUZZ_SECONDS each (60), guided by coverage
	@$(BIN)/python -c 'import atheris' 2>/dev/null \
	  || $(BIN)/pip install --quiet --disable-pip-version-check --only-binary :all: $$($(BIN)/python -c '$(GROUP)' fuzz) \
	  || { echo "make fuzz needs atheris, which has no wheel for this Python or system; nothing was fuzzed"; exit 1; }
	$(BIN)/python -m fuzz

fmt: $(READY)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)  ## check style and format
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)  ## check types
	$(BIN)/mypy

check: lint types test  ## all that CI checks

docs: $(READY)  ## draw the state diagram anew
	$(BIN)/python -m docs.states > docs/states.md

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist runs
