# What one does here. `make demo` and `make test` need nothing but Python 3.11+ and do the set-up themselves.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup demo test lint types check format docs bench stress clean

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 10

setup: $(INSTALLED) ## a virtual environment in .venv with the pinned packages

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gatewise needs Python 3.11 or newer, this is $$($(PYTHON) --version); try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## train, measure, ship and look: runs/demo/report.html
	$(BIN)/gatewise demo

# A process of the tests per core, one thread each: more would wait for each other.
test: export OMP_NUM_THREADS := 1
test: setup ## all tests
	$(BIN)/python -m pytest -n 2 -m "not untyped and not gpu" \
	  --jaxtyping-packages=gatewise.ops,gatewise.layers,gatewise.networks,gatewise.gates,tests.check
	$(BIN)/python -m pytest -n 2 -m "untyped and not gpu"

lint: setup ## style, as CI checks it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## types, as CI checks them
	$(BIN)/mypy

check: lint types test ## everything that CI runs

format: setup ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## the documentation in site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup ## the benchmarks; results in benchmarks/results
	$(BIN)/python benchmarks/optimize_networks.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/gated_linear_attention.py
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/large_images.py
	$(BIN)/python benchmarks/block_fusion.py
	$(BIN)/python benchmarks/waterline.py
	$(BIN)/python benchmarks/quantization.py
	$(BIN)/python benchmarks/quantize_networks.py --speed
	$(BIN)/python benchmarks/image_networks.py --batch-size 1 --bf16
	$(BIN)/python benchmarks/image_networks.py --batch-size 16 --bf16

stress: setup ## ten thousand damaged files, fifty kills; results in benchmarks/results
	$(BIN)/python -m tests.stress.fuzz --cases 10000 --output benchmarks/results/stress_fuzz.json
	$(BIN)/python -m tests.stress.kill --kills 50 --output benchmarks/results/stress_kill.json

clean: ## everything that was built
	rm -rf .venv build site runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
